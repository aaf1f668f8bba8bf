"""TRL's vLLM client with what a long run needs: a token, a limit on every wait, replicas, and rollouts of one version.

TRL's own synchronises weights over NCCL and waits without limit.  This one leaves the weights to `fura_rl.sync`, asks
before and after every batch whether the server still holds the version that was synced, brings a restarted server
back to it, and asks for the whole batch again: no group is trained on that was half sampled from other weights.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import requests
from trl.generation.vllm_client import VLLMClient

from fura_rl.sync.http_transport import MAX_REQUESTS, HttpTransport, authorization, limit_every_wait
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.replicas import Replicas
from fura_rl.sync.transport import EngineLostError, RemoteSyncError

logger = logging.getLogger(__name__)

ATTEMPTS = 3


class SingleClient(VLLMClient):
    """TRL's client of one server, with our token and time limit; its weight synchronisation is not used."""

    def __init__(self, base_url: str, connection_timeout: float) -> None:
        self.timeout = connection_timeout
        super().__init__(base_url=base_url, connection_timeout=connection_timeout)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 0.5) -> None:
        self.session.headers.update(authorization())
        limit_every_wait(self.session, self.timeout)
        transport = HttpTransport(self.base_url)
        transport.wait_until_up(total_timeout)
        transport.request("GET", "/v1/models")  # a wrong token is told as such, before TRL asks

    @contextlib.contextmanager
    def asked_for(self, count: int, max_tokens: int, longest: int = 0) -> Iterator[None]:
        """Around a request for `count` completions of prompts of up to `longest` tokens (0: not known); what goes wrong
        is said with its mend.

        Raises:
            EngineLostError: where they are not here in time, or the engine behind the server is dead (5xx).
            RemoteSyncError: where the server refuses.
        """
        try:
            yield
        except requests.Timeout as error:
            raise EngineLostError(
                f"{self.base_url} did not send {count} completions of up to {max_tokens} tokens in time, "
                f"within vllm_server_timeout={self.timeout:g} s: if it was still at work, raise vllm_server_timeout, "
                "ask for fewer or shorter completions, or add a server; if it hangs, restart it"
            ) from error
        except (requests.RequestException, EngineLostError):
            raise
        except Exception as error:  # TRL raises a bare Exception for every status but 200
            if str(error).startswith("Request failed: 5"):
                raise EngineLostError(f"{self.base_url}: {error}"[:500]) from error
            if isinstance(error, RemoteSyncError) or str(error).startswith("Request failed: "):
                raise self._refusal(longest, max_tokens, f"{error}"[:500]) from error
            raise

    def _refusal(self, prompt_length: int, max_tokens: int, words: str) -> RemoteSyncError:
        """Why the server refused: too long for it, or else in its own words."""
        limit = HttpTransport(self.base_url).request("GET", "/v1/models")["data"][0]["max_model_len"]
        needed = prompt_length + max_tokens
        if needed <= limit or not prompt_length:
            return RemoteSyncError(f"{self.base_url} refused to sample: {words}")
        return RemoteSyncError(
            f"a prompt of {prompt_length} tokens with max_completion_length={max_tokens} needs {needed}, but "
            f"{self.base_url} takes {limit}: start it with --max-model-len {needed} or more, lower "
            "max_completion_length, or leave out the longest prompts"
        )


class RolloutClient:
    """What TRL's `VLLMGeneration` and rollout functions want of a client, over one server or several replicas.

    Args:
        base_url: the server's address, or several with commas between.
        connection_timeout: seconds to wait for a server that starts, and for any one answer.
        payload_transport: "auto", "file" or "inline": how weights are sent.
    """

    def __init__(self, base_url: str, connection_timeout: float, payload_transport: str = "auto") -> None:
        self.timeout = connection_timeout
        addresses = [address.strip() for address in base_url.split(",") if address.strip()]
        self.clients = [SingleClient(address, connection_timeout) for address in addresses]
        engines = [
            RemoteEngine(HttpTransport(client.base_url, payload_transport, connection_timeout))
            for client in self.clients
        ]
        self.engine = engines[0] if len(engines) == 1 else Replicas(engines)
        self.resampled_batches = 0
        self._seed: int | None = None
        atexit.register(self.close)

    def close(self) -> None:
        """Give the servers back, so that another trainer need not wait for the lease to end."""
        with contextlib.suppress(EngineLostError, RemoteSyncError):
            self.engine.close()

    def init_communicator(self, device: Any = None) -> None:
        """Nothing to open: the weight sync claims the servers itself."""

    def reset_prefix_cache(self) -> None:
        """Done with every sync."""

    def get_server_info(self) -> dict[str, Any]:
        """vLLM's settings of the first server: TRL looks at its logprobs mode before it corrects for sampling."""
        return self.clients[0].get_server_info()

    def image_features(self, images: list[list | None], **kwargs: Any) -> list[dict | None]:
        return self.clients[0].image_features(images, **kwargs)

    @contextlib.contextmanager
    def drawing_from(self, seed: int) -> Iterator[None]:
        """Completions asked for inside are a function of `seed`, the weights and the prompts, and not of the server's
        past: each prompt is asked for with a seed of its own, which vLLM counts up over its completions."""
        self._seed = seed
        try:
            yield
        finally:
            self._seed = None

    def generate(
        self, prompts: list[list[int]], features: list[dict | None] | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Completions of all prompts from the one version that was synced last, empty ones of a prompt without a token;
        raises as `of_one_version`."""
        asked = [i for i, prompt in enumerate(prompts) if prompt]
        theirs = None if features is None else [features[i] for i in asked]
        output = self.of_one_version(lambda: self._sample([prompts[i] for i in asked], theirs, settings))
        if len(asked) == len(prompts):
            return output
        return {key: spread(part, asked, len(prompts)) for key, part in output.items()}

    def chat(self, messages: list[list[dict]], **settings: Any) -> dict[str, Any]:
        """`generate` for conversations, whose prompts the server makes; settings as in TRL's `VLLMClient.chat`."""

        def ask(client: SingleClient, share: slice, settings: dict) -> dict[str, Any]:
            with client.asked_for(*size_of(share, settings)):
                return client.chat(messages=messages[share], **settings)

        return self.of_one_version(lambda: self._ask_all(ask, len(messages), settings))

    def of_one_version(self, sample: Callable[[], Any]) -> Any:
        """`sample()`, again and again until all of it comes from the one version that was synced last.

        Raises:
            EngineLostError: where a server is not back within `connection_timeout`, or batch after batch is lost.
            RemoteSyncError: where what came back is another engine: another base model, another trainer's; or where
                a server refuses to sample.
        """
        for attempt in range(1, ATTEMPTS + 1):
            if not self.engine.serves_last():
                self.engine.restore(self.timeout)
            try:
                output = sample()
                if self.engine.serves_last():
                    return output
                reason: Exception | str = "the server was restarted or its weights changed while it sampled"
            except (requests.RequestException, EngineLostError) as error:
                reason = error
            self.resampled_batches += 1
            logger.warning("rollouts lost (%s); asking for the batch again (%d of %d)", reason, attempt, ATTEMPTS)
        raise EngineLostError(f"no batch of rollouts arrived whole in {ATTEMPTS} attempts; the last: {reason}")

    def _calls(self, count: int, settings: dict) -> list[tuple[SingleClient, slice, dict]]:
        """Who is asked for which of `count` prompts with which settings: one request a replica, or one a prompt where
        each has a seed."""
        shares = split(count, len(self.clients))
        if self._seed is None:
            calls = [(client, share, settings) for client, share in zip(self.clients, shares, strict=True)]
            return [call for call in calls if call[1].stop > call[1].start]
        seeds = (np.random.SeedSequence(self._seed).generate_state(count, np.uint64) >> 1).tolist()
        own = settings.get("generation_kwargs") or {}
        return [
            (client, slice(i, i + 1), settings | {"generation_kwargs": own | {"seed": seeds[i]}})
            for client, share in zip(self.clients, shares, strict=True)
            for i in range(share.start, share.stop)
        ]

    def _sample(self, prompts: list[list[int]], features: list[dict | None] | None, settings: dict) -> dict[str, Any]:
        def ask(client: SingleClient, share: slice, settings: dict) -> dict[str, Any]:
            part = None if features is None else features[share]
            longest = max(map(len, prompts[share]))
            with client.asked_for(*size_of(share, settings), longest):
                return client.generate(prompts=prompts[share], features=part, **settings)

        return self._ask_all(ask, len(prompts), settings)

    def _ask_all(
        self, ask: Callable[[SingleClient, slice, dict], dict[str, Any]], count: int, settings: dict
    ) -> dict[str, Any]:
        """What all servers say that `ask` is put to, each for its share of `count` prompts, in order."""
        calls = self._calls(count, settings)
        with ThreadPoolExecutor(min(len(calls), MAX_REQUESTS)) as pool:
            outputs = list(pool.map(lambda call: ask(*call), calls))
        return {key: joined([output[key] for output in outputs]) for key in outputs[0]}


def size_of(share: slice, settings: dict[str, Any]) -> tuple[int, int]:
    """How many completions are asked for, and of how many tokens at most; 1 and 16 are TRL's defaults."""
    return settings.get("n", 1) * (share.stop - share.start), settings.get("max_tokens", 16)


@dataclass(frozen=True)
class SampledCompletion:
    """One completion, under the names of `vllm.CompletionOutput`."""

    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class SampledPrompt:
    """All completions of one prompt, under the name of `vllm.RequestOutput`."""

    outputs: list[SampledCompletion]


class ServerSampler:
    """A server in the place of `vllm.LLM` where held-out problems are scored.  Its samples do not follow a seed."""

    def __init__(self, client: RolloutClient) -> None:
        self.client = client

    def generate(self, requests: list[dict[str, Any]], params: Any, use_tqdm: bool = False) -> list[SampledPrompt]:
        """Completions of {"prompt_token_ids": ...}, in order; version and errors as in `RolloutClient.generate`."""
        settings = {
            "n": params.n, "temperature": params.temperature, "top_p": params.top_p, "max_tokens": params.max_tokens,
            "stop_token_ids": params.stop_token_ids, "return_token_ids": True,
        }  # fmt: skip
        prompts = [request["prompt_token_ids"] for request in requests]
        choices = self.client.of_one_version(lambda: self._sample(prompts, settings))
        completions = [SampledCompletion(choice["token_ids"], choice["finish_reason"]) for choice in choices]
        return [SampledPrompt(completions[i : i + params.n]) for i in range(0, len(completions), params.n)]

    def _sample(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Split over the replicas, in order."""
        return [
            choice
            for client, share in zip(self.client.clients, split(len(prompts), len(self.client.clients)), strict=True)
            for choice in self._ask(client, prompts[share], settings)
        ]

    def _ask(self, client: SingleClient, prompts: list[list[int]], settings: dict[str, Any]) -> list[dict[str, Any]]:
        if not prompts:
            return []
        body = {"model": client.model, "prompt": prompts, **settings}
        transport = HttpTransport(client.base_url, timeout=self.client.timeout)
        with client.asked_for(settings["n"] * len(prompts), settings["max_tokens"], max(map(len, prompts))):
            return transport.request("POST", "/v1/completions", json=body)["choices"]

    def reset_prefix_cache(self) -> None:
        """Done with every sync."""


def joined(parts: list[Any]) -> Any:
    return None if parts[0] is None else [item for part in parts for item in part]


def spread(part: list[list] | None, places: list[int], count: int) -> list[list] | None:
    """`part` of the prompts at `places` alone, as many entries for each, as that of `count` prompts: [] elsewhere."""
    if part is None:
        return None
    each = len(part) // len(places)
    whole: list[list] = [[] for _ in range(count * each)]
    for i, place in enumerate(places):
        whole[place * each : (place + 1) * each] = part[i * each : (i + 1) * each]
    return whole


def split(count: int, shares: int) -> list[slice]:
    """`count` items in `shares` contiguous slices whose sizes differ by one at most."""
    edges = [count * i // shares for i in range(shares + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def client_factory(payload_transport: str, keep: Callable[[RolloutClient], None]) -> Callable[..., RolloutClient]:
    """What stands in for TRL's `VLLMClient` while TRL builds its generation object."""

    def make(base_url: str, group_port: int = 0, connection_timeout: float = 240.0) -> RolloutClient:
        client = RolloutClient(base_url, connection_timeout, payload_transport)
        keep(client)
        return client

    return make
