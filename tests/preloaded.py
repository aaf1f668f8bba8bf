"""Scripts of the project run in processes that are forked from one that has imported what they need.

Half of a start is imports.  What a script does from its first line on is the same as under `python`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
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


def ended(script: str, *arguments: object, timeout: float = 900) -> tuple[int | None, str]:
    """The exit status of `python script arguments`, and all that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = started(script, *arguments, log=log)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode, log.read_text()


def said(script: str, *arguments: object, code: int = 0, timeout: float = 900) -> str:
    """What `python script arguments` prints until it ends with the exit status `code`."""
    status, text = ended(script, *arguments, timeout=timeout)
    assert status == code, f"exit status {status}: {text[-8000:]}"
    return text
