"""A real rollout server for tests: launch/serve_rollouts.py on a free port, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
UP_SECONDS = 600  # 20 on an idle machine
SETTINGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "67108864")


def child_environment(**settings: str) -> dict[str, str]:
    """For processes that tests start: vLLM's engine in a process of its own, this checkout imported."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH"))))
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return inherited | offline | {"PYTHONPATH": path} | settings


class RolloutServer:
    def __init__(self, model: Path, log: Path, *options: str) -> None:
        from fura_rl.serve import free_port

        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model, self.log = model, log
        self._options = options

    def start(self) -> RolloutServer:
        command = [sys.executable, "launch/serve_rollouts.py", "--model", str(self.model), "--port", str(self.port)]
        with open(self.log, "a") as file:
            self.supervisor = subprocess.Popen(
                [*command, *SETTINGS, *self._options],
                stdout=file, stderr=file, cwd=REPOSITORY, env=child_environment(), start_new_session=True,
            )  # fmt: skip
        return self

    def wait_until_up(self) -> RolloutServer:
        import requests

        deadline = time.monotonic() + UP_SECONDS
        while time.monotonic() < deadline:
            assert self.supervisor.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return self
            time.sleep(0.3)
        raise TimeoutError(self.log.read_text()[-3000:])

    def processes(self) -> list[psutil.Process]:
        """The server, its engine and its guard, without the supervisor."""
        return psutil.Process(self.supervisor.pid).children(recursive=True)

    def api_server(self) -> psutil.Process:
        [child] = [p for p in psutil.Process(self.supervisor.pid).children() if "--model" in p.cmdline()]
        return child

    def kill(self) -> None:
        """As the kernel does when memory runs out: no process of the server can say goodbye."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self) -> None:
        family = [*self.processes(), psutil.Process(self.supervisor.pid)] if self.supervisor.poll() is None else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)  # a stopped process takes no other signal
        if self.supervisor.poll() is None:
            self.supervisor.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.supervisor.wait(30)
        for process in psutil.wait_procs(family, timeout=10)[1]:
            process.kill()
