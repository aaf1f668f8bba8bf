"""From a completion and a gold to a status.  Runs in the caller's process without sympy, in a worker with it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from rewards.compare import Comparison, Fallback
from rewards.extract import Extraction, extract
from rewards.reading import readings
from rewards.result import Status
from rewards.strictness import Strictness

MAX_GOLD_CHARS = 4_000


@dataclass(frozen=True)
class Judgement:
    """A status, or None where only a worker can tell, and the rung that decided."""

    status: Status | None
    decided_by: str = ""


@functools.lru_cache(maxsize=4_096)
def gold_answer(gold: str) -> str:
    """The gold as the content of a box: the last box of a worked solution (adjacent boxes as a list), else the gold."""
    if r"\boxed" not in gold and r"\fbox" not in gold:
        return gold
    extraction = extract(gold)
    return extraction.joined or (gold if extraction.answer is None else extraction.answer)


def judge_extraction(extraction: Extraction, strictness: Strictness, truncated: bool = False) -> Judgement:
    """What is wrong with the answer before it is compared; status None where nothing is."""
    if not extraction.answer or not extraction.answer.strip():
        return Judgement("truncated" if extraction.truncated or truncated else "no_answer", "extraction")
    if strictness.max_distinct_boxes is not None and extraction.boxes > strictness.max_distinct_boxes:
        return Judgement("ambiguous", f"{extraction.boxes} boxes")
    if len(extraction.answer) > strictness.max_answer_chars:
        return Judgement("too_long", f"over {strictness.max_answer_chars} characters")
    return Judgement(None)


def judge_answer(
    gold: str,
    answer: str,
    joined: str | None,
    strictness: Strictness,
    tolerance: float = 0.0,
    fallback: Fallback | None = None,
) -> Judgement:
    """Whether `answer`, or the boxes `joined` to a list, equals `gold`; all are contents of boxes."""
    golds = readings(gold) if len(gold) <= MAX_GOLD_CHARS else ()
    if not golds:
        return Judgement("gold_unparseable", "empty gold" if not gold.strip() else "gold has no meaning")
    if not readings(answer):
        return Judgement("unparseable", "no meaning")
    verdict: bool | None = False
    decided_by = ""
    for candidate in (answer, joined):
        if candidate is None or verdict:
            continue
        comparison = Comparison(strictness, tolerance, fallback)
        outcome = comparison.compare(gold, candidate)
        verdict = outcome if outcome or verdict is False else verdict
        decided_by = comparison.decided_by if outcome or not decided_by else decided_by
    return Judgement(None if verdict is None else "correct" if verdict else "incorrect", decided_by)


def judge_gold(gold: str, fallback: Fallback | None = None) -> Judgement:
    """Whether a gold is understood: it must equal itself by meaning, not by being the same string."""
    from rewards.strictness import MODES

    answer = gold_answer(gold)
    if len(answer) > MAX_GOLD_CHARS or not readings(answer):
        return Judgement("gold_unparseable", "empty gold" if not answer.strip() else "gold has no meaning")
    comparison = Comparison(MODES["evaluation"], 0.0, fallback, identity=False)
    verdict = comparison.compare(answer, answer)
    if verdict is None:
        return Judgement(None)
    return Judgement("correct" if verdict else "gold_unparseable", comparison.decided_by)
