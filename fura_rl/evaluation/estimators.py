"""Estimators over the samples of a problem, and intervals over problems.  Pure functions of counts.

Of n samples of a problem c are correct; each estimator is the mean over all C(n, k) subsets of k samples, so it has no
bias, and the tests compare it with exactly that mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CHUNK = 500  # resamples drawn at once, which bounds the memory for large benchmarks


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k) as a product.

    Chen et al. 2021, arXiv 2107.03374, section 2.1.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    check_counts(n, c, k)
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def pass_hat_k(n: int, c: int, k: int) -> float:
    """pass^k, the chance that all of k samples are correct: C(c, k) / C(n, k) (arXiv 2406.12045, section 4)."""
    check_counts(n, c, k)
    return math.prod((c - i) / (n - i) for i in range(k)) if c >= k else 0.0


def majority_at_k(n: int, c: int, wrong: Sequence[int], k: int) -> float:
    """maj@k, the chance that the correct answer wins a vote of k samples (self-consistency, arXiv 2203.11171).

    Args:
        n: samples of the problem.
        c: how many hold the correct answer.
        wrong: how many hold each wrong answer.  The remaining n - c - sum(wrong) have no answer and do not vote.
        k: voters.  Where answers tie, one of them wins by lot.

    Raises:
        ValueError: unless 0 <= c, c + sum(wrong) <= n and 1 <= k <= n.
    """
    check_counts(n, c, k)
    if min(wrong, default=0) < 0 or c + sum(wrong) > n:
        raise ValueError(f"{c} correct and {sum(wrong)} wrong answers do not fit into n={n} samples")
    return _majority(n, c, tuple(sorted(count for count in wrong if count)), k)


@functools.lru_cache(maxsize=100_000)
def _majority(n: int, c: int, wrong: tuple[int, ...], k: int) -> float:
    silent = n - c - sum(wrong)
    won = 0.0
    for votes in range(1, min(c, k) + 1):  # the correct answer gets exactly so many votes
        # ways[ties][voters]: the wrong answers fill `voters` places, none above `votes`, `ties` of them level with it
        ways = {0: [1] + [0] * (k - votes)}
        for count in wrong:
            ways = _with_answer(ways, count, votes, k - votes)
        for ties, row in ways.items():
            subsets = sum(row[voters] * math.comb(silent, k - votes - voters) for voters in range(k - votes + 1))
            won += math.comb(c, votes) * subsets / (ties + 1)
    return won / math.comb(n, k)


def _with_answer(ways: dict[int, list[int]], count: int, votes: int, places: int) -> dict[int, list[int]]:
    """`ways` after one more wrong answer, held by `count` samples, has taken 0..votes places."""
    extended: dict[int, list[int]] = {}
    for ties, row in ways.items():
        for taken in range(min(count, votes, places) + 1):
            target = extended.setdefault(ties + (taken == votes), [0] * (places + 1))
            choices = math.comb(count, taken)
            for before in range(places - taken + 1):
                target[before + taken] += row[before] * choices
    return extended


def doubling_ks(n: int) -> list[int]:
    """The k at which pass@k of n samples is told: 1, 2, 4 ... and n."""
    return sorted({2**i for i in range(n.bit_length())} | ({n} if n else set()))


def check_counts(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n:
        raise ValueError(f"c={c} correct of n={n} samples is impossible")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} needs at least {k} samples a problem and k >= 1, got n={n}; raise num_samples")


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of one value a problem, with the 95% percentile bootstrap interval over problems.

    For a paired comparison give the differences, problem by problem.

    Raises:
        ValueError: where there are no values.
    """
    if not len(values):
        raise ValueError("an interval needs at least one problem")
    array, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [
        array[generator.integers(0, len(array), size=(min(CHUNK, resamples - start), len(array)))].mean(axis=1)
        for start in range(0, resamples, CHUNK)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))
