"""A few numbers of a base weight, by which two processes tell whether they hold the same one."""

from __future__ import annotations

from fura_rl.sync.factors import Read


def base_sample(read: Read, shape: tuple[int, ...], count: int = 8) -> list[float]:
    """`count` entries of a matrix along its diagonal, from the first row to the last."""
    rows, columns = ([i * (size - 1) // (count - 1) for i in range(count)] for size in shape)
    return [float(read((r, r + 1), (c, c + 1))) for r, c in zip(rows, columns, strict=True)]
