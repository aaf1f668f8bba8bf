"""The math reward: 1 where the last boxed answer of a completion equals the gold, else 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rewards.equality import equal
from rewards.extract import completion_text, last_boxed

Completion = str | Sequence[Mapping[str, object]]


def gold_answer(gold: object) -> str:
    """The gold as the content of a box: the last box of a worked solution, else the bare answer itself."""
    text = str(gold)
    boxed = last_boxed(text)
    return text if boxed is None else boxed


class Grade(NamedTuple):
    """The verdict on one completion: the content of its last closed box, or None, and whether it equals the gold."""

    answer: str | None
    correct: bool


def grade(completion: Completion, gold: object) -> Grade:
    """The one grader, for reward and evaluation.  `gold` is a bare answer or a worked solution with a boxed one."""
    answer = last_boxed(completion_text(completion))
    return Grade(answer, answer is not None and equal(gold_answer(gold), answer))


def math_reward(
    completions: Sequence[Completion],
    answer: Sequence[object] | None = None,
    solution: Sequence[object] | None = None,
    *,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_columns: Any,
) -> list[float]:
    r"""Verifier reward in TRL's signature.

    Args:
        completions: B completions, each a string or a list of chat messages.
        answer: B bare golds (MATH-500, DAPO, ...); wins over `solution` where a dataset has both.
        solution: B worked solutions that end in a boxed answer (MATH).
        log_extra, log_metric: TRL's hooks for the completion table and the metrics.

    Returns:
        B floats, 1.0 or 0.0.  A completion without a closed `\boxed{...}` earns 0.

    Raises:
        ValueError: where the dataset has neither column.
    """
    golds = answer if answer is not None else solution
    if golds is None:
        raise ValueError(
            "math_reward needs a gold column named 'answer' or 'solution'; map yours with answer_column in the config"
        )
    grades = [grade(completion, gold) for completion, gold in zip(completions, golds, strict=True)]
    if log_extra is not None:
        log_extra("extracted_answer", ["" if verdict.answer is None else verdict.answer for verdict in grades])
    if log_metric is not None and grades:
        log_metric("math_reward/no_answer_frac", sum(verdict.answer is None for verdict in grades) / len(grades))
    return [float(verdict.correct) for verdict in grades]
