"""The table of adapter methods.  A new one is a file in `methods/` and a line here."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from peft import PeftConfig

from fura_rl.adapters.fura_tuner import PAPER_TARGETS
from fura_rl.adapters.methods import dora, full, fura, lora, svd
from fura_rl.adapters.methods.method import AdapterMethod

if TYPE_CHECKING:
    from trl import ModelConfig

METHODS: dict[str, AdapterMethod] = {
    "fura": fura.METHOD,
    "svd": svd.METHOD,
    "lora": lora.METHOD,
    "dora": dora.METHOD,
    "full": full.METHOD,
}


def find_method(name: str) -> AdapterMethod:
    """The method of this name.

    Raises:
        ValueError: where there is none, with the nearest name.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"adapter={name!r} is not one of {', '.join(METHODS)}{hint}")
    return METHODS[name]


def peft_config_for(
    name: str, model_args: ModelConfig, target_modules: list[str] | None, adapter_kwargs: dict[str, Any] | None
) -> PeftConfig | None:
    """The PEFT config of a method, or None for full fine-tuning.

    Raises:
        ValueError: for an unknown method, or a setting that its config does not have.
    """
    method = find_method(name)
    settings = {"task_type": "CAUSAL_LM", "target_modules": target_modules or list(PAPER_TARGETS)}
    settings |= method.settings(model_args) | (adapter_kwargs or {})
    if method.config_class is None:
        if adapter_kwargs:
            raise ValueError(f"adapter={name!r} takes no adapter_kwargs, got {adapter_kwargs}")
        return None
    known = {f.name for f in dataclasses.fields(method.config_class)}
    if unknown := sorted(set(settings) - known):
        hints = [
            f"{key!r}" + "".join(f" (did you mean {n!r}?)" for n in get_close_matches(key, known, n=1))
            for key in unknown
        ]
        raise ValueError(f"adapter_kwargs: {method.config_class.__name__} has no setting {', '.join(hints)}")
    return method.config_class(**settings)
