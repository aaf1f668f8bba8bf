"""The harder embedded task: two-step sums, bare or told as a story, tested on operands that training never shows.

A solution works both steps and boxes the last result: `47+25=72 72-18=54 \\boxed{54}`.  Training and validation
draw all three operands from `TRAIN_RANGE`, the test split draws all three from `HELD_OUT_RANGE`: what GRPO teaches on
small numbers has to hold on large ones.  The base model's training text covers both ranges, so the arithmetic itself is
known everywhere; what is to be learned is to leave four mistakes, each made at its own rate wherever it is possible.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fura_rl.quickstart.problems import (
    FORGOTTEN_CARRY_RATE,
    NAMES,
    SPLITS,
    THINGS,
    distinct_rows,
    without_carry,
    write_solution,
)

TRAIN_RANGE = (10, 49)  # every operand of the training and validation splits, both ends included
HELD_OUT_RANGE = (50, 79)  # every operand of the test split
OPERATIONS = ("++", "+-", "-+")  # two subtractions of like numbers would be negative

# Mistake rates of the base model's training text, beside the forgotten carry's 0.55 a step.  Below one half, so greedy
# decoding leaves them and forgets carries alone.
WRONG_OPERATION_RATE = 0.4  # at each step of a story: adds where it should subtract, and the reverse
SKIPPED_STEP_RATE = 0.25  # stops after the first step and boxes its result
MISSING_BOX_RATE = 0.3

EVENTS = {"+": ("buys {}", "finds {}"), "-": ("sells {}", "loses {}")}


@dataclass(frozen=True)
class Problem:
    """One problem `a op b op c`, worked from left to right.  `story` is True where it is told in words."""

    problem: str
    operands: tuple[int, int, int]
    ops: str  # one of OPERATIONS
    story: bool

    @property
    def answer(self) -> int:
        return value(self.operands, self.ops)

    def row(self) -> dict[str, str]:
        """The row of MATH's schema, with the gold solution ending in a box."""
        a, b, c = self.operands
        first = value((a, b), self.ops[0])
        solution = f"{write_solution(a, self.ops[0], b, first, boxed=False)} " + write_solution(
            first, self.ops[1], c, self.answer
        )
        return {"problem": self.problem, "solution": solution, "answer": str(self.answer)}


def value(operands: tuple[int, ...], ops: str) -> int:
    return operands[0] + sum(b if op == "+" else -b for op, b in zip(ops, operands[1:], strict=True))


def split_of(operands: tuple[int, int, int], ops: str) -> str | None:
    """The split that owns these operands: the range decides, and 5% of those in the training range are validation.

    None where the operands stand in no range, or mix them.
    """
    if all(HELD_OUT_RANGE[0] <= operand <= HELD_OUT_RANGE[1] for operand in operands):
        return "test"
    if not all(TRAIN_RANGE[0] <= operand <= TRAIN_RANGE[1] for operand in operands):
        return None
    return "validation" if random.Random(f"{operands}{ops}").random() < 0.05 else "train"


def sample_problem(rng: random.Random, split: str) -> Problem:
    """One random problem of `split`, half of them stories.  No result on the way is negative."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not a split of multi_step; use one of {', '.join(SPLITS)}")
    low, high = HELD_OUT_RANGE if split == "test" else TRAIN_RANGE
    while True:
        a, b, c = (rng.randint(low, high) for _ in range(3))
        ops = rng.choice(OPERATIONS)
        if ops[0] == "-" and a < b:
            a, b = b, a
        if value((a, b, c), ops) >= 0 and split_of((a, b, c), ops) == split:
            break
    if rng.random() < 0.5:
        return Problem(f"What is {a} {ops[0]} {b} {ops[1]} {c}?", (a, b, c), ops, story=False)
    first, second = (rng.choice(EVENTS[op]).format(operand) for op, operand in zip(ops, (b, c), strict=True))
    text = f"{rng.choice(NAMES)} has {a} {rng.choice(THINGS)}, {first} and {second}. How many now?"
    return Problem(text, (a, b, c), ops, story=True)


def make_rows(split: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows of `split` with distinct problem texts, the same for the same seed."""
    return distinct_rows(sample_problem, split, count, seed)


def sloppy_step(a: int, op: str, b: int, story: bool, rng: random.Random) -> tuple[int, str, int, int]:
    """One step as the base model works it: operands, operation, and a result that may be wrong."""
    if story and rng.random() < WRONG_OPERATION_RATE:
        op = "-" if op == "+" else "+"
    if op == "-" and a < b:
        a, b = b, a
    forgets = rng.random() < FORGOTTEN_CARRY_RATE
    return a, op, b, without_carry(a, op, b) if forgets else value((a, b), op)


def sloppy_solution(problem: Problem, rng: random.Random) -> str:
    """A solution with the base model's four mistakes, each made at its own rate."""
    a, b, c = problem.operands
    boxed, skips = rng.random() >= MISSING_BOX_RATE, rng.random() < SKIPPED_STEP_RATE
    first = sloppy_step(a, problem.ops[0], b, problem.story, rng)
    if skips:
        return write_solution(*first, boxed=boxed)
    second = sloppy_step(first[-1], problem.ops[1], c, problem.story, rng)
    return f"{write_solution(*first, boxed=False)} {write_solution(*second, boxed=boxed)}"
