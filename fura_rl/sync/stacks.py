"""Stacks of experts that a checkpoint holds expert by expert.

transformers makes one tensor (experts, out, in) of matrices such as `model.layers.0.mlp.experts.3.up_proj.weight`,
under a name of its own.  The checkpoint and vLLM's loaders know the matrices alone, by which an engine finds the rows
of the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fura_rl.sync.factors import Read, Span

# Of each stack, by name, the names of an expert's matrices within its module, one below the other, where `*` stands for
# the expert: "*.gate_proj.weight", "*.up_proj.weight".
Stacks = Mapping[str, Sequence[str]]


def parts_of(name: str, shape: Sequence[int], patterns: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the matrices, one below the other, that the checkpoint has for the tensor `name` of `shape`;
    without `patterns` that is itself."""
    if not patterns:
        return {name: tuple(shape)}
    module = name.rpartition(".")[0]
    each = shape[1] // len(patterns), shape[2]
    return {f"{module}.{pattern.replace('*', str(expert))}": each for expert in range(shape[0]) for pattern in patterns}


def below_each_other(matrix: Callable[[int], Read], height: int) -> Read:
    """Slices of the matrix that `matrix(0)`, `matrix(1)` and so on are, of so many rows each."""

    def slices(rows: Span, columns: Span) -> torch.Tensor:
        found = []
        for i in range(rows[0] // height, -(-rows[1] // height)):
            span = max(rows[0] - i * height, 0), min(rows[1] - i * height, height)
            found.append(matrix(i)(span, columns))
        return found[0] if len(found) == 1 else torch.cat(found)

    return slices
