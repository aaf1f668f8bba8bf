"""The frozen large core of FuRA's core form, in the place of the base layer; dense, or in 4-bit NF4 (QFuRA)."""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn


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
        if not self.quantize:
            return nn.functional.linear(x, self.weight)
        import bitsandbytes as bnb

        return bnb.matmul_4bit(x, self.weight.t(), quant_state=self.weight.quant_state)

    def dense(self) -> torch.Tensor:
        """The large core as stored, dequantized where it is quantized."""
        if not self.quantize:
            return self.weight.data
        return dequantize_bnb_weight(self.weight, state=self.weight.quant_state).to(self.compute_dtype)

    def replace(self, weight: torch.Tensor) -> None:
        """Store another core of the same shape.

        Written past `register_parameter`, which PEFT redirects to the meta device under `low_cpu_mem_usage`: this is
        base-model data, which no adapter file will fill in.
        """
        weight = weight.to(self.compute_dtype)
        frozen = nf4_parameter(weight) if self.quantize else nn.Parameter(weight, requires_grad=False)
        self._parameters["weight"] = frozen


def nf4_parameter(weight: torch.Tensor) -> nn.Parameter:
    """`weight` in NF4 with double quantization (QLoRA, arXiv 2305.14314): 4.127 bits a number.

    Raises:
        ImportError: where bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError("quantize_core='nf4' needs bitsandbytes: pip install bitsandbytes") from error
    parameter = bnb.nn.Params4bit(
        weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    return parameter.to(weight.device)  # bitsandbytes quantizes at the move to a device
