"""The audit of stacked experts: their kernel multiplies by two weights with a gate between, so one expert is one map.

Every expert is asked by name, `model.layers.0.mlp.experts.3`, with the audit's vectors as its tokens and routing weight
1.  The regression of `audit.py` needs no linear map: a stale expert answers as before, a fresh one as expected.  The
trainer computes what to expect with the experts module of transformers itself, on the weights that the engine was sent.
An expert of which one weight arrived and the other did not lies between: it is named where the one that is missing is
more than a quarter of the update, or a half of one that rounding nearly hides.  So is one that tensor-parallel workers
share, since their gated parts can be judged by nothing but their sum.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.func import functional_call

from fura_rl.sync.audit import ROUNDINGS_PER_UPDATE, VECTORS, probe_vectors, sample_spans, tokens_of_experts
from fura_rl.sync.factors import Span, row_index
from fura_rl.sync.fold import CheckpointWeight, pristine_weight
from fura_rl.sync.sharding import is_cut_by_rows, is_piece, local

logger = logging.getLogger(__name__)

ROUTES = {"top_k_index", "top_k_weights"}  # what transformers' experts are called with, beside the tokens
ROUNDINGS = 3 * ROUNDINGS_PER_UPDATE  # a 16-bit kernel rounds gate and up, their product, and the output


@dataclass(frozen=True)
class ExpertLayer:
    """The stacked experts of one layer, `module`, and their `weights`; `name` as in the checkpoint.

    Of experts that are cut up over processes each looks at those that it holds, `experts`, which may be none.
    """

    name: str
    module: nn.Module
    weights: tuple[CheckpointWeight, ...]

    @property
    def experts(self) -> Span:
        weight = self.weights[0]
        each = weight.matrix_shape[0] // weight.shape[0]
        first, last = weight.local_rows
        return first // each, last // each

    @property
    def names(self) -> list[str]:
        return [f"{self.name}.{expert}" for expert in range(*self.experts)]

    @property
    def width(self) -> int:
        """Features of the stream that experts read and write."""
        return self.module.hidden_dim if hasattr(self.module, "hidden_dim") else self.module.hidden_size

    @property
    def spans(self) -> list[Span]:
        """The output features looked at, of every expert."""
        return sample_spans((0, self.width))

    @torch.no_grad()
    def replies(self, dtype: torch.dtype) -> torch.Tensor:
        """(experts, VECTORS, features): what a kernel must compute that holds these weights in `dtype`.

        Collective where the experts are cut up.
        """
        return self._replies([weight.local_value().to(dtype) for weight in self.weights])

    @torch.no_grad()
    def base_replies(self) -> torch.Tensor | None:
        """The same of the base weights; None where training has overwritten them."""
        if any(weight.trained and weight.layer is None for weight in self.weights):
            return None
        return self._replies([local(pristine_weight(weight)) for weight in self.weights])

    def _replies(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        first, last = self.experts
        if first == last:
            return torch.empty(0)
        tensors = {
            weight.parameter_name: value.view(last - first, *weight.shape[1:]).float()
            for weight, value in zip(self.weights, values, strict=True)
        }
        device = values[0].device
        vectors = probe_vectors(self.width, device)
        tokens, routes = tokens_of_experts(vectors, range(last - first))
        module = copy.copy(self.module)  # of as many experts as are held here
        module.num_experts = last - first
        output = functional_call(module, tensors, (tokens, routes, torch.ones(len(tokens), 1, device=device)))
        picked = row_index(tuple(self.spans), device)
        return output[:, picked].reshape(last - first, VECTORS, -1)


def expert_layers(model: nn.Module, weights: Iterable[CheckpointWeight]) -> Iterator[ExpertLayer]:
    """Every trained stack of experts that can be called as transformers' experts are, and is cut, if at all, between
    experts."""
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    stacks: dict[str, list[CheckpointWeight]] = {}
    for weight in weights:
        stacks.setdefault(weight.module_name, []).append(weight)
    for name, stack in stacks.items():
        trained = any(weight.trained and len(weight.shape) == 3 for weight in stack)
        if not trained or not all(is_cut_by_rows(weight.parameter) for weight in stack if is_piece(weight.parameter)):
            continue
        module = base_model.get_submodule(name)
        while isinstance(module, ParamWrapper):
            module = module.base_layer
        if takes_routes(module):
            yield ExpertLayer(stack[0].name.rpartition(".")[0], module, tuple(stack))
        else:
            warn_of_unaudited(type(module).__name__)


def takes_routes(module: nn.Module) -> bool:
    """Whether its tokens can be sent to the experts of one's choice."""
    return hasattr(module, "num_experts") and set(inspect.signature(module.forward).parameters) >= ROUTES


@functools.cache  # once
def warn_of_unaudited(kind: str) -> None:
    logger.warning("weight sync: %s takes no routes, so that its experts are proved by the probe alone", kind)
