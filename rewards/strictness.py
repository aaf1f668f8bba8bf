"""The two grades of strictness, in one table: what pays in training, and what counts in an evaluation.

Training pays a policy that looks for the cheapest way to a reward, so whatever is doubtful earns nothing.  An
evaluation wants the fairest reading of an honest answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strictness:
    """What a mode accepts.  Times are of one item."""

    name: str
    max_answer_chars: int  # a longer answer is `too_long`
    max_distinct_boxes: int | None  # more of them are `ambiguous`; None: the last box counts, however many there are
    phrase_fallback: bool  # "the answer is ..." is read where there is no box (reported apart)
    unevaluated: bool  # a sum, product, integral or limit may stand for a gold that is a number
    huge_numbers: bool  # an answer that passes through a number of over 20,000 bits is worked out, not refused
    min_rounded_digits: int  # a decimal may stand for a gold without end, rounded rightly to as many digits
    soft_cpu_seconds: float  # CPU time after which a worker gives an item up
    hard_wall_seconds: float  # wall time after which the worker is killed; a busy machine must not reach it


MODES = {
    "training": Strictness(
        name="training",
        max_answer_chars=400,
        max_distinct_boxes=8,
        phrase_fallback=False,
        unevaluated=False,
        huge_numbers=False,
        min_rounded_digits=6,
        soft_cpu_seconds=1.0,
        hard_wall_seconds=20.0,
    ),
    "evaluation": Strictness(
        name="evaluation",
        max_answer_chars=4_000,
        max_distinct_boxes=None,
        phrase_fallback=True,
        unevaluated=True,
        huge_numbers=True,
        min_rounded_digits=6,
        soft_cpu_seconds=5.0,
        hard_wall_seconds=40.0,
    ),
}


def find_mode(mode: str) -> Strictness:
    """Raises ValueError for a name that is not in the table."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    return MODES[mode]
