"""How to reach an engine in another process, and what can go wrong on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


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
