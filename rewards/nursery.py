"""The process that workers are forked from: `python -m rewards.nursery`, started by `rewards.pool`.

It imports sympy and math-verify once and grades a few warm-up items, so that a worker is ready in milliseconds and
shares its memory.  It never grades itself, so it always notices when its parent goes: it then kills its workers.  A
process of its own, started by exec, has no thread, lock, CUDA context or main module of the caller in it.

Commands on its control socket are a letter and a number: `f` forks worker N on the socket that comes along, `k` kills
it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys

from rewards.wire import COMMAND

os.environ["SYMPY_GROUND_TYPES"] = "python"  # gmpy2's C loops ignore signals, and it aborts when memory runs out

PARENT_CHECK_SECONDS = 0.5  # a process forked from the caller may hold the socket open; its parent id cannot lie
WARM_UP = [
    ("2^{n}-1", "-1+2^{n}"), (r"\ln 8", r"3\ln 2"), (r"\sin 2x", r"2\sin x\cos x"), (r"e^{i\pi}", "-1"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"), (r"\sum_{k=1}^{10}k^2", "385"), (r"\log_2 8", "3"), (r"x^{n}>2", "x^{n}>3"),
    (r"\frac13\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"\{x+n^{2}\}", "[0,1)"),
]  # fmt: skip


def main(control_fd: int, parent: int, memory_bytes: int, max_tasks: int, max_rss_bytes: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the caller's to handle, also where every process gets its own:
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C from a terminal, SIGTERM from Slurm
    control = socket.socket(fileno=control_fd)
    warm_up()
    children: dict[int, int] = {}  # number of a worker -> process id
    while os.getppid() == parent:
        readable, _, _ = select.select([control], [], [], PARENT_CHECK_SECONDS)
        reap(children)
        if not readable:
            continue
        message, fds, _, _ = socket.recv_fds(control, COMMAND.size, 1)
        if len(message) < COMMAND.size:
            break
        order, number = COMMAND.unpack(message)
        if order == b"f":
            children[number] = fork_worker(control, fds[0], memory_bytes, max_tasks, max_rss_bytes)
        elif order == b"k" and number in children:
            os.kill(children[number], signal.SIGKILL)
    for process in children.values():
        os.kill(process, signal.SIGKILL)


def warm_up() -> None:
    """Load what grading loads lazily: grammars, regexes, solvers.  A failure ends the nursery, with its traceback."""
    from rewards import symbolic

    for gold, answer in WARM_UP:
        with contextlib.suppress(symbolic.UnparseableError):
            symbolic.equal(gold, answer, 6)
    symbolic.parse.cache_clear()
    gc.collect()
    gc.freeze()


def reap(children: dict[int, int]) -> None:
    """Collect the workers that ended, so that no zombie stays and no stranger with a reused id is ever killed."""
    for number, process in list(children.items()):
        done, _ = os.waitpid(process, os.WNOHANG)
        if done:
            del children[number]


def fork_worker(control: socket.socket, fd: int, memory_bytes: int, max_tasks: int, max_rss_bytes: int) -> int:
    nursery = os.getpid()
    process = os.fork()
    if process:
        os.close(fd)
        return process
    try:
        from rewards import sandbox, worker

        control.close()
        sandbox.die_with_parent(nursery)
        silence = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(silence, standard)
        missing = sandbox.confine(memory_bytes)
        worker.serve(socket.socket(fileno=fd), missing, max_tasks, max_rss_bytes)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
