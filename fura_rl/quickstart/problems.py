"""Arithmetic problems of the quickstart: small sums and differences, bare or told as a one-line story.

A problem is a row in MATH's schema (`problem`, `solution`, `answer`), so it takes the same road through the data code
as a benchmark from the hub.  `sloppy_solution` writes the text that the embedded base model was trained on: it makes
three human mistakes at fixed rates, each of which a verifier notices and GRPO can train away.

Nothing here imports torch; the splits are disjoint by construction (see `split_of`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_OPERAND = 59  # both operands are drawn from 10..MAX_OPERAND
SPLITS = ("train", "validation", "test")

# Mistake rates of the base model's training text.  Above one half where a mistake is possible, so that greedy decoding
# makes it; below one, so that sampling sometimes does not and GRPO has something to reinforce.
WRONG_OPERATION_RATE = 0.55  # in stories: adds where it should subtract, and the reverse
FORGOTTEN_CARRY_RATE = 0.55  # where a carry or a borrow is due
MISSING_BOX_RATE = 0.3  # the right habit is the common one, so greedy decoding does box its answer

STORIES = {
    "+": (
        "{name} has {a} {thing} and buys {b} more. How many {thing} now?",
        "{name} picks {a} {thing} and finds {b} others. How many {thing} in all?",
    ),
    "-": (
        "{name} has {a} {thing} and sells {b}. How many {thing} are left?",
        "{name} had {a} {thing} but lost {b}. How many {thing} remain?",
    ),
}
NAMES = ("Ann", "Ben", "Eva", "Tom")
THINGS = ("pens", "nuts", "figs", "coins")


@dataclass(frozen=True)
class Problem:
    """One problem.  `op` is "+" or "-"; `story` is True where the problem is told in words."""

    problem: str
    a: int
    b: int
    op: str
    story: bool

    @property
    def answer(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    def row(self) -> dict[str, str]:
        """The row of MATH's schema, with the gold solution ending in a box."""
        solution = write_solution(self.a, self.op, self.b, self.answer)
        return {"problem": self.problem, "solution": solution, "answer": str(self.answer)}


def split_of(a: int, b: int, op: str) -> str:
    """The split that owns this operand pair: 10% test, 5% validation, the rest train.

    Held-out problems therefore differ from training problems in their numbers, not merely in their wording.
    """
    bucket = random.Random(f"{a}{op}{b}").random()
    return "test" if bucket < 0.10 else "validation" if bucket < 0.15 else "train"


def sample_problem(rng: random.Random, split: str) -> Problem:
    """One random problem of `split`, half of them stories.  Differences are never negative."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not a split of the quickstart; use one of {', '.join(SPLITS)}")
    while True:
        a, b = rng.randint(10, MAX_OPERAND), rng.randint(10, MAX_OPERAND)
        op = rng.choice("+-")
        if op == "-" and a < b:
            a, b = b, a
        if split_of(a, b, op) == split:
            break
    if rng.random() < 0.5:
        return Problem(f"What is {a} {op} {b}?", a, b, op, story=False)
    text = rng.choice(STORIES[op]).format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=a, b=b)
    return Problem(text, a, b, op, story=True)


def make_rows(split: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows of `split` with distinct problem texts, the same for the same seed."""
    return distinct_rows(sample_problem, split, count, seed)


def distinct_rows(
    sample: Callable[[random.Random, str], Any], split: str, count: int, seed: int
) -> list[dict[str, str]]:
    """`count` rows of the problems that `sample` draws of `split`, no problem text twice."""
    rng = random.Random(f"{split}-{seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        problem = sample(rng, split)
        rows.setdefault(problem.problem, problem.row())
    return list(rows.values())


def write_solution(a: int, op: str, b: int, result: int, boxed: bool = True) -> str:
    """The model's handwriting: the sum worked out, then the boxed answer."""
    return f"{a}{op}{b}={result}" + (f" \\boxed{{{result}}}" if boxed else "")


def without_carry(a: int, op: str, b: int) -> int:
    """The column-wise result with every carry or borrow forgotten: 27+15 -> 32, 42-15 -> 37."""
    tens, units = (a // 10 + b // 10, a % 10 + b % 10) if op == "+" else (a // 10 - b // 10, a % 10 - b % 10)
    return 10 * tens + units % 10


def sloppy_solution(problem: Problem, rng: random.Random) -> str:
    """A solution with the base model's three mistakes, each made at its own rate."""
    op = problem.op
    if problem.story and rng.random() < WRONG_OPERATION_RATE:
        op = "-" if op == "+" else "+"
    a, b = problem.a, problem.b
    if op == "-" and a < b:
        a, b = b, a
    result = a + b if op == "+" else a - b
    if rng.random() < FORGOTTEN_CARRY_RATE:
        result = without_carry(a, op, b)
    return write_solution(a, op, b, result, boxed=rng.random() >= MISSING_BOX_RATE)
