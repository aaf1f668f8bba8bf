"""MiLoRA (arXiv 2406.09044): LoRA started at the minor singular directions of the weight.

PEFT has no such start (its `mica` trains one factor only), so this is its LoRA with another initialization, registered
as a method of its own: a checkpoint must know that the base weight gives up the same part again when it is loaded.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import nn

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod
from fura_rl.adapters.methods.pissa import SHIFTED_BASE
from fura_rl.adapters.registration import register


class MiloraPeftType(str, enum.Enum):  # noqa: UP042  PEFT reads `.value` and also uses the member as a dict key
    """MiLoRA's own entry beside `peft.PeftType`."""

    MILORA = "MILORA"


@dataclass
class MiloraConfig(LoraConfig):
    """`LoraConfig` with MiLoRA's start; every other setting is LoRA's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MiloraPeftType.MILORA
        if self.init_lora_weights is not True:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r}: MiLoRA has one start, the minor singular directions; "
                "leave it out, or use adapter lora"
            )


class MiloraModel(LoraModel):
    """PEFT's LoRA model whose layers start at the minor singular directions."""

    def _create_and_replace(
        self, lora_config: LoraConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **kwargs: Any,
    ) -> None:  # fmt: skip
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        start_at_minor_directions(getattr(parent, target_name), adapter_name, current_key)


@torch.no_grad()
def start_at_minor_directions(layer: LoraLayer, adapter_name: str, layer_name: str) -> None:
    """Move the part of W (out, in) along its r smallest singular values into the adapter:

        W = U diag(S) V^T,   B = U_r diag(S_r / scaling)^1/2,   A = diag(S_r / scaling)^1/2 V_r^T,   W -= scaling B A

    Where the adapter is still on the meta device (a checkpoint follows), only W is changed.

    Raises:
        TypeError: where W is no floating-point matrix.
        ValueError: where r exceeds the rank that W can have.
    """
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if not isinstance(base, nn.Linear) or not weight.is_floating_point():
        raise TypeError(f"{layer_name}: MiLoRA needs an unquantized linear layer, not {type(base).__name__}")
    rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    if rank > min(weight.shape):
        raise ValueError(f"{layer_name}: r={rank} exceeds min(out, in)={min(weight.shape)}; lower lora_r")
    left, values, right = torch.linalg.svd(weight.data.float(), full_matrices=False)
    root = (values[-rank:] / scaling).sqrt()
    b, a = left[:, -rank:] * root, root[:, None] * right[-rank:]
    weight.data = (weight.data.float() - scaling * (b @ a)).to(weight.dtype)
    for factor, start in ((layer.lora_A, a), (layer.lora_B, b)):
        parameter = factor[adapter_name].weight
        if parameter.device.type != "meta":
            parameter.copy_(start)


register(MiloraPeftType.MILORA, MiloraConfig, MiloraModel)

METHOD = AdapterMethod(
    config_class=MiloraConfig,
    summary="low-rank factors started at the minor singular directions",
    paper="arXiv 2406.09044",
    paper_learning_rate=3e-4,
    rate_of="its code (LLaMA-2-7B, mathematics)",
    limits=f"{SHIFTED_BASE}; no quantized base",
    settings=lora.settings,
    capacity="r",
    shifts_base=True,
)
