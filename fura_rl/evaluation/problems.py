"""A benchmark's problems, ready to be asked and graded, after every check that needs no engine.

Unlike training data nothing is dropped here: a benchmark is scored whole or refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fura_rl.data import (
    ANSWER_COLUMNS,
    PROMPT_COLUMNS,
    UNREADABLE_GOLD_LIMIT_FRAC,
    as_messages,
    find_column,
    gold_text,
    load_splits,
    look_up,
    pick_split,
    problem_text,
    read_template,
)
from fura_rl.evaluation.benchmarks.benchmark import Benchmark
from rewards import check_golds as grade_golds

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One problem: the prompt as chat messages (or plain text), its gold, and the groups that it belongs to."""

    prompt: Any
    gold: str
    groups: dict[str, str] = field(default_factory=dict)


def load_problems(
    benchmark: Benchmark,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_problems: int | None = None,
    chat: bool = True,
    allow_duplicates: bool = False,
) -> list[Problem]:
    """The problems of a benchmark, as the model of `tokenizer` is asked them.

    Raises:
        ValueError: where the split is missing, empty or of the wrong size, a column or a gold is missing, two problems
            are the same, a gold fails its own grader, or the model has no chat template.
    """
    name = benchmark.dataset_name
    script = benchmark.script_arguments()
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; give a model that has one, or ask in "
            "plain text with --no_chat_template"
        )
    dataset = pick_split(load_splits(script, revision=benchmark.revision), benchmark.split, name)
    if not len(dataset):
        raise ValueError(f"{name} ({benchmark.split}) has no problems")
    if benchmark.size is not None and len(dataset) != benchmark.size:
        raise ValueError(
            f"{name} ({benchmark.split}) has {len(dataset)} problems, expected {benchmark.size}: not the benchmark "
            "that the papers report, or another revision of it"
        )
    problems = convert(dataset, benchmark, chat)
    check_golds(problems, name)
    if not allow_duplicates:
        refuse_duplicates(problems, name)
    return problems if max_problems is None else problems[:max_problems]


def convert(dataset: Dataset, benchmark: Benchmark, chat: bool) -> list[Problem]:
    name, script = benchmark.dataset_name, benchmark.script_arguments()
    prompt_column = script.prompt_column or find_column(dataset, PROMPT_COLUMNS, "prompt_column", name)
    answer_column = script.answer_column or find_column(dataset, ANSWER_COLUMNS, "answer_column", name)
    for column in (prompt_column, answer_column):
        if column.partition(".")[0] not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(dataset.column_names)}")
    template = read_template(script)
    groups = [column for column in benchmark.group_columns if column in dataset.column_names]
    problems = []
    for row in dataset:
        text = template.replace("{problem}", problem_text(look_up(row, prompt_column)))
        value = look_up(row, answer_column)
        if isinstance(value, list) and len(value) > 1:  # OlympiadBench: several answers are one comma-separated gold
            value = ", ".join(str(part).strip().strip("$") for part in value)
        gold = gold_text(value, worked=answer_column == "solution")
        problems.append(
            Problem(as_messages(text, None) if chat else text, gold, {column: str(row[column]) for column in groups})
        )
    return problems


def check_golds(problems: Sequence[Problem], source: str) -> None:
    """Every gold must be there and be accepted by the grader; the few that are not stay, and count as never right.

    Raises:
        ValueError: where a gold is missing, or more than 1% fail, with the first rows at fault.
    """
    missing = [row for row, problem in enumerate(problems) if not problem.gold.strip()]
    if missing:
        raise ValueError(f"{source} has no gold in {len(missing)} of {len(problems)} rows: {first_rows(missing)}")
    verdicts = grade_golds([problem.gold for problem in problems])
    failing = [row for row, verdict in enumerate(verdicts) if not verdict.correct]
    if failing:
        shown = "; ".join(f"row {row}: {problems[row].gold[:60]!r} ({verdicts[row].decided_by})" for row in failing[:5])
        text = f"{len(failing)} of {len(problems)} golds of {source} fail their own grader: {shown}"
        if len(failing) > UNREADABLE_GOLD_LIMIT_FRAC * len(problems):
            raise ValueError(text)
        logger.warning("%s. No answer to these can be right; they stay in the denominator", text)


def refuse_duplicates(problems: Sequence[Problem], source: str) -> None:
    keys = [json.dumps(problem.prompt) for problem in problems]
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        rows = [row for row, key in enumerate(keys) if key == repeated[0]]
        raise ValueError(
            f"{source} asks {len(repeated)} problems more than once, e.g. {first_rows(rows)}; remove them, or count "
            "them twice with --allow_duplicates"
        )


def first_rows(rows: Sequence[int]) -> str:
    return "rows " + ", ".join(map(str, rows[:5])) + (" ..." if len(rows) > 5 else "")


def content_hash(problems: Sequence[Problem]) -> str:
    """What was asked and what counts as right, as 16 hexadecimal digits."""
    content = json.dumps([[problem.prompt, problem.gold] for problem in problems])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
