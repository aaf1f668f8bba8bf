"""The frozen large core of FuRA's core form, in the place of the base layer; dense, or in 4-bit NF4 (QFuRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fura_rl.adapters.quantized import nf4_dense, nf4_from_saved, nf4_linear, nf4_parameter, nf4_scales


class LargeCore(nn.Module):
    """Stands where the base linear layer stood: `weight` is the large core, `bias` the base layer's own.

    `forward` leaves the bias to the caller, who adds it after the small core of a row-block layer.
    """

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, quantize: str | None) -> None:
        super().__init__()
        self.quantize = quantize
        self.shape = weight.shape
        self._dtype_of_codes = weight.dtype  # 4-bit codes have none that a cast of the model would change
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self._store(weight)
        self._parameters["bias"] = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nf4_linear(x, self.weight) if self.quantize else nn.functional.linear(x, self.weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the linear layer that this stands for: what was cast, or assigned from a state dict, is merged as cast."""
        return self._dtype_of_codes if self.quantize else self.weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> LargeCore:
        self._dtype_of_codes = fn(torch.empty(0, dtype=self._dtype_of_codes)).dtype
        return super()._apply(fn, recurse)

    def dense(self) -> torch.Tensor:
        """The large core as stored, dequantized where it is quantized."""
        return nf4_dense(self.weight).to(self.compute_dtype) if self.quantize else self.weight.data

    def replace(self, weight: torch.Tensor) -> None:
        """Store another core of the same shape.

        Written past `register_parameter`, which PEFT redirects to the meta device under `low_cpu_mem_usage`: this is
        base-model data, which no adapter file will fill in.
        """
        self._store(weight.to(self.compute_dtype))

    def _store(self, weight: torch.Tensor) -> None:
        frozen = nf4_parameter(weight) if self.quantize else nn.Parameter(weight, requires_grad=False)
        self._parameters["weight"] = frozen

    # ---- the state dict of the whole model: 4-bit codes are nothing without the scales they were made with

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quantize:
            scales = nf4_scales(self.weight)
            destination.update({f"{prefix}weight.{name}": tensor for name, tensor in scales.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        key, assign = f"{prefix}weight", local_metadata.get("assign_to_params_buffers", False)
        if self.quantize and key in state_dict:
            names = [name for name in state_dict if name.startswith(f"{key}.")]
            scales = {name.removeprefix(f"{key}."): state_dict.pop(name) for name in names}
            codes, error_messages = state_dict[key], args[-1]
            if not scales or codes.is_meta:
                error_messages.append(
                    f"{key}: quantize_core='nf4' needs 4-bit codes with values and their scales ({key}.absmax, ...); "
                    "load the state_dict() of a model with quantize_core='nf4' that is not on the meta device, or "
                    "make this model on a device and load the adapter file alone"
                )
                return
            loaded = nf4_from_saved(codes, scales, codes.device if assign else self.weight.device)
            if loaded.quant_state.shape != self.shape:
                error_messages.append(
                    f"{key}: the saved large core has shape {tuple(loaded.quant_state.shape)}, the one here "
                    f"{tuple(self.shape)}; quantize_core='nf4' needs the block settings that it was saved with"
                )
                return
            state_dict[key] = loaded
            if not assign:
                self.weight.quant_state = loaded.quant_state
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
