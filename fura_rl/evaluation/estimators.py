"""Estimators over samples of a problem.  Pure functions of counts."""

from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is correct, estimated without bias from c correct among n.

    1 - C(n-c, k) / C(n, k) as a product (Chen et al. 2021, arXiv 2107.03374, section 2.1).

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c={c} correct of n={n} samples is impossible")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem and k >= 1, got n={n}; raise num_samples")
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))
