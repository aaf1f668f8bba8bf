"""Scores of a set of samples: one value a problem for every measure, their means with intervals, and differences."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fura_rl.evaluation.estimators import bootstrap, majority_at_k, pass_at_k, pass_hat_k

Row = dict[str, Any]  # one sample as it stands in samples.jsonl
Values = dict[str, list[float]]  # measure -> one value a problem


def problem_values(rows: Sequence[Row], ks: Sequence[int]) -> Values:
    """Every measure of every problem, problems in order.

    The greedy pass gives `greedy`.  The sampled pass of n samples gives `avg@n`, `pass@k` for every k, and `maj@k` and
    `pass^k` for every k above 1.  In a vote all samples that were graded correct agree, wrong ones agree where their
    answers are the same text, and samples without an answer abstain.
    """
    values: Values = {}
    passes: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        passes[row["pass"]][row["problem"]].append(row)
    if "greedy" in passes:
        values["greedy"] = [float(group[0]["correct"]) for _, group in sorted(passes["greedy"].items())]
    sampled = [group for _, group in sorted(passes.get("sampled", {}).items())]
    if sampled:
        n = len(sampled[0])
        counts = [sum(row["correct"] for row in group) for group in sampled]
        values[f"avg@{n}"] = [c / n for c in counts]
        for k in ks:
            values[f"pass@{k}"] = [pass_at_k(n, c, k) for c in counts]
            if k == 1:  # one sample votes alone, and all of one is any of one
                continue
            values[f"maj@{k}"] = [
                majority_at_k(n, c, wrong_answers(group), k) for c, group in zip(counts, sampled, strict=True)
            ]
            values[f"pass^{k}"] = [pass_hat_k(n, c, k) for c in counts]
    return values


def wrong_answers(group: Sequence[Row]) -> list[int]:
    """How many samples of a problem hold each wrong answer."""
    return list(Counter(row["answer"] for row in group if row["source"] == "box" and not row["correct"]).values())


def summarize(
    rows: Sequence[Row], groups: Sequence[dict[str, str]], ks: Sequence[int], seed: int = 0
) -> dict[str, Any]:
    """Scores with 95% intervals, overall and by group, and the shares of truncated and answerless samples by pass.

    `groups` holds the groups of every problem, e.g. `{"level": "5", "subject": "Algebra"}`.
    """
    values = problem_values(rows, ks)
    by_group: dict[str, dict[str, Any]] = {}
    for column in sorted({column for problem in groups for column in problem}):
        members: dict[str, list[int]] = defaultdict(list)
        for index, problem in enumerate(groups):
            members[problem[column]].append(index)
        by_group[column] = {
            name: {"problems": len(chosen), "scores": estimates(select(values, chosen), seed)}
            for name, chosen in sorted(members.items())
        }
    return {
        "problems": len(groups),
        "scores": estimates(values, seed),
        "groups": by_group,
        "samples": {name: shares([r for r in rows if r["pass"] == name]) for name in sorted({r["pass"] for r in rows})},
    }


def select(values: Values, chosen: Sequence[int]) -> Values:
    return {measure: [column[index] for index in chosen] for measure, column in values.items()}


def estimates(values: Values, seed: int = 0) -> dict[str, dict[str, float]]:
    return {measure: asdict(bootstrap(column, seed)) for measure, column in values.items()}


def shares(rows: Sequence[Row]) -> dict[str, Any]:
    """What became of the samples of a pass.

    An answer in words alone ("the answer is 5") is in no score: it is told apart.  What timed out, ran out of memory or
    crashed while it was graded counts as wrong, and is told too.
    """
    statuses = Counter(row["status"] for row in rows)
    in_words = [row["status"] == "correct" and row["source"] == "phrase" for row in rows]
    return {
        "count": len(rows),
        "truncated_frac": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "no_answer_frac": sum(row["source"] != "box" for row in rows) / len(rows),
        "phrase_correct_frac": sum(in_words) / len(rows),
        "ungraded_frac": sum(statuses[status] for status in ("timeout", "memory", "crashed")) / len(rows),
        "mean_tokens": sum(len(row["token_ids"]) for row in rows) / len(rows),
        "statuses": dict(sorted(statuses.items())),
    }


def paired_differences(first: Values, second: Values, seed: int = 0) -> dict[str, dict[str, float]]:
    """second - first for every measure of both, problem by problem, with 95% bootstrap intervals over problems.

    Raises:
        ValueError: where they have no measure in common, or different numbers of problems.
    """
    common = [measure for measure in first if measure in second]
    if not common:
        raise ValueError(f"no measure in common: {', '.join(first)} against {', '.join(second)}")
    if any(len(first[measure]) != len(second[measure]) for measure in common):
        raise ValueError("the two runs have different numbers of problems")
    differences = {m: [b - a for a, b in zip(first[m], second[m], strict=True)] for m in common}
    return estimates(differences, seed)
