"""The adapter layers that are measured against each other, each around the same frozen linear map."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import nn

from fura_rl.adapters.fura_config import FuraConfig


class PaperLayer(nn.Module):
    """The paper's layer as its formula reads, y = (L diag(S)) (R x): the large core is scaled in every forward.

    Kept for the comparison only.  Shapes: L (out, n, r) frozen; S (n, r), R (n, r, b) trained.
    """

    def __init__(self, linear: nn.Linear, block_size: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        blocks = weight.float().reshape(weight.shape[0], -1, block_size).transpose(0, 1)
        left, values, right = torch.linalg.svd(blocks, full_matrices=False)
        self.large = nn.Parameter(left.transpose(0, 1).to(weight.dtype).contiguous(), requires_grad=False)
        self.singular_values = nn.Parameter(values.to(weight.dtype))
        self.small = nn.Parameter(right.to(weight.dtype).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, r, b = self.small.shape
        z = torch.einsum("nrb,tnb->tnr", self.small, x.reshape(-1, n, b)).reshape(-1, n * r)
        scaled = (self.large * self.singular_values).reshape(-1, n * r)
        return nn.functional.linear(z, scaled).reshape(*x.shape[:-1], -1)


def make_contenders(linear: nn.Linear) -> dict[str, nn.Module]:
    """Name -> layer around a copy of `linear`; "lora" has as many trained numbers as "fura", to the nearest rank."""

    def adapted(config: object) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return get_peft_model(nn.Sequential(copy.deepcopy(linear)), config).base_model.model[0]

    fura = adapted(FuraConfig(target_modules=["0"]))
    rank = max(1, round(trained_numbers(fura) / (linear.in_features + linear.out_features)))
    frozen = copy.deepcopy(linear).requires_grad_(False)
    return {
        "frozen": frozen,
        "fura": fura,
        "lora": adapted(LoraConfig(target_modules=["0"], r=rank, lora_alpha=rank)),
        "lora r=64": adapted(LoraConfig(target_modules=["0"], r=64, lora_alpha=64)),
        "dora": adapted(LoraConfig(target_modules=["0"], r=rank, lora_alpha=rank, use_dora=True)),
        "oft": adapted(OFTConfig(target_modules=["0"], r=0, oft_block_size=32)),
        "paper": PaperLayer(linear, fura.fura_core["default"].block_size),
    }


def trained_numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
