"""The frozen large core of FuRA's core form, in the place of the base layer; dense, or in 4-bit NF4 (QFuRA)."""

from __future__ import annotations

import torch
from torch import nn

from fura_rl.adapters.quantized import nf4_dense, nf4_linear, nf4_parameter


class LargeCore(nn.Module):
    """Stands where the base linear layer stood: `weight` is the large core, `bias` the base layer's own.

    `forward` leaves the bias to the caller, who adds it after the small core of a row-block layer.
    """

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, quantize: str | None) -> None:
        super().__init__()
        self.quantize = quantize
        self.compute_dtype = weight.dtype
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.replace(weight)
        self._parameters["bias"] = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nf4_linear(x, self.weight) if self.quantize else nn.functional.linear(x, self.weight)

    def dense(self) -> torch.Tensor:
        """The large core as stored, dequantized where it is quantized."""
        return nf4_dense(self.weight).to(self.compute_dtype) if self.quantize else self.weight.data

    def replace(self, weight: torch.Tensor) -> None:
        """Store another core of the same shape.

        Written past `register_parameter`, which PEFT redirects to the meta device under `low_cpu_mem_usage`: this is
        base-model data, which no adapter file will fill in.
        """
        weight = weight.to(self.compute_dtype)
        frozen = nf4_parameter(weight) if self.quantize else nn.Parameter(weight, requires_grad=False)
        self._parameters["weight"] = frozen
