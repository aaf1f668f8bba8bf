"""Rounding of folded weights to the engine's dtype, and telling a rounded number from another one."""

from __future__ import annotations

import itertools
import math

import torch

ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # in which one checkpoint may be held


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


def are_the_same_rounded(some: torch.Tensor, others: torch.Tensor, slack: torch.Tensor | float = 0.0) -> bool:
    """Whether each of `some` (n,) and its counterpart of `others` can be one number, held in two dtypes.

    One of the two must be what the other rounds to, or is up to `slack` away from what does.  A dtype is read off the
    numbers: what was loaded in 16 bits and widened afterwards holds no more than 16 bits.
    """
    alike = torch.zeros(len(some), dtype=torch.bool)
    for coarse, fine in itertools.permutations((some.double(), others.double())):
        for dtype in DTYPES:
            held = coarse.to(dtype)
            if torch.equal(held.double(), coarse):
                # halves of the way to the neighbours, ends included: `fine` may itself have been rounded to one
                below, above = (
                    (coarse + held.nextafter(torch.full_like(held, end)).double()) / 2 for end in (-math.inf, math.inf)
                )
                alike |= (below - slack <= fine) & (fine <= above + slack)
    return bool(alike.all())
