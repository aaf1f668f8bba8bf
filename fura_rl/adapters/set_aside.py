"""Base weights set aside while a merged one stands in their place, to be put back bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fura_rl.adapters.large_core import LargeCore

if TYPE_CHECKING:
    from fura_rl.adapters.fura_layer import FuraLinear


class DenseWeight:
    """A base weight set aside while another is merged in: the parameter itself, which other layers may share."""

    def __init__(self, layer: FuraLinear) -> None:
        self.parameter = layer.get_base_layer()._parameters.get("weight")
        if self.parameter is None:
            raise TypeError(
                f"the weight of {layer.layer_name} is computed from others, which a merge would not change; call "
                "torch.nn.utils.parametrize.remove_parametrizations on it before it is adapted"
            )

    @property
    def dequantized(self) -> torch.Tensor:
        return self.parameter.data

    def restore(self, base_layer: nn.Module) -> None:
        merged = base_layer.weight  # moved and cast with the model
        self.parameter.data = self.parameter.data.to(device=merged.device, dtype=merged.dtype)
        base_layer.weight = self.parameter


class SetAsideCore:
    """A large core set aside while a merged layer stands in its place: no submodule, or it would be saved and sent."""

    def __init__(self, core: LargeCore) -> None:
        self.core = core


class QuantizedWeight:
    """A quantized base weight set aside while another is merged in: its parameter, and bitsandbytes' 8-bit scales."""

    def __init__(self, layer: FuraLinear) -> None:
        base_layer = layer.get_base_layer()
        self.dequantized = layer.get_base_weight()
        self.parameter = base_layer.weight
        state = getattr(base_layer, "state", None)
        self.scales = getattr(self.parameter, "SCB", None) if getattr(state, "SCB", None) is None else state.SCB

    def restore(self, base_layer: nn.Module) -> None:
        base_layer.weight = self.parameter
        if self.scales is not None:
            self.parameter.CB, self.parameter.SCB = self.parameter.data, self.scales
            base_layer.state.reset_grads()
