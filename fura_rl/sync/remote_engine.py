"""An engine in another process: the trainer's side of stage, validate, commit.

One engine has one or more workers (tensor parallelism), reached through a `Transport`: HTTP to a server, or vLLM's own
calls to an engine process.  Staging happens while the engine generates; it is paused only around the commit.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from fura_rl.sync import payload, probe
from fura_rl.sync.audit import VECTORS, KernelReply
from fura_rl.sync.engine import Push, Update
from fura_rl.sync.factors import Span
from fura_rl.sync.fingerprint import Sample
from fura_rl.sync.payload_source import offered

logger = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
KEPT_BYTES = 2**30  # a version up to this size is kept, to be sent to an engine that was restarted


class RemoteSyncError(RuntimeError):
    """An engine refused an update, or its workers disagree."""


class OwnedByAnotherError(RemoteSyncError):
    """The engine belongs to another trainer, whose lease runs."""


class EngineLostError(RuntimeError):
    """The engine was restarted or cannot be reached; it can be claimed and synced again."""


class NotKeptError(EngineLostError):
    """The last version was too large to be kept, so that an engine cannot be brought back to it."""


class Transport(Protocol):
    """How to reach one engine."""

    payload_transport: str  # "file" or "inline"
    address: str  # for messages
    lease_seconds: float
    timeout: float  # seconds that one call may take, and that a lost engine has to come back

    @property
    def dtype(self) -> torch.dtype: ...

    def call(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        """A method of the worker extension on every worker.  Raises EngineLostError where nobody answers."""

    def pause(self) -> None:
        """Stop stepping, drop every cached key and value; requests in flight are kept."""

    def resume(self) -> None: ...

    def stamp(self, version: int) -> None:
        """Note the version where clients of the engine can see it."""

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor: ...

    def wait_until_up(self, timeout: float) -> None: ...


class Message:
    """One version, encoded while it is sent, so that a chunk is given up before the next is made.

    A version of up to KEPT_BYTES is kept beside, to be sent again at any time.  A larger one is encoded anew where it
    is sent again while its policy stands still, which it does until `settle`.

    Args:
        version: of the policy.
        encode: makes the chunks from the policy as it is now.
        rounding_seed, read_once: see `engine.Update`.
        receivers: how many engines it is for.
        encode_sent_before: makes the chunks that an engine without any version needs first.  They are made anew each
            time instead of kept, since a 16-bit copy of a quantized policy is several times its size.
    """

    def __init__(
        self,
        version: int,
        encode: Callable[[], Iterator[payload.Chunk]],
        rounding_seed: int | None,
        read_once: bool = False,
        receivers: int = 1,
        encode_sent_before: Callable[[], Iterator[payload.Chunk]] = lambda: iter(()),
    ) -> None:
        self.version, self.rounding_seed = version, rounding_seed
        self.encode_sent_before = encode_sent_before
        self._read_once = read_once
        self._keeps_all = receivers > 1 and read_once  # until every engine has it
        self.nbytes = 0  # of all chunks; known when they have been sent
        self.encode_seconds = 0.0
        self.kept: list[payload.Chunk] | None = []  # what has been encoded; None where it is too much
        self._encoded_bytes = 0
        self._encode: Callable[[], Iterator[payload.Chunk]] | None = encode
        self._rest: Iterator[payload.Chunk] | None = encode()  # what has not been encoded; None at the end

    @property
    def can_be_sent(self) -> bool:
        return self.kept is not None or self._encode is not None

    def refuse_unless_kept(self, address: str) -> None:
        """Raises NotKeptError where it can no longer be sent to the engine at `address`."""
        if not self.can_be_sent:
            raise NotKeptError(
                f"version {self.version} cannot be sent to {address} again, since whole weights of more than "
                f"{KEPT_BYTES / 2**30:g} GiB are not kept (resume from the last checkpoint)"
            )

    def chunks(self) -> Iterator[payload.Chunk]:
        """All chunks in order; holds none that is not kept."""
        if self.kept is None:
            again = self._encode()
            while piece := self._next_of(again):
                yield piece.pop()
            return
        position = 0
        while self.kept is not None and position < len(self.kept):
            yield self.kept[position]
            position += 1
        while piece := self._encode_next():
            yield piece.pop()

    def settle(self) -> None:
        """Before the policy moves: from now on only what is kept can be sent again.

        What a failure has left unencoded is encoded now where it may be kept, and where other processes gather along,
        which wait for their counterpart in every weight.
        """
        while self._rest is not None and (self.kept is not None or self._read_once):
            self._encode_next()
        self._encode = self._rest = None
        if self._encoded_bytes > KEPT_BYTES:
            self.kept = None

    def _encode_next(self) -> list[payload.Chunk]:
        """The next chunk, encoded for the first time, in a list to be emptied: a name would hold it on."""
        if self._rest is None:
            return []
        try:
            piece = self._next_of(self._rest)
        except BaseException:  # a Ctrl-C too: what was cut short must not pass for the whole
            self.kept = self._encode = self._rest = None
            raise
        if not piece:
            self._rest = None
            return []
        self._encoded_bytes += len(piece[0].data)
        if self._encoded_bytes > KEPT_BYTES and not self._keeps_all:
            self.kept = None
            if self._read_once:
                self._encode = None
        elif self.kept is not None:
            self.kept.append(piece[0])
        return piece

    def _next_of(self, chunks: Iterator[payload.Chunk]) -> list[payload.Chunk]:
        started = time.perf_counter()
        piece = list(itertools.islice(chunks, 1))
        self.encode_seconds += time.perf_counter() - started
        return piece


@contextlib.contextmanager
def finally_doing(last: Callable[[], None], failure: str) -> Iterator[None]:
    """`last()` afterwards, after a failure too; that failure is what is raised, whatever goes wrong in `last`, which is
    logged as `failure`."""
    try:
        yield
    except BaseException as first:
        try:
            last()
        except Exception as error:
            logger.warning("after %r %s: %r", first, failure, error)
        raise
    last()


@contextlib.contextmanager
def settled(message: Message) -> Iterator[Message]:
    """`message`, settled afterwards: after a failure too, since other processes may wait to gather along."""
    with finally_doing(message.settle, "the rest of the policy could not be read"):
        yield message


def message_of(update: Update, engine_dtype: torch.dtype, receivers: int = 1) -> Message:
    encode, encode_sent_before = (
        functools.partial(payload.encode, factors, engine_dtype) for factors in (update.factors, update.sent_before)
    )
    return Message(update.version, encode, update.rounding_seed, update.read_once, receivers, encode_sent_before)


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

    def prepare(self, tensors: Mapping[str, tuple[int, ...]], base_samples: Mapping[str, Sample]) -> None:
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
                place = {"previous": previous, "index": count, "crc32": chunk.crc32, "source": source}
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

    def prepare(self, tensors: Mapping[str, tuple[int, ...]], base_samples: Mapping[str, Sample]) -> None:
        for engine in self.engines:
            engine.prepare(tensors, base_samples)

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


class Follower:
    """The engine as the other processes of a distributed trainer see it: they gather along and send nothing."""

    reads_the_trainers_base = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.version = 0

    def prepare(self, tensors: Mapping[str, tuple[int, ...]], base_samples: Mapping[str, Sample]) -> None:
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
