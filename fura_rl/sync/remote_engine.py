"""An engine in another process: the trainer's side of stage, validate, commit.

One engine has one or more workers (tensor parallelism), reached through a `Transport`: HTTP to a server, or vLLM's own
calls to an engine process.  Staging happens while the engine generates; it is paused only around the commit.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fura_rl.sync.audit import VECTORS, KernelReply
from fura_rl.sync.engine import Push, Update
from fura_rl.sync.factors import Span
from fura_rl.sync.fingerprint import Sample
from fura_rl.sync.message import Message, finally_doing, message_of, settled
from fura_rl.sync.payload_source import offered
from fura_rl.sync.stacks import Stacks
from fura_rl.sync.transport import EngineLostError, OwnedByAnotherError, RemoteSyncError, Transport

logger = logging.getLogger(__name__)


class RemoteEngine:
    """A running engine elsewhere that folds from its own checkpoint."""

    reads_the_trainers_base = False

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._claim: dict[str, Any] = {}
        self._pids: list[int] = []
        self._heartbeat: Heartbeat | None = None
        self._last = Message(0, lambda: iter(()), None)
        self._paused = False  # by this trainer, and not known to go on

    @property
    def dtype(self) -> torch.dtype:
        return self.transport.dtype

    @property
    def version(self) -> int:
        return self._last.version

    def prepare(
        self, tensors: Mapping[str, tuple[int, ...]], stacks: Stacks, base_samples: Mapping[str, Sample]
    ) -> None:
        """Claim the engine for this trainer and check its base.

        The lease of a trainer that was killed is waited for, so that a run can be started again at once; one that
        lives renews it meanwhile.

        Raises:
            OwnedByAnotherError: where another trainer holds it.
            RemoteSyncError: where its base weights are not the trainer's.
        """
        self._claim = {
            "owner": self.owner,
            "lease_seconds": self.transport.lease_seconds,
            "tensors": {name: list(shape) for name, shape in tensors.items()},
            "stacks": {name: list(patterns) for name, patterns in stacks.items()},
            "base_samples": dict(base_samples),
        }
        lease = self.transport.lease_seconds
        deadline = time.monotonic() + (lease if lease < float("inf") else 0.0)
        for attempt in itertools.count():
            try:
                self.claim()
                return
            except OwnedByAnotherError as error:
                if time.monotonic() > deadline:
                    raise
                if attempt == 0:
                    logger.warning("%s; waiting %.0f s, in case that trainer was killed", error, lease)
                time.sleep(0.5)

    def claim(self) -> None:
        """Claim again what `prepare` has claimed: for an engine that was restarted."""
        self._pids = []
        replies = self._checked("fura_claim", info=self._claim)
        self._pids = [reply["pid"] for reply in replies]
        if self._heartbeat is None and self.transport.lease_seconds < float("inf"):
            self._heartbeat = Heartbeat(self.renew, self.transport.lease_seconds / 3)

    def renew(self) -> None:
        self.transport.call("fura_renew", owner=self.owner)

    def close(self) -> None:
        """Give the engine back at once instead of at the end of the lease, and do not leave it paused.

        One that cannot be resumed is left to its lease, at whose end `launch/serve_rollouts.py` resumes it.
        """
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        if self._paused:
            with contextlib.suppress(EngineLostError, RemoteSyncError):
                self._resume()
        if self._claim and not self._paused:
            self.transport.call("fura_release", owner=self.owner)

    def serves_last(self) -> bool:
        """Whether every worker is the process that was claimed, answers, and holds the last version, unharmed.

        An engine that is paused does not: what it is asked for would wait until it goes on.
        """
        if self._paused:
            return False
        try:
            replies = self.transport.call("fura_status")
        except EngineLostError:
            return False
        return [r["pid"] for r in replies] == self._pids and all(
            (r["version"], r["owner"], r["poisoned"]) == (self._last.version, self.owner, None) for r in replies
        )

    def restore(self, timeout: float) -> dict[str, float]:
        """Bring an engine that was lost, restarted or changed back to the last version; waits for it to be up.  Before
        the first push there is none, and it is only claimed.

        Returns the seconds by phase of the delivery that arrived.

        Raises:
            EngineLostError: where it is not up in time.
            NotKeptError: where the last version was too large to be kept.
            RemoteSyncError: where what came up is not the engine that was lost: another base, another trainer's.
        """
        deadline = time.monotonic() + timeout
        while True:
            self.transport.wait_until_up(max(0.0, deadline - time.monotonic()))
            try:
                self.claim()
                return self._deliver_last()
            except EngineLostError:  # a dying server answers /health for a moment
                if not self._last.can_be_sent or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def resend(self) -> None:
        """Stage and commit the last version once more.  An engine lost meanwhile is waited for.

        Raises:
            NotKeptError: where it was too large to be kept.
        """
        self._last.refuse_unless_kept(self.transport.address)
        self._deliver_once(self._last)

    def _deliver_last(self) -> dict[str, float]:
        """To an engine that starts from nothing but its checkpoint."""
        if not self._last.version:  # nothing was ever sent: the next push is the first
            if self._paused:
                self._resume()
            return {}
        self._last.refuse_unless_kept(self.transport.address)
        return self._deliver(self._last, from_nothing=True)

    def push(self, update: Update) -> Push:
        """Stage while the engine generates, pause, commit, resume.  An engine lost meanwhile is waited for.

        Raises:
            RemoteSyncError: with what the engine refused; its weights are those of before.
            EngineLostError: where the engine is gone and does not come back in time.
        """
        with settled(message_of(update, self.dtype)) as message:
            return self.send(message)

    def send(self, message: Message) -> Push:
        """`push` of a message that is settled by whoever made it."""
        before, self._last = self._last, message
        encoded = message.encode_seconds
        try:
            phases = self._deliver_once(message)
        except EngineLostError:
            raise
        except Exception:
            self._last = before
            raise
        return Push(message.nbytes, {"fold": message.encode_seconds - encoded, **phases})

    def _deliver_once(self, message: Message) -> dict[str, float]:
        """`_deliver` of the last version, or the restoring of an engine lost meanwhile, which delivers the same."""
        try:
            return self._deliver(message)
        except EngineLostError as lost:
            return self._recover(lost)

    def _of_last(self, ask: Callable[[], Any]) -> Any:
        """`ask()`, answered by the last version; once more where the engine was lost and came back with it.

        Raises:
            EngineLostError: where it is lost again, or does not come back in time.
        """

        def answer() -> Any:
            found = ask()
            # what was started again meanwhile answers, too, with other weights or nothing
            if self._last.version and not self.serves_last():
                raise EngineLostError(f"{self.transport.address} does not serve version {self._last.version} any more")
            return found

        try:
            return answer()
        except EngineLostError as lost:
            self._recover(lost)
            return answer()

    def _recover(self, lost: EngineLostError) -> dict[str, float]:
        logger.warning("%s; waiting for it to come back", lost)
        return self.restore(self.transport.timeout)

    def _deliver(self, message: Message, from_nothing: bool = False) -> dict[str, float]:
        """Stage one chunk after another, then commit; seconds by phase, without those of the encoding.

        An engine that starts `from_nothing` but its checkpoint gets with it what was sent before, whose encoding counts
        as staging.
        """
        clock, encoded = [time.perf_counter()], message.encode_seconds
        serves = {reply["version"] for reply in self._checked("fura_status")}
        # workers that a failed commit has left at different versions follow none; one and the same fold mends them
        previous = serves.pop() if len(serves) == 1 else None
        stamp = {"owner": self.owner, "version": message.version}
        count = nbytes = 0
        for chunk in itertools.chain(message.encode_sent_before() if from_nothing else (), message.chunks()):
            with offered(chunk.data, self.transport.payload_transport) as source:
                place = {"previous": previous, "index": count, "checksum": chunk.checksum, "source": source}
                self._checked("fura_update", info=stamp | place)
            count, nbytes = count + 1, nbytes + len(chunk.data)
            del chunk, source, place  # before the next is encoded
        message.nbytes = nbytes
        clock.append(time.perf_counter())
        self._commit(stamp | {"commit": True, "chunk_count": count, "rounding_seed": message.rounding_seed})
        clock.append(time.perf_counter())
        stage, commit = (after - before for before, after in itertools.pairwise(clock))
        return {"stage": stage - (message.encode_seconds - encoded), "commit": commit}

    def _commit(self, info: dict[str, Any]) -> None:
        """Commit between two steps of the engine; workers that disagree afterwards are made to refuse to generate."""
        self._paused = True
        self.transport.pause()
        with finally_doing(self._resume, f"{self.transport.address} could not be resumed"):
            replies = self.transport.call("fura_update", info=info)
            failed = [reply for reply in replies if reply["error"]]
            if failed and len(failed) < len(replies):
                self.transport.call("fura_poison", reason=f"a worker could not commit: {failed[0]['error']}")
        if failed:
            raise RemoteSyncError(f"{self.transport.address}: {failed[0]['error']}")
        self.transport.stamp(info["version"])

    def _resume(self) -> None:
        self.transport.resume()
        self._paused = False

    def kernel_replies(self, spans: Mapping[str, Sequence[Span]]) -> list[dict[str, KernelReply]]:
        if not spans:
            return []
        wanted = {name: [list(s) for s in part] for name, part in spans.items()}
        replies = self._of_last(lambda: self.transport.call("fura_replies", spans=wanted))
        return [
            {
                name: KernelReply(unpack(output).reshape(VECTORS, -1), unpack(covered), eps)
                for name, (output, covered, eps) in worker.items()
            }
            for worker in replies
        ]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._of_last(lambda: self.transport.prompt_logprobs(token_ids))

    def _checked(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        replies = self.transport.call(method, **arguments)
        if failed := [reply for reply in replies if reply["error"]]:
            if self._pids and [reply["pid"] for reply in replies] != self._pids:
                raise EngineLostError(f"{self.transport.address} was restarted: {failed[0]['error']}")
            owned = failed[0].get("kind") == "OwnershipError"
            raise (OwnedByAnotherError if owned else RemoteSyncError)(f"{self.transport.address}: {failed[0]['error']}")
        return replies


class Follower:
    """The engine as the other processes of a distributed trainer see it: they gather along and send nothing."""

    reads_the_trainers_base = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.version = 0

    def prepare(
        self, tensors: Mapping[str, tuple[int, ...]], stacks: Stacks, base_samples: Mapping[str, Sample]
    ) -> None:
        pass

    def push(self, update: Update) -> Push:
        for name in update.factors:
            update.factors[name]
        self.version = update.version
        return Push(0, {})

    def resend(self) -> None:
        pass


class Heartbeat:
    """Renews a lease from a thread of its own, so that a trainer busy with a long step keeps its engine."""

    def __init__(self, renew: Callable[[], None], every_seconds: float) -> None:
        self._renew, self._every = renew, every_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fura-sync-lease", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            try:
                self._renew()
            except (EngineLostError, RemoteSyncError):
                continue  # the next sync or rollout finds out and says so

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=5)


def unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
