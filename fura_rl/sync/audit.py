"""The audit of a sync: what every live kernel computes from a few fixed vectors, against the weights it was sent.

A probe of log-probs sees a stale module only where it moves the policy by more than the engine's rounding; this sees
the one module, by name.  The regression of the reply on the update since the last audit,

    gain = <reply - previous, expected - previous> / |expected - previous|^2,

is 1 where the kernel holds the new weight and 0 where it still holds the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

VECTORS = 4  # vectors through every kernel; entries are +1 and -1, which every dtype holds exactly
STALE_BELOW = 0.5
LOST_ABOVE = 2.0  # a kernel that moves by more than twice its update holds something else altogether
# An update smaller than this, relative to the weight, is left to add up until it stands out of the reply's rounding:
# the gain's standard deviation is then at most about a tenth.  The floor is float32's accumulation over long rows.
ROUNDINGS_PER_UPDATE = 2.0
SMALLEST_UPDATE = 1e-5


class Kernels(Protocol):
    """What the audit needs of an engine."""

    @property
    def dtype(self) -> torch.dtype: ...

    def kernel_output(self, module_name: str, x: torch.Tensor) -> torch.Tensor | None:
        """x W^T of the live linear layer, bias left out; None where the engine has no such linear layer."""


@dataclass
class KernelAudit:
    """Expected replies of every adapted linear layer, from sync to sync.

    Holds VECTORS numbers an output feature and no weight.
    """

    _previous: dict[str, torch.Tensor] = field(default_factory=dict)  # what the engine is known to compute
    _expected: dict[str, torch.Tensor] = field(default_factory=dict)  # what it should compute after this sync
    _owners: dict[str, str] = field(default_factory=dict)  # module -> the engine's module that holds it
    _rows: dict[str, tuple[int, int]] = field(default_factory=dict)  # output features of a module within its owner
    _features: dict[str, int] = field(default_factory=dict)  # input features

    def expect(
        self, name: str, delivered: torch.Tensor, base: torch.Tensor | None, owner: str, rows: tuple[int, int]
    ) -> None:
        """Note what layer `name` must compute once it holds `delivered` (out, in).

        `base` (out, in) is the weight the engine started from, needed the first time; without it the first sync of a
        layer cannot be audited.  `rows` are the layer's output features within `owner`, the engine's layer.
        """
        x = probe_vectors(delivered.shape[1], delivered.device)
        self._expected[name] = expected = product(delivered, x)
        if name not in self._previous:
            self._previous[name] = expected if base is None else product(base.to(delivered.dtype), x)
        self._owners[name], self._rows[name], self._features[name] = owner, rows, delivered.shape[1]

    def knows(self, name: str) -> bool:
        return name in self._previous

    def gains(self, engine: Kernels) -> dict[str, float]:
        """The gain of every layer whose update is large enough to be seen through the engine's rounding."""
        due = dict(self._due(torch.finfo(engine.dtype).eps))
        replies: dict[str, torch.Tensor | None] = {}
        gains = {}
        for name, update in due.items():
            owner, (start, stop) = self._owners[name], self._rows[name]
            if owner not in replies:
                replies[owner] = engine.kernel_output(owner, probe_vectors(self._features[name], update.device))
            reply = replies[owner]
            if reply is None:
                continue
            moved = reply[:, start:stop].to(update.device, torch.float64) - self._previous[name]
            gains[name] = float((moved * update).sum() / update.square().sum())
        return gains

    def accept(self, gains: dict[str, float]) -> None:
        """The layers of `gains` are proved: the next update is counted from here."""
        for name in gains:
            self._previous[name] = self._expected[name]

    def _due(self, eps: float) -> Iterator[tuple[str, torch.Tensor]]:
        for name, expected in self._expected.items():
            update = expected - self._previous[name]
            visible = max(ROUNDINGS_PER_UPDATE * eps / math.sqrt(expected.numel()), SMALLEST_UPDATE)
            if update.norm() > visible * expected.norm():
                yield name, update


def stale_modules(gains: dict[str, float]) -> list[str]:
    """The layers whose kernel does not hold the weight it was sent; a gain that is not a number counts."""
    return [name for name, gain in gains.items() if not STALE_BELOW <= gain <= LOST_ABOVE]


def probe_vectors(features: int, device: torch.device) -> torch.Tensor:
    """(VECTORS, features) of +1 and -1, the same for every layer of this width."""
    generator = torch.Generator().manual_seed(features)
    return torch.randint(0, 2, (VECTORS, features), generator=generator).mul_(2).sub_(1).to(device, torch.float32)


def product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x W^T in float64 (VECTORS, out), multiplied in float32."""
    return (x @ weight.float().mT).double()
