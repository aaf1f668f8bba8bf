"""Rounding of folded weights to the engine's dtype."""

from __future__ import annotations

import torch

ROUNDINGS = ("nearest", "stochastic")


def round_weight(exact: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> torch.Tensor:
    """`exact` in `dtype`: to the nearest value, or with a `generator` to one of its two neighbours without bias.

    Nearest rounding swallows an update much smaller than the spacing of `dtype` whole; stochastic rounding (up with
    the probability that makes the mean exact) delivers it on average, at the price of noise of one spacing.  A value
    that `dtype` holds exactly is never moved, and one beyond its range stays infinite.

    Raises:
        ValueError: where a generator comes with a dtype that is not of 16 bits.
    """
    nearest = exact.to(dtype)
    if generator is None or exact.dtype == dtype:
        return nearest
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"stochastic rounding is for 16-bit engines, not {dtype}")
    error = exact - nearest.to(exact.dtype)
    # Sign and magnitude: one more in the bit pattern is the next value away from zero.
    outwards = (error * nearest.to(exact.dtype).sign() > 0) | (nearest == 0)
    bits = nearest.view(torch.int16)
    neighbour = torch.where(outwards, bits + 1, bits - 1).view(dtype)
    spacing = (neighbour.to(exact.dtype) - nearest.to(exact.dtype)).abs()
    draw = torch.rand(exact.shape, generator=generator, dtype=exact.dtype, device=exact.device)
    moves = (error != 0) & nearest.isfinite() & neighbour.isfinite() & (draw * spacing < error.abs())
    return torch.where(moves, neighbour, nearest)
