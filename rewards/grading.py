"""`grade` and `agrade`: what the caller's process decides by itself, and what it hands to the workers.

Extraction, exact values and words need no sympy: most items are decided here in a fraction of a millisecond.  The rest
goes to the workers, one gold's answers to one worker.  Verdicts are remembered by gold and answer.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards import ladder
from rewards.extract import MAX_CHARS, completion_text, extract
from rewards.pool import Task, WorkerPool
from rewards.result import Item, Result
from rewards.strictness import find_mode

WORKERS_VARIABLE = "REWARDS_WORKERS"
REMEMBERED = frozenset({"correct", "incorrect", "unparseable", "gold_unparseable", "timeout"})  # not kills, not crashes
BUDGET_SPENT = "the caller's budget was spent"
COMPLETION_KEYS, GOLD_KEYS = ("completion", "text", "response"), ("gold", "answer", "solution")


class VerdictCache:
    """The latest verdicts by gold and answer: (status, decided_by).  Safe for several threads."""

    def __init__(self, size: int = 20_000) -> None:
        self.size = size
        self._entries: OrderedDict[tuple, tuple[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple) -> tuple[str, str] | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: tuple, verdict: tuple[str, str]) -> None:
        with self._lock:
            self._entries[key] = verdict
            while len(self._entries) > self.size:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


VERDICTS = VerdictCache()
_pool: WorkerPool | None = None
_pool_lock = threading.Lock()


def default_pool() -> WorkerPool:
    """The pool that `grade` uses: `REWARDS_WORKERS` processes, by default one per core up to four."""
    global _pool
    with _pool_lock:
        if _pool is None:
            given = os.environ.get(WORKERS_VARIABLE, "")
            if given and not given.isdigit():
                raise ValueError(f"{WORKERS_VARIABLE}={given!r} must be a number of worker processes")
            _pool = WorkerPool(int(given) if given else min(4, os.cpu_count() or 1))
        return _pool


def start_workers() -> None:
    """Start the worker processes now; they are warm a second later.  `grade` does it by itself where it needs them."""
    default_pool().start()


def close_workers() -> None:
    """End the default pool; the next `grade` starts another."""
    global _pool
    with _pool_lock:
        pool, _pool = _pool, None
    if pool is not None:
        pool.close()


def _after_fork() -> None:
    """A process forked from this one has none of its threads: it starts a pool of its own where it grades."""
    global _pool, _pool_lock
    if _pool is not None:
        _pool.abandon()
    _pool, _pool_lock = None, threading.Lock()
    VERDICTS._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(close_workers)


@dataclass
class Prepared:
    """A batch after the caller's part: results by position, and tasks for the rest, shared by equal items."""

    results: list[Result | None]
    waiting: dict[tuple, tuple[Task, list[int]]]  # key -> its task and the positions that wait for it
    read: dict[int, tuple[str | None, str | None]]  # position -> answer, source


def grade(
    items: Iterable[Item | Mapping[str, Any] | Sequence[Any]],
    mode: str = "training",
    *,
    budget_seconds: float | None = None,
    prefilled_thinking: bool = False,
    pool: WorkerPool | None = None,
) -> list[Result]:
    """The verdict on every item.  Callable from any thread; raises for no completion, however hostile.

    Args:
        items: `Item`s, (completion, gold) pairs, or mappings with a completion and a gold.
        mode: a row of `rewards.strictness.MODES`.
        budget_seconds: wall time after which unfinished items end as `timeout`; None waits for all, which the
            deadlines of the mode bound.
        prefilled_thinking: whether the prompts end with an opening thinking tag.
        pool: other workers than the default ones.

    Raises:
        ValueError, TypeError: for an unknown mode or an item that is no completion and gold.
        WorkersError: where no worker process can be started.
    """
    ends = time.monotonic() + (math.inf if budget_seconds is None else budget_seconds)
    prepared, tasks = _submit(items, mode, prefilled_thinking, pool, ends)
    concurrent.futures.wait([task.future for task in tasks], timeout=_left(ends))
    return _collect(prepared)


async def agrade(
    items: Iterable[Item | Mapping[str, Any] | Sequence[Any]],
    mode: str = "training",
    *,
    budget_seconds: float | None = None,
    prefilled_thinking: bool = False,
    pool: WorkerPool | None = None,
) -> list[Result]:
    """`grade` for asyncio: the loop runs on while workers grade, and the caller's part runs in a thread."""
    ends = time.monotonic() + (math.inf if budget_seconds is None else budget_seconds)
    prepared, tasks = await asyncio.to_thread(_submit, items, mode, prefilled_thinking, pool, ends)
    if tasks:
        await asyncio.wait([asyncio.wrap_future(task.future) for task in tasks], timeout=_left(ends))
    return _collect(prepared)


def check_golds(golds: Sequence[str], pool: WorkerPool | None = None) -> list[Result]:
    """Every gold against itself, by meaning: `correct`, or `gold_unparseable` with the reason."""
    results: list[Result | None] = [None] * len(golds)
    tasks: dict[str, tuple[Task, list[int]]] = {}
    for position, gold in enumerate(golds):
        judgement = ladder.judge_gold(gold)
        if judgement.status is not None:
            results[position] = Result(judgement.status, ladder.gold_answer(gold), "gold", judgement.decided_by)
        else:
            tasks.setdefault(gold, (Task(gold, None, mode="evaluation"), []))[1].append(position)
    (pool or default_pool()).submit([[task] for task, _ in tasks.values()]) if tasks else None
    for gold, (task, positions) in tasks.items():
        verdict = task.future.result()
        status = "correct" if verdict["status"] == "correct" else "gold_unparseable"
        reason = verdict["decided_by"] if status == "correct" else f"{verdict['status']}: {verdict['decided_by']}"
        for position in positions:
            results[position] = Result(status, ladder.gold_answer(gold), "gold", reason, verdict["seconds"])
    return [result for result in results if result is not None]


def as_item(item: Item | Mapping[str, Any] | Sequence[Any]) -> Item:
    """Raises TypeError for what is no item, naming what was given."""
    if isinstance(item, Item):
        return item
    if isinstance(item, Mapping):
        completion = next((item[key] for key in COMPLETION_KEYS if key in item), None)
        gold = next((item[key] for key in GOLD_KEYS if item.get(key) is not None), None)
        if completion is None or gold is None:
            raise TypeError(
                f"an item needs one of {', '.join(COMPLETION_KEYS)} and one of {', '.join(GOLD_KEYS)}; this one has "
                f"{', '.join(map(str, item))}"
            )
        return Item(completion, str(gold), bool(item.get("truncated")), float(item.get("tolerance") or 0.0))
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        return Item(item[0], str(item[1]))
    raise TypeError(f"an item is an Item, a mapping or a (completion, gold) pair, not {type(item).__name__}")


def _left(ends: float) -> float | None:
    return None if ends == math.inf else max(0.0, ends - time.monotonic())


def _submit(
    items: Iterable[Any], mode: str, prefilled: bool, pool: WorkerPool | None, ends: float
) -> tuple[Prepared, list[Task]]:
    find_mode(mode)
    prepared = _prepare([as_item(item) for item in items], mode, prefilled, ends)
    tasks = [task for task, _ in prepared.waiting.values()]
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.gold, []).append(task)
    if groups:
        (pool or default_pool()).submit(list(groups.values()))
    return prepared, tasks


def _prepare(items: list[Item], mode: str, prefilled: bool, ends: float) -> Prepared:
    strictness = find_mode(mode)
    prepared = Prepared([None] * len(items), {}, {})
    for position, item in enumerate(items):
        if time.monotonic() > ends:
            prepared.results[position] = Result("timeout", decided_by=BUDGET_SPENT)
            continue
        started = time.perf_counter()
        text = completion_text(item.completion)  # type: ignore[arg-type]
        extraction = extract(text, prefilled, strictness.phrase_fallback)
        answer = None if extraction.answer is None else extraction.answer[:MAX_CHARS]
        prepared.read[position] = (answer, extraction.source)
        judgement = ladder.judge_extraction(extraction, strictness, item.truncated)
        if judgement.status is None:
            gold = ladder.gold_answer(item.gold)
            key = (gold, answer, extraction.joined, mode, item.tolerance)
            known = VERDICTS.get(key)
            if known is not None:
                judgement = ladder.Judgement(*known)  # type: ignore[arg-type]
            elif key in prepared.waiting:
                prepared.waiting[key][1].append(position)
                continue
            else:
                judgement = ladder.judge_answer(gold, answer or "", extraction.joined, strictness, item.tolerance)
                if judgement.status is None:
                    prepared.waiting[key] = (Task(*key), [position])
                    continue
                VERDICTS.put(key, (judgement.status, judgement.decided_by))
        seconds = time.perf_counter() - started
        prepared.results[position] = Result(
            judgement.status,
            answer,
            extraction.source,
            judgement.decided_by,
            seconds,  # type: ignore[arg-type]
        )
    return prepared


def _collect(prepared: Prepared) -> list[Result]:
    for key, (task, positions) in prepared.waiting.items():
        if task.future.done() and not task.future.cancelled():
            verdict = task.future.result()
        else:
            task.future.cancel()
            verdict = {"status": "timeout", "decided_by": BUDGET_SPENT, "seconds": 0.0}
        if verdict["status"] in REMEMBERED and verdict["decided_by"] not in (
            BUDGET_SPENT,
            "killed at the wall deadline",
        ):
            VERDICTS.put(key, (verdict["status"], verdict["decided_by"]))
        for position in positions:
            answer, source = prepared.read[position]
            prepared.results[position] = Result(
                verdict["status"], answer, source, verdict["decided_by"], verdict["seconds"]
            )
    return [result for result in prepared.results if result is not None]
