"""Several engines that serve one policy."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch

from fura_rl.sync import probe
from fura_rl.sync.audit import KernelReply
from fura_rl.sync.engine import Push, Update
from fura_rl.sync.factors import Span
from fura_rl.sync.fingerprint import Sample
from fura_rl.sync.message import message_of, settled
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.stacks import Stacks


class Replicas:
    """Several engines that serve the same policy: every sync reaches all of them, or fails."""

    reads_the_trainers_base = False

    def __init__(self, engines: Sequence[RemoteEngine]) -> None:
        self.engines = list(engines)
        if len({engine.dtype for engine in engines}) > 1:
            raise ValueError("all replicas must serve in one dtype; start them with the same --dtype")

    @property
    def dtype(self) -> torch.dtype:
        return self.engines[0].dtype

    @property
    def version(self) -> int:
        return min(engine.version for engine in self.engines)

    def prepare(
        self, tensors: Mapping[str, tuple[int, ...]], stacks: Stacks, base_samples: Mapping[str, Sample]
    ) -> None:
        for engine in self.engines:
            engine.prepare(tensors, stacks, base_samples)

    def push(self, update: Update) -> Push:
        """As `RemoteEngine.push`, one replica after another, all from one message: the other processes of a policy in
        pieces gather along once."""
        with settled(message_of(update, self.dtype, receivers=len(self.engines))) as message:
            pushes = [engine.send(message) for engine in self.engines]
        phases = {phase: sum(push.phases[phase] for push in pushes) for phase in pushes[0].phases}
        return Push(sum(push.payload_bytes for push in pushes), phases)

    def kernel_replies(self, spans: Mapping[str, Sequence[Span]]) -> list[dict[str, KernelReply]]:
        return [worker for engine in self.engines for worker in engine.kernel_replies(spans)]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of the first replica, once all agree.

        Raises:
            StaleEngineError: where replicas score the same tokens differently.
        """
        scores = [engine.prompt_logprobs(token_ids) for engine in self.engines]
        gaps = [probe.max_gap(scores[0], score) for score in scores]
        if max(gaps) > probe.default_tolerance(self.dtype):
            address = self.engines[gaps.index(max(gaps))].transport.address
            raise probe.StaleEngineError(f"replica {address} differs from the first by {max(gaps):.4g} nats")
        return scores[0]

    def serves_last(self) -> bool:
        return all(engine.serves_last() for engine in self.engines)

    def restore(self, timeout: float) -> None:
        for engine in self.engines:
            if not engine.serves_last():
                engine.restore(timeout)

    def resend(self) -> None:
        for engine in self.engines:
            engine.resend()

    def close(self) -> None:
        """Give every replica back, those after a dead one too, and then raise its error."""
        with contextlib.ExitStack() as stack:
            for engine in self.engines:
                stack.callback(engine.close)
