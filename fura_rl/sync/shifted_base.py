"""Adapters that moved their base weight when they were made, and what an engine with the checkpoint's needs of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fura_rl.sync.factors import Factors
from fura_rl.sync.fold import CheckpointWeight

# Starts of LoRA, and a method of ours, that take B A out of the base weight.  LoftQ quantizes what is left, so that B A
# no longer tells what is missing.  Of PEFT 0.21's others gaussian, orthogonal, EVA and MiCA leave the weight alone.
SHIFTING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq", "milora")


def starts_of(layer: BaseTunerLayer, adapter_configs: dict[str, Any]) -> list[str]:
    """How the active adapters of `layer` began: the method of each, and its `init_lora_weights`."""
    configs = [adapter_configs[name] for name in layer.active_adapters if name in adapter_configs]
    names = [(config.peft_type.value, getattr(config, "init_lora_weights", None)) for config in configs]
    return [str(name).lower() for pair in names for name in pair]


def shifts_its_base(layer: BaseTunerLayer, adapter_configs: dict[str, Any]) -> bool:
    """Whether making the adapter moved the base weight away from the checkpoint's (PiSSA and its kin)."""
    return any(start.startswith(SHIFTING_STARTS) for start in starts_of(layer, adapter_configs))


def starts_of_shifted_bases(weights: Iterable[CheckpointWeight], model: nn.Module) -> dict[str, Factors]:
    """What PiSSA and its kin took out of the base weight when the adapter was made: B0 A0 of each layer.

    Must be called before a checkpoint's adapter is loaded over the one just made.

    Raises:
        NotImplementedError: where what was taken out has no small form, so that the engine cannot put it back.
    """
    starts = {}
    for weight in weights:
        if weight.layer is None or not shifts_its_base(weight.layer, model.peft_config):
            continue
        factors = weight.factors()
        if factors.rule != "low_rank" or "loftq" in starts_of(weight.layer, model.peft_config):
            raise NotImplementedError(
                f"{weight.name}: the adapter moved its base weight when it was made, in a form that an engine which "
                "reads its own checkpoint cannot follow; use vllm_mode=colocate"
            )
        starts[weight.name] = Factors("low_rank", {part: tensor.clone() for part, tensor in factors.tensors.items()})
    return starts


def relative_to_start(factors: Factors, start: Factors) -> Factors:
    """B A - B0 A0 as one low-rank product, (B - B0) A + B0 (A - A0): the update of the checkpoint's weight.

    So written nothing large cancels: in 16 bits, as it is sent, B A - B0 A0 would be off by more than a small update.
    """
    up, down, up0, down0 = (tensors[part] for tensors in (factors.tensors, start.tensors) for part in ("up", "down"))
    return Factors("low_rank", {"up": torch.cat([up - up0, up0], dim=1), "down": torch.cat([down, down - down0])})
