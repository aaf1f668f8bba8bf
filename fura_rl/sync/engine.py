"""What the weight sync needs of a rollout engine, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fura_rl.sync.audit import KernelReply
from fura_rl.sync.factors import Factors, Read, Span
from fura_rl.sync.fingerprint import Sample
from fura_rl.sync.stacks import Stacks


class LazyFactors(Mapping[str, Factors]):
    """Checkpoint tensor -> its factors, made when asked for, so that not all of a model's are alive."""

    def __init__(self, makers: Mapping[str, Callable[[], Factors]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Factors:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


@dataclass(frozen=True)
class Update:
    """One version of the policy for an engine.

    `factors` holds every weight that training can change, relative to the pristine base, so that an engine comes to
    `version` from whatever state it is in.  `read(name)` reads the trainer's own base weight.  `rounding_seed` draws
    the stochastic rounding of this version, None rounds to nearest.  `read_once`: the policy is in pieces, whose other
    processes gather along in every weight of `factors`, once.  `sent_before` holds, for an engine that was started
    again, what never moves and is not in its checkpoint either; it can be read at any time, and gathers nothing.
    """

    version: int
    previous: int
    factors: Mapping[str, Factors]
    read: Callable[[str], Read]
    rounding_seed: int | None = None
    read_once: bool = False
    sent_before: Mapping[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True)
class Push:
    """What bringing an engine to a version took."""

    payload_bytes: int  # what crossed to the engine; in process, what was written
    phases: dict[str, float]  # seconds by phase


class RolloutEngine(Protocol):
    """A running engine that serves the policy, in this process or behind a server."""

    @property
    def dtype(self) -> torch.dtype:
        """What weights are served in."""

    @property
    def reads_the_trainers_base(self) -> bool:
        """Whether it folds from the trainer's base weights; otherwise it reads its own checkpoint."""

    @property
    def version(self) -> int:
        """Of the policy that it was last brought to; 0 before the first."""

    def prepare(
        self, tensors: Mapping[str, tuple[int, ...]], stacks: Stacks, base_samples: Mapping[str, Sample]
    ) -> None:
        """Learn where the policy's tensors (name -> shape) go, of which a checkpoint has `stacks` expert by expert;
        `base_samples` must fit the engine's own base."""

    def push(self, update: Update) -> Push:
        """Bring the engine to `update.version` and drop every cached key and value."""

    def resend(self) -> None:
        """Bring the engine to the last version once more, from wherever it is."""

    def kernel_replies(self, spans: Mapping[str, Sequence[Span]]) -> list[dict[str, KernelReply]]:
        """See `audit.Kernels`."""

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(len(token_ids) - 1,) log-probs of each token given those before it, in nats, at temperature 1."""


def rounding_generator(seed: int | None, name: str, device: torch.device) -> torch.Generator | None:
    """The draw of one tensor's stochastic rounding: the same wherever it is folded."""
    if seed is None:
        return None
    mixed = seed
    for byte in name.encode():  # FNV-1a: Python's own hash of a string differs from process to process
        mixed = ((mixed ^ byte) * 0x100000001B3) % 2**63
    return torch.Generator(device).manual_seed(mixed)
