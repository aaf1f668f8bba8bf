"""Which base model an adapter was trained on: a few weights of every matrix, recorded beside the adapter.

Values, not bytes of files, are compared, exactly up to the rounding of the coarser of the two precisions: a base that
was sharded otherwise or saved in another precision is the same base, a model of the same shape trained further is not.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "base_model_fingerprint.json"
ENTRIES = 4  # per matrix
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def fingerprint(model: str, revision: str | None = None) -> dict[str, list[float]] | None:
    """Tensor name -> ENTRIES of its values, for every matrix of a checkpoint folder or hub id.

    Read from the files, without loading the model; None where it has no safetensors.
    """
    from safetensors import safe_open

    values = {}
    for file in weight_files(model, revision):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                part = tensors.get_slice(name)
                shape = part.get_shape()
                if len(shape) == 2:
                    row = part[zlib.crc32(name.encode()) % shape[0]].float()
                    values[name] = [float(row[(2 * i + 1) * shape[1] // (2 * ENTRIES)]) for i in range(ENTRIES)]
    return values or None


def weight_files(model: str, revision: str | None) -> Iterator[str]:
    from transformers.utils import cached_file

    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(model, SINGLE, **options)
    index = None if single else cached_file(model, INDEX, **options)
    names = [SINGLE] if single else []
    if index:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    for name in names:
        yield cached_file(model, name, revision=revision)


def mismatches(recorded: dict[str, list[float]], found: dict[str, list[float]]) -> list[str]:
    """The tensors of `recorded` that `found` lacks or holds other values of."""
    import torch

    from fura_rl.sync.rounding import are_the_same_rounded

    return [
        name
        for name, values in recorded.items()
        if name not in found or not are_the_same_rounded(torch.tensor(values), torch.tensor(found[name]))
    ]


def record(folder: Path, base: dict[str, Any]) -> None:
    """Write what an adapter was trained on beside it: `model`, `quantization` and `weights`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(base) + "\n")


def describe_base(model: str, revision: str | None, quantization: str | None) -> dict[str, Any]:
    """What `record` writes.  `quantization` is "nf4", "fp4", "int8" or None."""
    return {"model": model, "quantization": quantization, "weights": fingerprint(model, revision)}


def recorded_base(adapter: str) -> dict[str, Any] | None:
    """What was recorded beside an adapter, or None."""
    file = Path(adapter) / FILE
    return json.loads(file.read_text()) if file.is_file() else None


def check_base(
    adapter: str, base_model: str, revision: str | None = None, mend: str = "Name the right base with --base_model"
) -> dict[str, Any] | None:
    """The record of an adapter's base, after comparing it with `base_model`; None where there is no record.

    Raises:
        ValueError: where `base_model` is another model than the adapter was trained on; it ends with `mend`.
    """
    recorded = recorded_base(adapter)
    if recorded is None or recorded["weights"] is None:
        return recorded
    found = fingerprint(base_model, revision)
    if found and (different := mismatches(recorded["weights"], found)):
        raise ValueError(
            f"adapter {adapter!r} was trained on {recorded['model']!r}, and {base_model!r} is another model: "
            f"fingerprint mismatch in {len(different)} of {len(recorded['weights'])} matrices, e.g. {different[0]}. "
            f"{mend}"
        )
    return recorded
