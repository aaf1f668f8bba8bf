"""Persistent worker processes with two deadlines: the worker gives an item up, or it is killed over it.

Why an own pool and not Pebble (5.2.3, the best of those that kill): Pebble's one deadline is wall time, polled every
0.1 s, and each timeout costs a worker; a worker stuck in C costs its manager 3 s more, behind an internal constant; it
has no memory limit, forks from the caller or imports the caller's main module, and cannot send one gold's completions
to one worker.  `concurrent.futures` and loky cannot kill one task, and break as a whole when a worker dies.

One thread per worker waits on that worker's socket; nothing else in the caller's process is touched: no signal handler,
no alarm, no fork.  A caller that dies takes the nursery and its workers along (see `rewards.nursery`).
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rewards import wire
from rewards.strictness import MODES
from rewards.wire import COMMAND

logger = logging.getLogger(__name__)

GIB = 2**30
START_SECONDS = 120.0  # importing sympy on a machine that is short of everything


class WorkersError(RuntimeError):
    """Workers cannot be started: sympy or math-verify do not import, or the system has no process to give."""


@dataclass
class Task:
    """A gold with one answer to it (None: the gold alone), and where the verdict goes."""

    gold: str
    answer: str | None
    joined: str | None = None
    mode: str = "training"
    tolerance: float = 0.0
    future: Future[dict[str, Any]] = field(default_factory=Future)

    def message(self) -> dict[str, Any]:
        return {
            "gold": self.gold,
            "answer": self.answer,
            "joined": self.joined,
            "mode": self.mode,
            "tolerance": self.tolerance,
        }


@dataclass
class Counters:
    """What happened to the workers since the pool began."""

    timeouts: int = 0  # given up by the worker
    kills: int = 0  # killed at the wall deadline
    crashes: int = 0  # died by themselves
    recycled: int = 0  # replaced after `max_tasks` items or beyond `max_rss_bytes`
    rss_bytes: int = 0  # the most that a worker had in use
    unconfined: str = ""  # what the sandbox could not have on this system


class WorkerPool:
    """`workers` processes, started at the first task.

    Args:
        workers: processes, one thread each in the caller.
        memory_bytes: address space of a worker; beyond it an item ends as `memory`.
        max_tasks, max_rss_bytes: after so many items, or with so much memory in use, a worker is replaced.
    """

    def __init__(
        self, workers: int, memory_bytes: int = GIB, max_tasks: int = 2_000, max_rss_bytes: int = 400 * 2**20
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        if os.name != "posix":
            raise NotImplementedError("rewards grades in forked processes, which this system does not have; use Linux")
        self.workers = workers
        self.limits = (memory_bytes, max_tasks, max_rss_bytes)
        self.counters = Counters()
        self.process_ids: dict[int, int] = {}  # thread index -> process id of its worker
        self._queues: list[deque[list[Task]]] = [deque() for _ in range(workers)]
        self._wake = threading.Condition()
        self._nursery_lock = threading.Lock()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (the nursery's stderr, as long as the pool lives)
        self._numbers = 0
        self._threads: list[threading.Thread] = []
        self._closed = False

    def start(self) -> None:
        """Begin to start the processes; returns at once."""
        with self._wake:
            if self._closed:
                raise WorkersError("this pool is closed")
            if self._threads:
                return
            for index in range(self.workers):
                thread = threading.Thread(target=self._serve, args=(index,), name=f"rewards-{index}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def submit(self, groups: Sequence[list[Task]]) -> None:
        """Queue groups of tasks; one group, and every group of the same gold, goes to one worker while that is free."""
        self.start()
        with self._wake:
            for group in groups:
                self._queues[zlib.crc32(group[0].gold.encode("utf-8", "replace")) % self.workers].append(group)
            self._wake.notify_all()

    def close(self) -> None:
        """End workers and nursery; tasks that wait end as `crashed`."""
        with self._wake:
            self._closed = True
            waiting = [task for queue in self._queues for group in queue for task in group]
            self._wake.notify_all()
        for task in waiting:
            if task.future.set_running_or_notify_cancel():
                task.future.set_result(ended("crashed", "the pool was closed"))
        with self._nursery_lock:
            if self._control is not None:
                self._control.close()
            if self._nursery is not None:
                try:
                    self._nursery.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    self._nursery.kill()
                    self._nursery.wait()
            self._errors.close()

    def abandon(self) -> None:
        """In a process forked from the owner: let go of its sockets, so that the owner's death is noticed."""
        self._closed = True
        if self._control is not None:
            self._control.close()

    def _next_group(self, index: int) -> list[Task] | None:
        """A group of this worker's own golds, else the longest other queue's latest; None when the pool closes."""
        with self._wake:
            while True:
                if self._closed:
                    return None
                if self._queues[index]:
                    return self._queues[index].popleft()
                longest = max(self._queues, key=len)
                if longest:
                    return longest.pop()
                self._wake.wait()

    def _serve(self, index: int) -> None:
        """The thread of one worker."""
        worker: Worker | None = None
        while (group := self._next_group(index)) is not None:
            running = [task for task in group if task.future.set_running_or_notify_cancel()]
            while running and not self._closed:
                try:
                    worker = worker or self._fork(index)
                except WorkersError as error:
                    for task in running:
                        task.future.set_exception(error)
                    break
                if not self._run(worker, running):
                    worker.connection.close()
                    worker = None
            for task in running if self._closed else ():
                task.future.set_result(ended("crashed", "the pool was closed"))
        if worker is not None:
            worker.connection.close()

    def _run(self, worker: Worker, tasks: list[Task]) -> bool:
        """Grade tasks, taking each off the list as it ends; False where the worker must be replaced."""
        try:
            wire.send(worker.connection, [task.message() for task in tasks])
            while tasks:
                worker.connection.settimeout(MODES[tasks[0].mode].hard_wall_seconds)
                answer = wire.receive(worker.connection)
                tasks.pop(0).future.set_result(answer)
                self.counters.rss_bytes = max(self.counters.rss_bytes, answer["rss_bytes"])
                self.counters.timeouts += answer["status"] == "timeout"
        except TimeoutError:
            self.counters.kills += 1
            self._order(b"k", worker.number)
            tasks.pop(0).future.set_result(ended("timeout", "killed at the wall deadline"))
            return False
        except (EOFError, OSError):
            if not self._closed:
                self.counters.crashes += 1
                tasks.pop(0).future.set_result(ended("crashed", "the worker died"))
            return False
        self.counters.recycled += answer["retire"]
        return not answer["retire"]

    def _fork(self, index: int) -> Worker:
        """A new worker, from a new nursery where the old one is gone."""
        for attempt in range(3):
            ours, theirs = socket.socketpair()
            with theirs, self._nursery_lock:
                if self._closed:
                    break
                if self._nursery is None or self._nursery.poll() is not None or attempt:
                    self._start_nursery()
                self._numbers += 1
                number = self._numbers
                try:
                    socket.send_fds(self._control, [COMMAND.pack(b"f", number)], [theirs.fileno()])
                except OSError:
                    continue
            ours.settimeout(START_SECONDS)
            try:
                hello = wire.receive(ours)
            except (EOFError, TimeoutError):
                ours.close()
                continue
            self._note_confinement(hello["missing"])
            self.process_ids[index] = hello["hello"]
            return Worker(ours, number)
        raise WorkersError(f"the verifier's workers do not start:\n{self._last_words()}")

    def _note_confinement(self, missing: str) -> None:
        """Warn, once a pool, that the verifier goes on without its second wall."""
        with self._nursery_lock:
            first, self.counters.unconfined = missing and not self.counters.unconfined, missing
        if first:
            logger.warning(
                "verifier workers run UNCONFINED, able to open sockets and start programs: %s. Deadlines and memory "
                "limit hold; for the rest, use Linux on x86_64 or aarch64, and a container that allows seccomp",
                missing,
            )

    def _start_nursery(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, theirs = socket.socketpair()
        self._errors.seek(0)
        self._errors.truncate()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "SYMPY_GROUND_TYPES": "python",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        arguments = [str(number) for number in (theirs.fileno(), os.getpid(), *self.limits)]
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", "rewards.nursery", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=environment,
                start_new_session=True,
            )

    def _last_words(self) -> str:
        """What the nursery wrote before it ended."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2_000:]

    def _order(self, letter: bytes, number: int) -> None:
        with self._nursery_lock:
            try:
                if self._control is not None:
                    self._control.sendall(COMMAND.pack(letter, number))
            except OSError:
                pass  # the nursery is gone, and its workers with it


@dataclass
class Worker:
    """The caller's end of a worker."""

    connection: socket.socket
    number: int


def ended(status: str, decided_by: str) -> dict[str, Any]:
    return {"status": status, "decided_by": decided_by, "seconds": 0.0}
