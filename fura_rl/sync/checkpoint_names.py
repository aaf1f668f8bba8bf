"""The names that a policy's tensors have in its checkpoint, by which an engine knows them.

transformers 5 loads some models under other names than their checkpoints hold (a Pythia's `embed_out` as `lm_head`, a
Mixtral's `block_sparse_moe` as `mlp`) and puts the checkpoint's back when it saves.  What it stacks of experts that the
checkpoint holds one by one stays a stack, for which vLLM's loaders have names of their own, and which an engine puts
together again from its checkpoint (`base_weights.PARTS_OF_STACKS`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

from fura_rl.sync.base_weights import PARTS_OF_STACKS
from fura_rl.sync.fold import CheckpointWeight

# of the matrices that a checkpoint has for each expert -> of their stack
NAMES_OF_STACKS = {parts: name for name, parts in PARTS_OF_STACKS.items()}


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
        self._stacks: dict[str, str] = {}  # transformers' name -> vLLM's
        self._held_otherwise: set[str] = set()  # what transformers makes of other matrices
        for converter in conversions:
            if isinstance(converter, WeightConverter):
                of_each = tuple(last_name(pattern.removesuffix(".weight")) for pattern in converter.source_patterns)
                made = {last_name(pattern) for pattern in converter.target_patterns}
                if of_each in NAMES_OF_STACKS:
                    self._stacks |= dict.fromkeys(made, NAMES_OF_STACKS[of_each])
                else:
                    self._held_otherwise |= made

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
            otherwise = len(weight.shape) == 3 and last_name(weight.name) in self._held_otherwise
            if name != weight.name or otherwise:
                weight = replace(weight, name=name, own_name=weight.name, held_otherwise=otherwise)
            found[name] = weight
        return found


def last_name(path: str) -> str:
    return path.rpartition(".")[2]
