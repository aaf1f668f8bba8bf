"""Scripts of the project run in processes that are forked from one that has imported what they need.

Half of a start is imports.  Everything else is as under `python`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

from rollout_server import REPOSITORY

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fura_rl.run", "fura_rl.evaluation.pass_at_k", "vllm", "trl.trainer.grpo_trainer"])


def _run(script: str, arguments: list[str], log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(REPOSITORY)
    sys.argv = [str(REPOSITORY / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def started(script: str, *arguments: object, log: Path) -> BaseProcess:
    """`python script arguments`, going on beside the test; what it prints goes to `log`."""
    process = CONTEXT.Process(target=_run, args=(script, [*map(str, arguments)], log))
    process.start()
    return process


def said(script: str, *arguments: object, code: int = 0, timeout: float = 900) -> str:
    """What `python script arguments` prints until it ends with the exit status `code`."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = started(script, *arguments, log=log)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode == code, f"exit status {process.exitcode}: {log.read_text()[-8000:]}"
        return log.read_text()
