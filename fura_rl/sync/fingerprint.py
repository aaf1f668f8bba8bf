"""A few numbers of a base weight, by which two processes tell whether they hold the same one."""

from __future__ import annotations

import torch

from fura_rl.sync.factors import Read, Span

Sample = list[tuple[int, int, float]]  # row, column, value
COUNT = 8
# Base values may differ by the rounding of one checkpoint that the two hold in different dtypes.
TOLERANCE = 2.0**-7


def base_sample(read: Read, rows: Span, columns: int) -> Sample:
    """COUNT entries along the diagonal of the rows that are at hand."""
    picked = [rows[0] + i * (rows[1] - rows[0] - 1) // (COUNT - 1) for i in range(COUNT)]
    across = [i * (columns - 1) // (COUNT - 1) for i in range(COUNT)]
    return [(r, c, float(read((r, r + 1), (c, c + 1)))) for r, c in zip(picked, across, strict=True)]


def fits(sample: Sample, read: Read, shape: tuple[int, ...]) -> bool:
    """Whether the weight of `shape` behind `read` has the sampled values, up to rounding."""
    if any(row >= shape[0] or column >= shape[-1] for row, column, _ in sample):
        return False
    own = torch.tensor([float(read((row, row + 1), (column, column + 1))) for row, column, _ in sample])
    theirs = torch.tensor([value for *_, value in sample])
    return bool(((own - theirs).abs() <= TOLERANCE * (own.abs() + 1e-3 * own.abs().max())).all())
