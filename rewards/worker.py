"""A worker: takes tasks from its socket, grades each under a CPU-time deadline, and answers.  See `rewards.nursery`.

CPU time, because on a busy machine a good answer may wait long for its turn: a wall clock here fails good items.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

from rewards import ladder, symbolic, wire
from rewards.strictness import MODES

MAX_INTEGER_DIGITS = 20_000
RECURSION_LIMIT = 3_000


class DeadlineError(BaseException):
    """The CPU time of an item is spent.  A BaseException, for sympy swallows every Exception."""


class Deadline:
    """A CPU-time limit that is raised again and again until the item's code has let go."""

    def __init__(self) -> None:
        self.armed = False
        signal.signal(signal.SIGPROF, self.expire)

    def expire(self, number: int, frame: FrameType | None) -> None:
        if self.armed:
            raise DeadlineError

    def __enter__(self) -> None:
        self.armed = True

    def __exit__(self, *_: object) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(connection: socket.socket, missing: str, max_tasks: int, max_rss_bytes: int) -> None:
    """Grade until the caller closes the socket.  An answer tells the memory in use and whether a successor is due."""
    sys.set_int_max_str_digits(MAX_INTEGER_DIGITS)
    sys.setrecursionlimit(RECURSION_LIMIT)
    deadline, done = Deadline(), 0
    wire.send(connection, {"hello": os.getpid(), "missing": missing})
    while True:
        try:
            tasks = wire.receive(connection)
            for task in tasks:
                done += 1
                answer = run(task, deadline) | {"rss_bytes": rss_bytes()}
                answer["retire"] = done >= max_tasks or answer["rss_bytes"] > max_rss_bytes
                wire.send(connection, answer)
        except (EOFError, OSError):
            return


def run(task: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
    """One task to one status; whatever goes wrong in it ends here."""
    started = time.perf_counter()
    try:
        with deadline:
            signal.setitimer(signal.ITIMER_PROF, MODES[task["mode"]].soft_cpu_seconds, 0.05)
            status, decided_by = judge(task)
    except DeadlineError:
        deadline.armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        status, decided_by = "timeout", "cpu deadline"
    except MemoryError:
        symbolic.parse.cache_clear()
        status, decided_by = "memory", "memory limit"
    except symbolic.UnparseableError as error:
        status, decided_by = "gold_unparseable" if error.is_gold else "unparseable", "math_verify"
    except RecursionError:
        status, decided_by = "unparseable", "nesting"
    except Exception as error:  # the process boundary: sympy raises all kinds, and the caller is told which
        status, decided_by = "unparseable", f"{type(error).__name__}: {error}"[:200]
    return {"status": status, "decided_by": decided_by, "seconds": time.perf_counter() - started}


def judge(task: dict[str, Any]) -> tuple[str, str]:
    strictness, tolerance = MODES[task["mode"]], task["tolerance"]

    def fallback(gold: str, answer: str) -> bool:
        return symbolic.equal(gold, answer, strictness.min_rounded_digits, tolerance)

    if task["answer"] is None:
        judgement = ladder.judge_gold(task["gold"], fallback)
    else:
        judgement = ladder.judge_answer(task["gold"], task["answer"], task["joined"], strictness, tolerance, fallback)
    return judgement.status or "incorrect", judgement.decided_by


def rss_bytes() -> int:
    """Memory in use now; where the system does not tell, the most that was ever in use."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
