"""One copy of the weights for policy and engine, in one process: `vllm_share_weights`.

An engine beside the trainer holds the model a second time.  Here the policy's modules use the engine's storage (q, k
and v as rows of vLLM's fused qkv), and the pristine values of the adapted weights wait in host memory.  A push folds
each of them in its place; `restore` copies the pristine ones back before the policy computes again.  What is saved is
the model's size in device memory, what is paid is one copy from the host per rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from fura_rl.sync.checkpoint_names import CheckpointNames
from fura_rl.sync.engine import Push, Update
from fura_rl.sync.factors import Read, Span
from fura_rl.sync.fingerprint import Sample
from fura_rl.sync.fold import CheckpointWeight, checkpoint_weights, pristine_weight
from fura_rl.sync.stacks import Stacks
from fura_rl.sync.vllm_engine import InProcessEngine
from fura_rl.sync.vllm_modules import is_in_checkpoint_layout

if TYPE_CHECKING:
    from vllm import LLM

BETWEEN_ROLLOUTS = "its weights are the policy's base weights while the policy computes"


class Unshareable(ValueError):
    """A weight that policy and engine cannot hold together; the message goes on from its name."""


class SingleCopyEngine(InProcessEngine):
    """An in-process engine whose storage is the policy's own.

    From `push` to `restore` it holds the folded weights and the engine generates; otherwise the policy has its base
    weights, and the engine refuses to.  A forward of the policy restores.

    Raises:
        ValueError: from `prepare`, where an adapted weight cannot lie in the engine's storage, with the reason.
    """

    def __init__(self, llm: LLM, policy: nn.Module) -> None:
        super().__init__(llm)
        self.policy = policy
        self._adapted: list[tuple[torch.Tensor, torch.Tensor]] = []  # where each lies in the engine; its pristine value
        self._folded = False
        base_model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        base_model.register_forward_pre_hook(lambda *_: self.restore())

    def prepare(
        self, tensors: Mapping[str, tuple[int, ...]], stacks: Stacks, base_samples: Mapping[str, Sample]
    ) -> None:
        """Move the policy into the engine's storage; an unadapted weight that has no place there stays where it is."""
        super().prepare(tensors, stacks, base_samples)
        places, refused = {}, {}
        weights = CheckpointNames(self.policy).named(checkpoint_weights(self.policy))
        for name, weight in weights.items():
            try:
                places[name] = self._place_of(weight)
            except Unshareable as reason:
                if weight.trained:
                    refused[name] = reason
                else:
                    weight.parameter.data = weight.parameter.data.to(self.model.device)  # `move_to_host` took it away
        if refused:
            name, reason = next(iter(refused.items()))
            raise ValueError(
                f"vllm_share_weights=true, but {len(refused)} trained weights cannot lie in the engine's storage: "
                f"{name} {reason}; mend that, or leave vllm_share_weights out"
            )
        for name, live in places.items():
            parameter = weights[name].parameter
            host = in_host_memory(parameter.data)
            live.copy_(host)
            parameter.data = live
            if weights[name].trained:
                self._adapted.append((live, host))

    def _place_of(self, weight: CheckpointWeight) -> torch.Tensor:
        """Where `weight` lies in the engine.

        Raises:
            Unshareable: where the policy cannot compute from there.
        """
        if weight.layer is None and weight.trained:
            raise Unshareable("is trained itself, not through an adapter")
        if weight.quantized is not None or pristine_weight(weight).data_ptr() != weight.parameter.data_ptr():
            raise Unshareable("is not held as the plain weight that it stands for")
        if weight.parameter.dtype != self.dtype:
            raise Unshareable(
                f"is {weight.parameter.dtype}, the engine's {self.dtype}: --dtype and --vllm_dtype differ"
            )
        owners = self.model.owners.get(weight.name, [])
        places = [(owner, r) for owner in owners for r in self.model.regions[owner] if r.name == weight.name]
        if len(places) != 1 or places[0][1].element_count != weight.element_count or places[0][1].ops:
            raise Unshareable("lies in the engine in several pieces")
        [(owner, region)] = places
        module = self.model.modules[owner]
        if (
            region.transposed
            or region.row_order is not None
            or not is_in_checkpoint_layout(module, self.model.regions[owner])
        ):
            raise Unshareable("is kept by the engine in another layout (an engine on a CPU packs its weights)")
        return region.view(getattr(module, region.parameter))

    def push(self, update: Update) -> Push:
        self.restore()
        self._folded = True  # from the first write on, also where a later one fails

        def read(name: str) -> Read:
            slices = update.read(name)

            def copied(rows: Span, columns: Span) -> torch.Tensor:
                return slices(rows, columns).clone()  # the fold writes where it reads

            return copied

        push = super().push(replace(update, read=read))
        self._last = update
        return push

    def restore(self) -> None:
        """Give the policy its base weights back; the engine refuses to generate until the next push."""
        if not self._folded:
            return
        for live, pristine in self._adapted:
            live.copy_(pristine, non_blocking=True)
        self._folded = False
        self.model.poisoned = BETWEEN_ROLLOUTS


def move_to_host(policy: nn.Module) -> None:
    """Make room for an engine before it is built: the base weights wait in host memory until they are shared."""
    with torch.no_grad():
        for weight in checkpoint_weights(policy):
            if weight.layer is not None or not weight.trained:
                weight.parameter.data = in_host_memory(weight.parameter.data)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself where it is there already, else a copy in pinned memory, from which a GPU reads fastest."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
