"""y = W (x + D x) + bias for a frozen dense W, as one step of autograd.

On a CPU a buffer beyond the allocator's reach costs more than the product written to it: its pages are mapped and
cleared at every step.  So none is made that the frozen map would not make: for a large x the forward moves the weight
where that is smaller, else x in parts, and the backward moves the gradient inside the buffer it came in.  On a GPU one
step instead of three saves launches.  The same function as `add_update` followed by the base layer, which serves every
other base layer and mode.  Shapes as in blocks.py: x (..., in), D (n, b, b), W (out, in).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fura_rl.adapters.blocks import (
    as_blocks,
    as_factors,
    move,
    move_blocks,
    spectral_update_backward,
    spectral_update_forward,
    token_products,
    without_autocast,
)

LARGE_BYTES = 32 * 2**20  # glibc maps a buffer of this size afresh each time (M_MMAP_THRESHOLD's upper limit)
PART_BYTES = 16 * 2**20  # of a large x moved before its product: few parts, since each packs the weight again


def takes(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether `layer` is a plain frozen linear map that computes in the dtype of x, where x is.

    Hooks (offloading, sharding) and tensor subclasses mean that its weight is not simply there to be multiplied.
    """
    if type(layer) is not nn.Linear or x.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    bias = layer.bias
    return is_plain(layer.weight, x) and (bias is None or is_plain(bias, x))


def is_plain(t: torch.Tensor, x: torch.Tensor) -> bool:
    """FSDP1 puts views of a flat parameter in the place of parameters, which all take gradients where one does."""
    frozen = not (t.requires_grad and torch.is_grad_enabled())
    return type(t) in (nn.Parameter, torch.Tensor) and t.dtype == x.dtype and t.device == x.device and frozen


def moved_linear(x: torch.Tensor, update: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """W (x + D x) + bias, in the dtype of x; on a CPU the layer's own output, bit for bit, where D is 0."""
    return _MovedLinear.apply(x, update, layer.weight, layer.bias)


def spectral_linear(
    x: torch.Tensor,
    delta_r: torch.Tensor,
    delta_s: torch.Tensor,
    right: torch.Tensor,
    inverse: torch.Tensor,
    layer: nn.Linear,
) -> torch.Tensor:
    """`moved_linear` for D = `blocks.spectral_update(delta_r, delta_s, right, inverse)`."""
    return _SpectralLinear.apply(x, delta_r, delta_s, right, inverse, layer.weight, layer.bias)


class _MovedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y, factors = forward(x, update, weight, bias)
        ctx.save_for_backward(x, factors, weight)
        ctx.update_dtype = update.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        with without_autocast(grad.device.type):
            grad_x, grad_update = backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2])
        return grad_x, None if grad_update is None else grad_update.to(ctx.update_dtype), None, None


class _SpectralLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        delta_r: torch.Tensor,
        delta_s: torch.Tensor,
        right: torch.Tensor,
        inverse: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        with without_autocast(x.device.type):
            update, moved = spectral_update_forward(delta_r, delta_s, right, inverse)
            y, factors = forward(x, update, weight, bias, in_place=True)
        ctx.save_for_backward(x, factors, weight, delta_r, moved, right, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, factors, weight, delta_r, moved, right, inverse = ctx.saved_tensors
        needs_x, needs_r, needs_s = ctx.needs_input_grad[:3]
        grad_r = grad_s = None
        with without_autocast(x.device.type):
            grad_x, grad_update = backward(grad, x, factors, weight, needs_x, needs_r or needs_s)
            if grad_update is not None:
                grad_r, grad_s = spectral_update_backward(grad_update.to(right.dtype), delta_r, moved, right, inverse)
        return grad_x, grad_r, grad_s, None, None, None, None


def forward(
    x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """W (x + D x) + bias and D's `as_factors` for x, which may be formed in D's place."""
    on_cpu = x.device.type == "cpu"
    at_start = on_cpu and not (update[0].any() or update.any())
    factors = as_factors(update, x, in_place)
    if at_start:  # no arithmetic that could round
        return linear(x, weight, bias), factors
    if moves_the_weight(x, weight):
        return linear(x, move(weight, factors), bias), factors
    if not on_cpu or x.nbytes < LARGE_BYTES:
        return linear(move(x, factors.mT), weight, bias), factors
    tokens = x.numel() // x.shape[-1]
    y = x.new_empty(tokens, weight.shape[0])
    size = max(1, PART_BYTES // (x.shape[-1] * x.itemsize))
    for part, result in zip(x.reshape(tokens, -1).split(size), y.split(size), strict=True):
        torch.mm(move(part, factors.mT), weight.t(), out=result)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1), factors


def moves_the_weight(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether W + W D takes less than x + D x: on a CPU, of twice as many tokens as W has rows (measured), of a large x
    of more than it has rows.  Not in 16 bits, where the moved weight would lose a small D."""
    least = 1 if x.nbytes >= LARGE_BYTES else 2
    tokens = x.numel() // x.shape[-1]
    return x.device.type == "cpu" and x.dtype.itemsize >= 4 and tokens > least * weight.shape[0]


def backward(
    grad: torch.Tensor, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, needs_x: bool, needs_update: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and D, those that are asked for; D's in float32 or wider."""
    n, b, _ = factors.shape
    moved_grad = torch.mm(grad.reshape(-1, grad.shape[-1]), weight)  # of x + D x
    grad_blocks = as_blocks(moved_grad, n, b)
    grad_update = token_products(grad_blocks, as_blocks(x, n, b)) if needs_update else None
    if not needs_x:
        return None, grad_update
    if x.device.type != "cpu":
        return move(moved_grad, factors).view(x.shape), grad_update
    move_blocks(grad_blocks, factors, result=grad_blocks)
    return moved_grad.view(x.shape), grad_update
