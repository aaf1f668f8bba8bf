"""Reward functions in TRL's signature: B completions and the dataset's columns in, B rewards out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards import grading, health
from rewards.extract import completion_text, extract
from rewards.result import Item

Completion = str | Sequence[Mapping[str, object]]
LogExtra = Callable[[str, list], None]
LogMetric = Callable[[str, float], None]


def math_reward(
    completions: Sequence[Completion],
    answer: Sequence[object] | None = None,
    solution: Sequence[object] | None = None,
    *,
    tolerance: Sequence[float] | float | None = None,
    log_extra: LogExtra | None = None,
    log_metric: LogMetric | None = None,
    **_columns: Any,
) -> list[float | None]:
    r"""1 where the last boxed answer of a completion equals the gold, else 0: TRL's `accuracy_reward`, made safe.

    Args:
        completions: B completions, each a string or a list of chat messages.
        answer: B bare golds (MATH-500, DAPO, ...); wins over `solution` where a dataset has both.
        solution: B worked solutions that end in a boxed answer (MATH), or bare golds, as `accuracy_reward` takes them.
        tolerance: relative error that the dataset allows, for all or by row; default exactness.
        log_extra, log_metric: TRL's hooks for the completion table and the metrics.

    Returns:
        B rewards: 1.0 for `correct`, 0.0 for every other status, a timeout and a crash included.  None only where the
        *gold* cannot be read: TRL leaves such a row out of this reward, and no completion can bring it about.

    Raises:
        ValueError: where the dataset has neither column, or the numbers of golds and completions differ.
    """
    golds = answer if answer is not None else solution
    if golds is None:
        raise ValueError(
            "math_reward needs a gold column named 'answer' or 'solution'; map yours with answer_column in the config"
        )
    if len(golds) != len(completions):
        raise ValueError(f"math_reward got {len(completions)} completions and {len(golds)} golds")
    tolerances = list(tolerance) if isinstance(tolerance, Sequence) else [tolerance or 0.0] * len(golds)
    items = [Item(c, str(g), tolerance=float(t or 0.0)) for c, g, t in zip(completions, golds, tolerances, strict=True)]
    results = grading.grade(items, mode="training")
    health.watch(results, "math_reward")
    if log_extra is not None:
        log_extra("extracted_answer", [result.answer or "" for result in results])
        log_extra("verdict", [f"{result.status} ({result.decided_by})" for result in results])
    if log_metric is not None and results:
        for name, value in health.metrics(results).items():
            log_metric(f"math_reward/{name}", value)
    return [None if result.status == "gold_unparseable" else result.reward for result in results]


def boxed_format_reward(completions: Sequence[Completion], **_columns: Any) -> list[float]:
    r"""1.0 where a completion closes a `\boxed{...}` with something in it, after any thinking; else 0.0."""
    answers = [extract(completion_text(completion)).answer for completion in completions]
    return [float(bool(answer and answer.strip())) for answer in answers]


def think_format_reward(completions: Sequence[Completion], **_columns: Any) -> list[float]:
    """1.0 where a completion is one thinking block from its start and then text; as TRL's function of this name."""
    texts = [completion_text(completion) for completion in completions]
    return [float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text) for text in texts]


class overlong_penalty:  # used as a function, a class so that it can be pickled
    """DAPO's soft penalty of long completions (arXiv 2503.14476, eq. 13): 0, then linear, then -1.

    With L the length in tokens: 0 for L <= max_tokens - cache_tokens, -1 for L > max_tokens, and
    (max_tokens - cache_tokens - L) / cache_tokens between.

    Raises:
        ValueError: for a cache that is not between 0 and `max_tokens`.
    """

    __name__ = "overlong_penalty"

    def __init__(self, max_tokens: int, cache_tokens: int) -> None:
        if not 0 <= cache_tokens <= max_tokens:
            raise ValueError(f"cache_tokens={cache_tokens} must be between 0 and max_tokens={max_tokens}")
        self.max_tokens, self.cache_tokens = max_tokens, cache_tokens

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_columns: Any) -> list[float]:
        return [self.penalty(len(ids)) for ids in completion_ids]

    def penalty(self, tokens: int) -> float:
        free = self.max_tokens - self.cache_tokens
        if tokens <= free:
            return 0.0
        return -1.0 if tokens > self.max_tokens else (free - tokens) / self.cache_tokens
