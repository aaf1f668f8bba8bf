"""The pristine base weights of an engine: slices of its own checkpoint's safetensors files, never written."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fura_rl.sync.factors import Read, Span, matrix_shape
from fura_rl.sync.fingerprint import Sample, fits
from fura_rl.sync.stacks import below_each_other

INDEX = "model.safetensors.index.json"


class BaseWeights:
    """A checkpoint folder, or a hub id that is in the local cache.

    Slices come from the memory-mapped files, so that what stays in memory is the page cache's business.  `parts` are
    the matrices, one below the other, of every stack of experts that it holds expert by expert.
    """

    def __init__(self, model: str, revision: str | None, device: torch.device) -> None:
        self.folder = find_folder(model, revision)
        self.device = device
        self._files = self._index()
        self._open: dict[str, Any] = {}
        self.parts: dict[str, list[str]] = {}

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            return json.loads(index.read_text())["weight_map"]
        names = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names |= dict.fromkeys(file.keys(), path.name)
        if not names:
            raise FileNotFoundError(
                f"{self.folder} holds no safetensors weights; the engine's base weight must be a safetensors checkpoint"
            )
        return names

    def __contains__(self, name: str) -> bool:
        return all(self._stored_name(part) in self._files for part in self.parts.get(name, [name]))

    def _stored_name(self, name: str) -> str:
        """`name`, or without its first part where the checkpoint is of the base model alone, as GPT-2's on the hub."""
        bare = name.partition(".")[2]
        return bare if name not in self._files and bare in self._files else name

    def _slice(self, name: str) -> Any:
        stored = self._stored_name(name)
        file = self._files[stored]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_slice(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored; of a stack that is held expert by expert, that of the matrix which its parts are."""
        if parts := self.parts.get(name):
            height, width = self.shape(parts[0])
            return len(parts) * height, width
        return tuple(self._slice(name).get_shape())

    def whole(self, name: str) -> torch.Tensor:
        """One tensor on the engine's device, in the checkpoint's dtype; of a stack of experts all their rows."""
        rows, columns = matrix_shape(self.shape(name))
        return self.read(name)((0, rows), (0, columns))

    def read(self, name: str) -> Read:
        """Slices of one tensor as a matrix or vector, on the engine's device, in the checkpoint's dtype."""
        if parts := self.parts.get(name):
            return below_each_other(lambda i: self.read(parts[i]), self.shape(parts[0])[0])
        stored = self._slice(name)
        shape = stored.get_shape()
        if len(shape) == 3:
            return below_each_other(lambda i: functools.partial(self._matrix, stored, i), shape[1])
        if len(shape) > 3:  # of a convolution
            return lambda rows, columns: stored[:].flatten(0, -2)[slice(*rows), slice(*columns)].to(self.device)
        vector = len(shape) == 1

        def slices(rows: Span, columns: Span) -> torch.Tensor:
            part = stored[slice(*rows)] if vector else stored[slice(*rows), slice(*columns)]
            return part.to(self.device)

        return slices

    def _matrix(self, stored: Any, index: int, rows: Span, columns: Span) -> torch.Tensor:
        return stored[index : index + 1, slice(*rows), slice(*columns)].squeeze(0).to(self.device)

    def differences(self, samples: Mapping[str, Sample]) -> list[str]:
        """The tensors that are missing or whose sampled values are not those of the trainer's base weight."""
        return [
            name
            for name, sample in samples.items()
            if name not in self or not fits(sample, self.read(name), matrix_shape(self.shape(name)))
        ]


def find_folder(model: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; a hub id is looked up in the cache, where the engine has put it."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=["*.safetensors*"]))
