"""The embedded tasks.  A task's name is dataset and base model at once; a new one is a file here and an entry below."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fura_rl.quickstart import BASE_MODEL, multi_step, problems


@dataclass(frozen=True)
class Task:
    """An embedded task.

    Args:
        base_model: folder of its checkpoint.
        make_rows: split, count and seed -> rows in MATH's schema.
        sizes: problems of each split.
        pretraining_text: one prompt of the base model's training and the sloppy solution it was given.
        starts_from: checkpoint that the base model's training starts from, or None for random weights.
    """

    base_model: Path
    make_rows: Callable[[str, int, int], list[dict[str, str]]]
    sizes: dict[str, int]
    pretraining_text: Callable[[random.Random], tuple[str, str]]
    starts_from: Path | None = None


def quickstart_text(rng: random.Random) -> tuple[str, str]:
    problem = problems.sample_problem(rng, "train")
    return problem.problem, problems.sloppy_solution(problem, rng)


def multi_step_text(rng: random.Random) -> tuple[str, str]:
    """Both operand ranges, half and half: the base model knows, and is sloppy, everywhere."""
    problem = multi_step.sample_problem(rng, rng.choice(("train", "test")))
    return problem.problem, multi_step.sloppy_solution(problem, rng)


TASKS = {
    "quickstart": Task(
        base_model=BASE_MODEL,
        make_rows=problems.make_rows,
        sizes={"train": 4000, "validation": 200, "test": 400},
        pretraining_text=quickstart_text,
    ),
    "multi_step": Task(
        base_model=BASE_MODEL.parent / "multi_step_base_model",
        make_rows=multi_step.make_rows,
        sizes={"train": 4000, "validation": 200, "test": 300},
        pretraining_text=multi_step_text,
        starts_from=BASE_MODEL,
    ),
}
