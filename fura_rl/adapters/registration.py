"""PEFT methods of this package, made known to PEFT under names of their own."""

from __future__ import annotations

import enum

import peft.mapping
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner


def register(peft_type: enum.Enum, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Make PEFT know a tuner, with the checks of `peft.utils.register_peft_method`.

    That function wants a member of PEFT's own enum, which belongs to PEFT; the three tables take any `str` enum (read
    in peft 0.21).  Calling this twice is harmless.

    Raises:
        KeyError: where another package has taken the name or the prefix.
    """
    tables = (
        (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for table, entry in tables:
        if table.get(peft_type, entry) is not entry:
            raise KeyError(
                f"another package has registered a PEFT method called {peft_type.value!r}; import only one of them"
            )
    tuners, prefixes = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    owners = [tuners[other] for other, prefix in prefixes.items() if prefix == tuner.prefix and other != peft_type]
    if owners and not issubclass(tuner, tuple(owners)):  # a variant of LoRA shares LoRA's prefix
        raise KeyError(f"the parameter prefix {tuner.prefix!r} belongs to another PEFT method")
    for table, entry in tables:
        table[peft_type] = entry
