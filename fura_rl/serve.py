"""A rollout server: vLLM's OpenAI server with our weight sync, a token, loopback by default, restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hmac
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fura_rl.sync.vllm_engine import cpu_cache_settings, engine_environment
from fura_rl.sync.vllm_plugin import BACKEND, EXTENSION

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "FURA_ROLLOUT_TOKEN"
OPEN_PATHS = ("/health", "/ping")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PR_SET_PDEATHSIG = 1
PAUSE_CHECK_SECONDS = 5.0
STOP_SECONDS = 20.0  # vLLM's server may wait for ever for what it has under way; then it is killed
MEMORY_OPTIONS = {"--gpu-memory-utilization", "--kv-cache-memory-bytes"}  # else a CPU must have 92% of it free


class RequireToken:
    """ASGI middleware: every route but the health checks wants `Authorization: Bearer $FURA_ROLLOUT_TOKEN`.

    vLLM's `--api-key` leaves the routes open that change weights (`/collective_rpc`, `/pause` ...; read in 0.31).
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                headers = [(b"content-type", b"text/plain")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": b"wrong or missing token"})
                return
        await self.app(scope, receive, send)


class ResumeForLostTrainer:
    """ASGI middleware: a server that is paused goes on once the lease of the trainer that owns it has ended.

    A trainer pauses around its commit; killed there, it would leave the server so until another one syncs.  A pause by
    hand, or a sleep, is not told from that once the owner was lost, and ends as well: vLLM 0.31 says of a paused server
    that it sleeps.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        watch = asyncio.create_task(resume_for_lost_trainers(scope["app"]))
        try:
            await self.app(scope, receive, send)  # from the server's start to its end
        finally:
            watch.cancel()


async def resume_for_lost_trainers(app: Callable[..., Awaitable[None]]) -> None:
    """Look after `app`, vLLM's server, for ever.  Its own routes are asked, without port, TLS or lines in its log."""
    import httpx

    token = os.environ.get(TOKEN_VARIABLE)
    routes = httpx.ASGITransport(app, raise_app_exceptions=False)  # a dead engine's are the server's to tell
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(transport=routes, base_url="http://server", headers=headers) as server:
        while True:
            await asyncio.sleep(PAUSE_CHECK_SECONDS)
            if workers := await workers_of_a_lost_pause(server):
                await resume(server, workers)


async def workers_of_a_lost_pause(server: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The status of every worker, where the server is paused and its owner's lease has ended in all of them; else [].

    A trainer that was only slow, or another that comes in this moment, loses nothing but the pause: it resumes after
    its commit itself, and then drops what was cached before.
    """
    paused = await server.get("/is_paused")
    if not paused.is_success or not paused.json()["is_paused"]:
        return []
    # answered after what a worker has under way: a commit, which renews the lease
    status = await server.post("/collective_rpc", json={"method": "fura_status"})
    workers = status.json()["results"] if status.is_success else []
    return workers if all(worker["lease_ended"] for worker in workers) else []


async def resume(server: httpx.AsyncClient, workers: list[dict[str, Any]]) -> None:
    """Go on as the trainer of `workers` would have after its commit; tried again at the next look where it fails."""
    logger.warning("trainer %s was lost while it had this server paused, which goes on now", workers[0]["owner"])
    if len({worker["version"] for worker in workers}) > 1:
        torn = {"reason": "its trainer was lost in a commit that some of its workers have made and others not"}
        await server.post("/collective_rpc", json={"method": "fura_poison", "kwargs": torn})
    reset = await server.post("/reset_prefix_cache", params={"reset_running_requests": "true"})
    if reset.is_success and reset.json()["success"]:
        await server.post("/resume")


def check(host: str, port: int) -> None:
    """Raises ValueError where the server would be open to others without a token, or where its port is taken."""
    if host not in LOOPBACK and not os.environ.get(TOKEN_VARIABLE):
        raise ValueError(
            f"host={host!r} lets other machines in, and whoever reaches the server can change its weights: set "
            f"{TOKEN_VARIABLE} to a secret here and for the trainer, or serve on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"port={port} on host={host!r} cannot be listened on ({error}): stop what listens there, or choose "
                "another --port"
            ) from error


def listening(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        return True
    return False


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(model: str, host: str, port: int, extra: Sequence[str]) -> list[str]:
    """The server's command line; `extra` are vLLM's own options, which win."""
    settings = {
        "--host": host,
        "--port": str(port),
        "--weight-transfer-config": f'{{"backend": "{BACKEND}"}}',
        "--worker-extension-cls": EXTENSION,
        "--logprobs-mode": "processed_logprobs",  # temperature and filters belong to the sampling policy's log-probs
        "--max-logprobs": "-1",
        "--load-format": "safetensors",  # vLLM would take pickled weights where there are no others
    }
    given = {word.partition("=")[0].replace("_", "-") for word in extra}
    if not torch.cuda.is_available() and not MEMORY_OPTIONS & given:
        settings |= {f"--{name.replace('_', '-')}": str(value) for name, value in cpu_cache_settings(0.25).items()}
    words = [word for name, value in settings.items() if name not in given for word in (name, value)]
    words += ["--middleware", "fura_rl.serve.ResumeForLostTrainer"]  # vLLM adds them up: `extra` may have another
    if os.environ.get(TOKEN_VARIABLE):
        words += ["--middleware", "fura_rl.serve.RequireToken"]
    # the `vllm` console script of the CPU wheel looks for another distribution and fails, the module does not
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *words, *extra]


def environment(extra: Sequence[str]) -> dict[str, str]:
    """The server's environment; `extra` as for `command`."""
    words = [part for word in extra for part in word.split("=", 1)]
    dtype = next((value for name, value in itertools.pairwise(words) if name == "--dtype"), "auto")
    return engine_environment(dtype) | os.environ | {"VLLM_SERVER_DEV_MODE": "1"}


def serve(model: str, host: str, port: int, extra: Sequence[str], restarts: int) -> int:
    """Run the server until it ends or this process is told to end; returns its exit code.

    A server that dies is started again, up to `restarts` times; one that never came to listen is not, for its fault is
    in its options.  It never outlives this process: a SIGTERM or SIGINT ends both, within `STOP_SECONDS`, and so does
    the death of this process.
    """
    check(host, port)
    served = False
    for attempt in range(restarts + 1):
        child = subprocess.Popen(
            command(model, host, port, extra), env=environment(extra), preexec_fn=die_with_parent, process_group=0
        )
        guard = outliving_guard(child.pid)
        stopped: float | None = None

        def stop(number: int, frame: Any, child: subprocess.Popen = child) -> None:
            nonlocal stopped
            stopped = stopped or time.monotonic()
            child.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        while (code := child.poll()) is None:
            served = served or listening(host, port)
            if stopped and time.monotonic() - stopped > STOP_SECONDS:
                child.kill()
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):  # an engine whose server was killed would keep its memory
            os.killpg(child.pid, signal.SIGKILL)
        guard.kill()  # the number of a group that has ended may become another's
        guard.communicate()
        if stopped or code == 0 or not served or attempt == restarts:
            return 0 if stopped else code
        print(f"the rollout server died with code {code}; starting it again ({attempt + 1} of {restarts})", flush=True)
    return code


def outliving_guard(group: int) -> subprocess.Popen:
    """A shell that ends process group `group` once this process is dead, however it died.

    The server is sent a SIGTERM at our death (`die_with_parent`), but it may be deaf to that; and a SIGKILL in its
    place would leave its engine, another process, alive.  The shell's input ends with us; it has a session of its own,
    so that whoever kills our process group leaves it alive.
    """
    script = f"read _; sleep {STOP_SECONDS:g}; kill -s KILL -- -{group}"
    return subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
