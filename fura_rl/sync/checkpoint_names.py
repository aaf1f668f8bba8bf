"""The names that a policy's tensors have in its checkpoint, by which an engine knows them.

transformers 5 loads some models under other names than their checkpoints hold (a Pythia's `embed_out` as `lm_head`, a
Mixtral's `block_sparse_moe` as `mlp`) and puts the checkpoint's back when it saves.  What it stacks of experts that the
checkpoint holds one by one stays a stack, beside the names of its matrices (`stacks.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
)

from fura_rl.sync.fold import CheckpointWeight

# What transformers does to the matrices of experts to stack them, those of each expert below each other.
STACKING = [(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]


class CheckpointNames:
    """From the names of a model's tensors to those in its checkpoint.

    Args:
        model: a plain or a PEFT model; one that is none of transformers' has the names of its checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        known = isinstance(base_model, PreTrainedModel)
        conversions = get_model_conversion_mapping(base_model, add_legacy=False) if known else []
        # a prefix is there or not, as the checkpoint was of a whole model or of its base: vLLM's loaders take both
        renamings = [c for c in conversions if isinstance(c, WeightRenaming) and not isinstance(c, PrefixChange)]
        self._back = [renaming.reverse_transform() for renaming in reversed(renamings)]
        self._parts: dict[str, tuple[str, ...]] = {}  # of every stack, by its last name; none where they are not known
        for converter in conversions:
            if isinstance(converter, WeightConverter):
                for target in converter.target_patterns:
                    self._parts[last_name(target)] = patterns_of_parts(converter, target)

    def __call__(self, name: str) -> str:
        for renaming in self._back:
            name, _ = renaming.rename_source_key(name)
        return name

    def named(self, weights: Iterable[CheckpointWeight]) -> dict[str, CheckpointWeight]:
        """`weights` under their names in the checkpoint."""
        found = {}
        for weight in weights:
            name = self(weight.name)
            parts = self._parts.get(last_name(weight.name)) if len(weight.shape) == 3 else None
            if name != weight.name or parts is not None:
                own = {"own_name": weight.name, "parts": parts or (), "held_otherwise": parts == ()}
                weight = replace(weight, name=name, **own)
            found[name] = weight
        return found


def patterns_of_parts(converter: WeightConverter, stack: str) -> tuple[str, ...]:
    """The matrices that `converter` makes `stack` of, as in `stacks.Stacks`; none where it does anything else."""
    module = stack.rpartition(".")[0] + "."
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    patterns = tuple(source.removeprefix(module) for source in converter.source_patterns)
    fit = all(source.startswith(module) for source in converter.source_patterns)
    one_expert = all(pattern.count("*") == 1 and pattern.startswith("*.") for pattern in patterns)
    return patterns if fit and one_expert and steps in STACKING else ()


def last_name(path: str) -> str:
    return path.rpartition(".")[2]
