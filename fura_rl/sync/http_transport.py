"""HTTP to one vLLM server: the development routes of vLLM 0.31 and our worker extension behind them.

Every wait has a limit.  A server that does not answer within it is lost, whatever `/health` says: it answers during a
hang.  Limits are the client's own; vLLM's server-side RPC timeout must never be used, since a late reply is then taken
for the next forward's output and kills the engine.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import requests
import torch
from requests.adapters import HTTPAdapter

from fura_rl.serve import TOKEN_VARIABLE
from fura_rl.sync.transport import EngineLostError, RemoteSyncError

if TYPE_CHECKING:
    from urllib3 import HTTPResponse

LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0")
MAX_REQUESTS = 64  # at a time, where each prompt is a request
NOT_OURS = "answers, but not as vLLM does; is another server or a proxy at that address?"


class TimeoutAdapter(HTTPAdapter):
    """Requests that end: a reply that has not arrived whole after `seconds` is an error.  No retries, since not every
    call may run twice."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(pool_maxsize=MAX_REQUESTS)

    def send(self, request: Any, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs["timeout"] = seconds = kwargs.get("timeout") or self.seconds
        deadline = time.monotonic() + seconds
        reply = super().send(request, *args, **kwargs)
        # requests counts its limit anew for every piece that arrives, so that a trickle could go on for ever
        reply.raw.stream = functools.partial(pieces_until, deadline, reply.raw)
        return reply


def pieces_until(
    deadline: float, body: HTTPResponse, amt: int = 2**16, decode_content: bool | None = None
) -> Iterator[bytes]:
    """`body.stream`, by what has arrived and not by whole chunks.

    Raises:
        ReadTimeout: where `deadline` (of `time.monotonic`) passes before the end.
    """
    while piece := body.read1(amt, decode_content):
        yield piece
        if time.monotonic() > deadline:
            body.close()
            raise requests.ReadTimeout("the reply did not arrive whole in time")


def limit_every_wait(session: requests.Session, seconds: float) -> None:
    for scheme in ("http://", "https://"):
        session.mount(scheme, TimeoutAdapter(seconds))


def authorization(token: str | None = None) -> dict[str, str]:
    """The header that servers started by `launch/serve_rollouts.py` ask for; the token is read from the environment."""
    token = token or os.environ.get(TOKEN_VARIABLE)
    return {"Authorization": f"Bearer {token}"} if token else {}


class HttpTransport:
    """One server.

    Args:
        base_url: e.g. `http://127.0.0.1:8000`.
        payload_transport: "file" (shared memory), "inline", or "auto": a file where the server is on this host.
        timeout: seconds that any single call may take.
    """

    lease_seconds = 30.0

    def __init__(self, base_url: str, payload_transport: str = "auto", timeout: float = 120.0) -> None:
        self.address = base_url.rstrip("/")
        self.timeout = timeout
        local = urlparse(self.address).hostname in LOOPBACK
        self.payload_transport = ("file" if local else "inline") if payload_transport == "auto" else payload_transport
        self.session = requests.Session()
        self.session.headers.update(authorization())
        limit_every_wait(self.session, timeout)

    def request(self, verb: str, path: str, timeout: float | None = None, **options: Any) -> Any:
        """The JSON of a reply.

        Raises:
            EngineLostError: where nobody answers in time, or the engine behind the server is dead (5xx).
            RemoteSyncError: where the server refuses, with its words, or is not vLLM's.
        """
        try:
            reply = self.session.request(verb, f"{self.address}{path}", timeout=timeout or self.timeout, **options)
        except requests.Timeout as error:
            raise EngineLostError(
                f"{self.address}{path} did not answer within {timeout or self.timeout:.0f} s: the server hangs or is "
                "overloaded, or the network is slow; restart it, or raise vllm_server_timeout"
            ) from error
        except requests.RequestException as error:
            reason = type(error).__name__
            raise EngineLostError(f"{self.address} cannot be reached ({reason}); is it running?") from error
        if reply.status_code == requests.codes.unauthorized:
            raise RemoteSyncError(f"{self.address} wants another token; set {TOKEN_VARIABLE} to the server's")
        if reply.status_code == requests.codes.not_found:
            raise RemoteSyncError(
                f"{self.address} has no {path}: start it with launch/serve_rollouts.py, or with VLLM_SERVER_DEV_MODE=1"
            )
        if reply.status_code >= requests.codes.server_error:
            raise EngineLostError(f"{self.address}{path} failed with {reply.status_code}: {reply.text[:500]}")
        if not reply.ok:
            raise RemoteSyncError(f"{self.address}{path} failed with {reply.status_code}: {reply.text[:500]}")
        try:
            return reply.json() if reply.content else {}
        except ValueError as error:
            raise RemoteSyncError(f"{self.address}{path} {NOT_OURS}: {reply.text[:200]!r}") from error

    def call(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        answer = self.request("POST", "/collective_rpc", json={"method": method, "kwargs": arguments})
        replies = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(replies, list):
            raise RemoteSyncError(f"{self.address}/collective_rpc {NOT_OURS}: {answer!r:.200}")
        if not all(isinstance(reply, dict) for reply in replies):
            raise RemoteSyncError(f"{self.address}: {method} replied {replies!r:.200}")
        return replies

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """What the server serves in; asked once, since its supervisor starts it again with the same settings."""
        info = self.request("GET", "/server_info", params={"config_format": "json"})["vllm_config"]
        return getattr(torch, str(info["model_config"]["dtype"]).removeprefix("torch."))

    def pause(self) -> None:
        self.request("POST", "/pause", params={"mode": "keep", "clear_cache": "true"})

    def resume(self) -> None:
        """Go on; what was cached from the weights before is dropped once more, and the server must say so."""
        if not self.request("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"}).get("success"):
            raise RemoteSyncError(f"{self.address} could not drop its prefix cache; it would serve old keys and values")
        self.request("POST", "/resume")

    def stamp(self, version: int) -> None:
        self.request("POST", "/update_weight_version", json={"new_version": str(version)})

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(len(token_ids) - 1,) in nats; a salt of its own keeps the request off every cached prefix."""
        body = {
            "model": self.request("GET", "/v1/models")["data"][0]["id"],
            "prompt": list(token_ids), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0,
            "cache_salt": secrets.token_hex(8),
        }  # fmt: skip
        [choice] = self.request("POST", "/v1/completions", json=body)["choices"]
        entries = zip(choice["prompt_logprobs"][1:], token_ids[1:], strict=True)
        return torch.tensor([entry[str(token)]["logprob"] if entry else math.nan for entry, token in entries])

    def wait_until_up(self, timeout: float) -> None:
        """Wait for a server that starts or restarts.

        Raises:
            EngineLostError: where it is not up within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.request("GET", "/health", timeout=5.0)
                return
            except (EngineLostError, RemoteSyncError) as error:
                if time.monotonic() > deadline:
                    raise EngineLostError(f"{self.address} was not up within {timeout:.0f} s: {error}") from error
            time.sleep(0.5)
