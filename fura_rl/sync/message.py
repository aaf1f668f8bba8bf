"""One version of the policy on its way to engines in other processes, encoded while it is sent, kept to be resent."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator

import torch

from fura_rl.sync import payload
from fura_rl.sync.engine import Update
from fura_rl.sync.transport import NotKeptError

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**30  # a version up to this size is kept, to be sent to an engine that was restarted


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


def message_of(update: Update, engine_dtype: torch.dtype, receivers: int = 1) -> Message:
    encode, encode_sent_before = (
        functools.partial(payload.encode, factors, engine_dtype) for factors in (update.factors, update.sent_before)
    )
    return Message(update.version, encode, update.rounding_seed, update.read_once, receivers, encode_sent_before)


@contextlib.contextmanager
def settled(message: Message) -> Iterator[Message]:
    """`message`, settled afterwards: after a failure too, since other processes may wait to gather along."""
    with finally_doing(message.settle, "the rest of the policy could not be read"):
        yield message


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
