"""Grade a file again, offline.

    python -m rewards grade samples.jsonl                         evaluation mode, a summary
    python -m rewards grade samples.jsonl --mode training --out graded.jsonl
    python -m rewards golds problems.jsonl                        which golds cannot be read

A row of the file is an object with a completion (`completion`, `text` or `response`) and a gold (`gold`, `answer` or
`solution`); `tolerance` and `truncated` are read where they stand there.  A row with `expected` (true or false) is
compared with the verdict, and the disagreements are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rewards.grading import GOLD_KEYS, check_golds, grade
from rewards.pool import WorkerPool
from rewards.result import Result
from rewards.strictness import MODES


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError with the line of what is no JSON object."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row is a JSON object, not {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def summary(results: list[Result]) -> str:
    counts = Counter(result.status for result in results)
    lines = [f"{status:<17} {count:>7}  {count / len(results):>6.1%}" for status, count in counts.most_common()]
    phrases = sum(result.correct and result.source == "phrase" for result in results)
    if phrases:
        lines.append(f'of the correct ones, {phrases} were read from "the answer is ...", not from a box')
    return "\n".join(lines)


def disagreements(rows: list[dict[str, Any]], results: list[Result]) -> list[str]:
    labelled = [
        (row, result) for row, result in zip(rows, results, strict=True) if isinstance(row.get("expected"), bool)
    ]
    if not labelled:
        return []
    wrong = [
        f"expected {row['expected']}, {result.status} ({result.decided_by}): gold {gold_of(row)[:60]!r}, answer "
        f"{(result.answer or '')[:60]!r}" + (" [policy]" if row.get("policy") else "")
        for row, result in labelled
        if row["expected"] != result.correct
    ]
    return [*wrong, f"{len(labelled) - len(wrong)} of {len(labelled)} labelled rows as expected"]


def gold_of(row: dict[str, Any]) -> str:
    return str(next((row[key] for key in GOLD_KEYS if row.get(key) is not None), ""))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rewards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["grade", "golds"])
    parser.add_argument("file", type=Path, help="rows as JSON lines")
    parser.add_argument("--mode", choices=list(MODES), default="evaluation", help="strictness [evaluation]")
    parser.add_argument("--workers", type=int, default=2, help="worker processes [2]")
    parser.add_argument("--out", type=Path, help="write the rows with their verdicts here")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.file)
        pool = WorkerPool(args.workers)
        if args.command == "grade":
            results = grade(rows, mode=args.mode, pool=pool)
        else:
            results = check_golds([gold_of(row) for row in rows], pool=pool)
        pool.close()
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    notes = disagreements(rows, results) if args.command == "grade" else unreadable(results)
    print("\n".join([*notes, summary(results)]))
    if args.out:
        graded = ({**row, "result": asdict(result)} for row, result in zip(rows, results, strict=True))
        args.out.write_text("".join(json.dumps(row) + "\n" for row in graded), encoding="utf-8")
    return 0


def unreadable(results: list[Result]) -> list[str]:
    bad = [(row, result) for row, result in enumerate(results) if not result.correct]
    return [f"row {row}: {(result.answer or '')[:60]!r} ({result.decided_by})" for row, result in bad]


if __name__ == "__main__":
    sys.exit(main())
