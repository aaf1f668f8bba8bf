"""The names that a policy's tensors have in its checkpoint, by which an engine knows them.

transformers 5 loads some models under other names than their checkpoints hold (a Pythia's `embed_out` as `lm_head`, a
Mixtral's `block_sparse_moe` as `mlp`) and puts the checkpoint's back when it saves.  What it stacks of experts that the
checkpoint holds one by one stays a stack, for which vLLM's loaders have names of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

from fura_rl.sync.fold import CheckpointWeight

# vLLM's names of stacks by the names of the matrices that a checkpoint has for each expert: read in vLLM 0.31,
# `RoutedExperts.build_expert_params_mapping`.  Where they are gate_proj, up_proj and down_proj, transformers' fit.
STACKS = {("w1", "w3"): "w13", ("w2",): "w2"}


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
        self._stacks = {}
        for converter in conversions:
            if isinstance(converter, WeightConverter):
                of_each = tuple(last_name(pattern.removesuffix(".weight")) for pattern in converter.source_patterns)
                if of_each in STACKS:
                    self._stacks |= {last_name(pattern): STACKS[of_each] for pattern in converter.target_patterns}

    def __call__(self, name: str) -> str:
        for renaming in self._back:
            name, _ = renaming.rename_source_key(name)
        module, _, last = name.rpartition(".")
        return f"{module}.{self._stacks.get(last, last)}" if module else name

    def named(self, weights: Iterable[CheckpointWeight]) -> dict[str, CheckpointWeight]:
        """`weights` under their names in the checkpoint."""
        found = {}
        for weight in weights:
            name = self(weight.name)
            found[name] = weight if name == weight.name else replace(weight, name=name, own_name=weight.name)
        return found


def last_name(path: str) -> str:
    return path.rpartition(".")[2]
