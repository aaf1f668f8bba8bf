"""LoRA with the backbone trained too: the FuRA paper's control for what the frozen backbone costs.

y = W x + D x + scaling B A x.  D (out, in) starts at zero and is trained in the place of W: the gradients and Adam
steps of W itself, while W stays whole, so the adapter can be switched off, and a checkpoint holds all that was trained.
A variant of PEFT's LoRA layer; `LoraVariant` was read in PEFT 0.21.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod
from fura_rl.adapters.registration import register


class LoraFullPeftType(str, enum.Enum):  # noqa: UP042  PEFT reads `.value` and also uses the member as a dict key
    """This method's own entry beside `peft.PeftType`."""

    LORA_FULL = "LORA_FULL"


@dataclass
class LoraFullConfig(LoraConfig):
    """`LoraConfig`; the adapted layers' own weights are trained beside it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LoraFullPeftType.LORA_FULL
        if self.use_dora:
            raise ValueError("use_dora=True: lora_full trains the whole weight beside a plain LoRA; leave it out")


class LoraFullModel(LoraModel):
    """PEFT's LoRA model with a trained difference D beside every adapted weight."""

    def _create_and_replace(
        self, lora_config: LoraConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **kwargs: Any,
    ) -> None:  # fmt: skip
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = getattr(parent, target_name)
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
            raise TypeError(f"{current_key}: lora_full trains an unquantized linear layer, not {type(base).__name__}")
        if not hasattr(layer, "lora_backbone"):
            layer.lora_backbone = nn.ModuleDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_backbone")
        difference = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        on_meta = layer.lora_A[adapter_name].weight.device.type == "meta"  # a checkpoint follows
        if not on_meta:
            difference = difference.to_empty(device=base.weight.device).to(layer.lora_A[adapter_name].weight.dtype)
            nn.init.zeros_(difference.weight)
        difference.weight.requires_grad_(layer.lora_A[adapter_name].weight.requires_grad)
        layer.lora_backbone[adapter_name] = difference
        layer.lora_variant[adapter_name] = TrainedBackbone()


class TrainedBackbone(LoraVariant):
    """How a LoRA layer computes and merges once D stands beside its B A."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: `LoraFullModel` makes D."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        low_rank = module.lora_B[active_adapter](module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)))
        return result + module.lora_backbone[active_adapter](x) + module.scaling[active_adapter] * low_rank

    @staticmethod
    def update(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        """D + scaling B A, (out, in)."""
        return module.lora_backbone[active_adapter].weight.data + module.get_delta_weight(active_adapter)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + TrainedBackbone.update(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data = TrainedBackbone.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight.data - TrainedBackbone.update(module, active_adapter).to(orig_weight.dtype)


register(LoraFullPeftType.LORA_FULL, LoraFullConfig, LoraFullModel)

METHOD = AdapterMethod(
    config_class=LoraFullConfig,
    summary="low-rank update, and every adapted weight itself",
    paper="arXiv 2605.22869",
    paper_learning_rate=None,
    limits="the memory and the checkpoint of full fine-tuning and a second copy of the adapted weights; embeddings and "
    "norms stay frozen; no quantized base",
    settings=lora.settings,
)
