"""pass@k, maj@k and pass^k against brute force over every subset of samples; intervals against their closed form."""

import itertools
import random
from collections import Counter
from fractions import Fraction
from math import isclose, sqrt

import pytest

from fura_rl.evaluation.estimators import bootstrap, majority_at_k, pass_at_k, pass_hat_k

RIGHT, SILENT = "right", None


def mean_over_subsets(samples, k, score):
    subsets = list(itertools.combinations(samples, k))
    return float(sum(Fraction(score(subset)) for subset in subsets) / len(subsets))


def vote(subset):
    """The chance that the right answer wins: ties are decided by lot, silence does not vote."""
    counts = Counter(answer for answer in subset if answer is not SILENT)
    most = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == most]
    return Fraction(RIGHT in winners, max(1, len(winners)))


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * c + [False] * (n - c)
            assert isclose(pass_at_k(n, c, k), mean_over_subsets(samples, k, any), abs_tol=1e-12)


def test_pass_hat_k_is_the_share_of_subsets_that_are_all_correct():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * c + [False] * (n - c)
            assert isclose(pass_hat_k(n, c, k), mean_over_subsets(samples, k, all), abs_tol=1e-12)


def test_majority_at_k_is_the_mean_vote_over_subsets():
    rng = random.Random(0)
    seen = set()
    for _ in range(150):
        n = rng.randint(1, 9)
        samples = [rng.choice([RIGHT, SILENT, "a", "b", "c"]) for _ in range(n)]
        wrong = Counter(answer for answer in samples if answer not in (RIGHT, SILENT))
        for k in range(1, n + 1):
            exact = mean_over_subsets(samples, k, vote)
            assert isclose(majority_at_k(n, samples.count(RIGHT), list(wrong.values()), k), exact, abs_tol=1e-12)
            seen.add(0 < exact < 1)
    assert seen == {True, False}


def test_majority_of_many_samples_takes_no_time_and_stays_a_probability():
    value = majority_at_k(64, 20, [9, 8, 7, 5, 3, 2, 1, 1, 1], 64)
    assert value == 1.0
    assert 0.5 < majority_at_k(64, 20, [9, 8, 7, 5, 3, 2, 1, 1, 1], 16) < 1.0


@pytest.mark.parametrize("estimator", [pass_at_k, pass_hat_k, lambda n, c, k: majority_at_k(n, c, [], k)])
@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_impossible_counts_are_refused(n, c, k, estimator):
    with pytest.raises(ValueError, match=r"impossible|at least"):
        estimator(n, c, k)


def test_more_answers_than_samples_are_refused():
    with pytest.raises(ValueError, match="2 correct and 3 wrong answers do not fit into n=4"):
        majority_at_k(4, 2, [3], 2)


def test_the_bootstrap_interval_is_the_normal_one_for_many_problems():
    values = [1.0] * 300 + [0.0] * 700
    estimate = bootstrap(values)
    half = 1.96 * sqrt(0.3 * 0.7 / 1000)
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.low == pytest.approx(0.3 - half, abs=0.003)
    assert estimate.high == pytest.approx(0.3 + half, abs=0.003)
    assert bootstrap(values) == estimate, "seeded"
    assert bootstrap([0.5]) == bootstrap([0.5, 0.5])
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap([])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(1)
    covered = 0
    for trial in range(200):
        estimate = bootstrap([float(rng.random() < 0.4) for _ in range(100)], seed=trial, resamples=1000)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 180 <= covered <= 200
