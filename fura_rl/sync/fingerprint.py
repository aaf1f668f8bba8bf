"""A few numbers of a base weight, by which two processes tell whether they hold the same one."""

from __future__ import annotations

import torch

from fura_rl.sync.factors import Read, Span
from fura_rl.sync.rounding import are_the_same_rounded

Sample = list[tuple[int, int, float, float]]  # row, column, value, how far it is off beside the rounding of its dtype
COUNT = 8
PRODUCT_ERROR = 2.0**-18  # of sums of products in float32, relative to the largest value


def base_sample(read: Read, rows: Span, columns: int, moved: Read | None = None) -> Sample:
    """COUNT entries along the diagonal of the rows that are at hand.

    `moved` reads what is held in the place of the base weight, where `read` has to put back what was taken out of it.
    """
    picked = [rows[0] + i * (rows[1] - rows[0] - 1) // (COUNT - 1) for i in range(COUNT)]
    across = [i * (columns - 1) // (COUNT - 1) for i in range(COUNT)]
    places = list(zip(picked, across, strict=True))
    values = [float(read((r, r + 1), (c, c + 1))) for r, c in places]
    slack = 0.0
    if moved is not None:
        held = [moved((r, r + 1), (c, c + 1)) for r, c in places]
        # rounded to the dtype of the base weight were that weight, what is left of it and what was taken out
        error = max(torch.finfo(held[0].dtype).eps, PRODUCT_ERROR)
        slack = error * max(map(abs, (*values, *map(float, held))))
    return [(r, c, value, slack) for (r, c), value in zip(places, values, strict=True)]


def fits(sample: Sample, read: Read, shape: tuple[int, ...]) -> bool:
    """Whether the weight of `shape` behind `read` has the sampled values, in whatever dtypes the two are held.

    No tolerance beyond: the same model trained a little further differs by less than any that would be worth having.
    """
    if any(row >= shape[0] or column >= shape[-1] for row, column, *_ in sample):
        return False
    own = [float(read((row, row + 1), (column, column + 1))) for row, column, *_ in sample]
    *_, theirs, slack = zip(*sample, strict=True)
    return are_the_same_rounded(*(torch.tensor(values, dtype=torch.float64) for values in (own, theirs, slack)))
