"""The audit of a sync: what every live kernel computes from a few fixed vectors, against the weights it was sent.

A probe of log-probs sees a stale module only where it moves the policy by more than the engine's rounding; this sees
the one module, by name.  The regression of the reply on the update since the last audit,

    gain = <reply - previous, expected - previous> / |expected - previous|^2,

is 1 where the kernel holds the new weight and 0 where it still holds the one before.  The trainer computes what to
expect from its own base weight, for a sample of output features.

Every vector is zero but on one stretch of the inputs.  So where workers share the columns of a weight (the row-parallel
layers of tensor parallelism), each answers some vectors by itself and is judged by them: in a sum over the workers the
fresh ones would vouch for a stale one.  Workers that hold less than a stretch are judged by their sum.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fura_rl.sync.factors import Span

VECTORS = 8  # vectors through every kernel; entries are +1, -1 and 0, which every dtype holds exactly
SAMPLED_SPANS, SPAN_ROWS = 16, 8  # output features looked at: this many stretches of so many, spread over all
FEWEST_SPANS = 4  # of one process
FLOAT32_SPAN_ROWS = 2  # in 32 bits there is no rounding to be averaged out
STALE_BELOW = 0.5
# Of an update that stands further out of the rounding, whose gain scatters by less.  Of the two weights of an expert
# the older one may make up so little of the update.
CLEARLY_STALE_BELOW = 0.75
LOST_ABOVE = 2.0  # a kernel that moves by more than twice its update holds something else altogether
# An update smaller than this, relative to the weight, is left to add up until it stands out of the reply's rounding:
# the gain's standard deviation is then about 0.06, so that a fresh layer is 8 of them away from STALE_BELOW.  A long
# run makes millions of audits, many of them just above this, and ends at the first that fails.  A stochastic draw adds
# the weights' own rounding to the reply's.  The floor is float32's accumulation over long rows.
ROUNDINGS_PER_UPDATE = 4.0
ROUNDINGS_PER_DRAW = 6.0
SMALLEST_UPDATE = 1e-5


@dataclass(frozen=True)
class Gain:
    """How much of a weight's update its kernel computes with, and the least of it that a fresh kernel may show."""

    value: float
    fresh_from: float = STALE_BELOW

    @property
    def is_fresh(self) -> bool:
        """Whether the kernel holds the weight it was sent; a value that is no number does not say so."""
        return self.fresh_from <= self.value <= LOST_ABOVE

    @property
    def badness(self) -> tuple[bool, float]:
        """Whether it is stale, and how far from 1, in the distance of the least that is fresh; no number is infinitely
        far."""
        distance = math.inf if math.isnan(self.value) else abs(self.value - 1) / (1 - self.fresh_from)
        return not self.is_fresh, distance


@dataclass(frozen=True)
class KernelReply:
    """One worker's share of x W^T (VECTORS, features) of one weight.

    `covered` (VECTORS, features) is the part of each number that this worker answers for: 1 where it holds the row of
    the weight and every column that the vector asks for, 1/2 for half of those, 0 for a row or columns of another's.
    `eps` is that of the kernel's weights, where they are kept coarser than the engine's dtype.
    """

    output: torch.Tensor
    covered: torch.Tensor
    eps: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "covered", self.covered.reshape(self.output.shape))  # it comes flat off the wire


class Kernels(Protocol):
    """What the audit needs of an engine."""

    @property
    def dtype(self) -> torch.dtype: ...

    def kernel_replies(self, spans: Mapping[str, Sequence[Span]]) -> list[dict[str, KernelReply]]:
        """Each worker's replies to `probe_vectors`, bias left out, by checkpoint tensor, at the output features of its
        spans, one span after another; a tensor that no kernel multiplies by is left out.  For one expert of a stack,
        `....experts.3`, what its gated kernel makes of the vectors."""


@dataclass
class KernelAudit:
    """Expected replies of every trained linear layer and expert, from sync to sync.

    Holds VECTORS numbers for each sampled output feature and no weight.
    """

    _previous: dict[str, torch.Tensor] = field(default_factory=dict)  # what the engine is known to compute
    _expected: dict[str, torch.Tensor] = field(default_factory=dict)  # what it should compute after this sync
    _spans: dict[str, list[Span]] = field(default_factory=dict)
    _roundings: dict[str, float] = field(default_factory=dict)
    _judged: dict[str, torch.Tensor] = field(default_factory=dict)  # the numbers that the last gains are of
    _answered: dict[str, int] = field(default_factory=dict)  # the most whole copies of a reply ever given

    def expect(
        self,
        names: Sequence[str],
        delivered: torch.Tensor,
        base: torch.Tensor | None,
        spans: list[Span],
        roundings: float = ROUNDINGS_PER_UPDATE,
    ) -> None:
        """Note what the kernels of the weights `names` must compute once they hold `delivered`.

        `delivered` (weights, features, in) and `base`, the weights that the engine started from, are given at the
        output features `spans`.  `base` is needed where `starts_at` says so; without it that sync of the layer cannot
        be audited.  `roundings` as in `expect_reply`.
        """
        x = probe_vectors(delivered.shape[-1], delivered.device)
        counts = base is not None and any(self.starts_at(name, spans) for name in names)
        base_replies = products(base.to(delivered.dtype), x) if counts else [None] * len(names)
        for name, reply, base_reply in zip(names, products(delivered, x), base_replies, strict=True):
            self.expect_reply(name, reply, base_reply, spans, roundings)

    def expect_reply(
        self,
        name: str,
        reply: torch.Tensor,
        base_reply: torch.Tensor | None,
        spans: list[Span],
        roundings: float = ROUNDINGS_PER_UPDATE,
    ) -> None:
        """Note the reply (VECTORS, features) that `name` must give from now on.

        `base_reply` is that of the weights the engine started from.  An update of fewer than `roundings` of the
        engine's roundings of the reply is left to add up.
        """
        self._expected[name] = reply
        if self.starts_at(name, spans):
            self._previous[name] = reply if base_reply is None else base_reply
        self._spans[name], self._roundings[name] = spans, roundings

    def knows(self, name: str) -> bool:
        return name in self._previous

    def starts_at(self, name: str, spans: list[Span]) -> bool:
        """Whether nothing is known of `name` at these rows: none were asked for, or sharding has moved them."""
        return not self.knows(name) or self._spans[name] != spans

    def gains(self, engine: Kernels, syncs: int = 1) -> dict[str, Gain]:
        """The gain of every layer whose update is large enough to be seen through the engine's rounding.

        Of a weight that several workers or replicas hold, the worst; a worker whose own part has moved too little to
        be seen is left out, and so is a weight that no kernel multiplies by.  One that is answered for whole less often
        than it once was, by a replica less, has a gain that is no number: nothing is known of that one.  The update is
        one of so many `syncs`: what misses one of them is nearer to 1 by as much, so that an update must be as much
        larger to be judged by, and is judged as much more strictly.
        """
        self._expected, self._previous = on_host(self._expected), on_host(self._previous)
        eps = torch.finfo(engine.dtype).eps
        due = self._due(eps, syncs)
        workers = engine.kernel_replies({name: self._spans[name] for name in due})
        shares = {name: [worker[name] for worker in workers if name in worker] for name in due}
        gains: dict[str, list[Gain]] = {name: [] for name in due}
        copies = dict.fromkeys(due, 0)
        for names in grouped(due, lambda name: (self._expected[name].shape, len(shares[name]))):
            together = [stacked(of_worker) for of_worker in zip(*(shares[name] for name in names), strict=True)]
            gains |= zip(names, self._judge(names, together, eps, syncs), strict=True)
            copies |= zip(names, whole_copies(together, len(names)), strict=True)
        gains |= {name: [Gain(math.nan)] for name in due if copies[name] < self._answered.get(name, 0)}
        self._answered |= {name: max(copies[name], self._answered.get(name, 0)) for name in due}
        return {name: worst(found) for name, found in gains.items() if found}

    def _due(self, eps: float, syncs: int) -> list[str]:
        """The weights whose whole reply moves by enough to be seen, in the order in which they were noted."""
        moved: set[str] = set()
        for names in grouped(self._expected, lambda name: self._expected[name].shape):
            everything = torch.ones(len(names), *self._expected[names[0]].shape, dtype=torch.bool)
            sizes = self._update_sizes(names, everything, [eps] * len(names), syncs)
            moved |= {name for name, size in zip(names, sizes, strict=True) if size > 1}
        return [name for name in self._expected if name in moved]

    def _judge(self, names: list[str], shares: list[StackedReplies], eps: float, syncs: int) -> list[list[Gain]]:
        """The gains of each of `names`, alike in shape: one for every reply that is whole somewhere and shows its
        update there.  `shares` are every worker's, of all the names."""
        coarsest = [max([eps, *(share.eps[i] for share in shares)]) for i in range(len(names))]
        judged = torch.zeros(len(names), *self._expected[names[0]].shape, dtype=torch.bool)
        found: list[list[Gain]] = [[] for _ in names]
        for reply, whole in complete_replies(shares):
            sizes = self._update_sizes(names, whole, coarsest, syncs)
            judged |= whole & torch.tensor([size > 1 for size in sizes])[:, None, None]
            for own, value, size in zip(found, self._gains(names, reply, whole), sizes, strict=True):
                if size > 1:
                    own.append(Gain(value, fresh_from(size, syncs)))
        self._judged |= zip(names, judged.unbind(), strict=True)
        return found

    def _update_sizes(self, names: list[str], whole: torch.Tensor, eps: list[float], syncs: int) -> list[float]:
        """Of each weight, how far its numbers `whole` move, in the least that stands out of the engine's rounding."""
        expected, previous = stack_of(self._expected, names), stack_of(self._previous, names)
        roundings = torch.tensor([self._roundings[name] for name in names]) * torch.tensor(eps, dtype=torch.float64)
        visible = syncs * (roundings / whole.sum((1, 2)).clamp(min=1).sqrt()).clamp(min=SMALLEST_UPDATE)
        size, update = (torch.where(whole, part, 0).flatten(1).norm(dim=1) for part in (expected, expected - previous))
        return (update / (visible * size)).nan_to_num(0.0).tolist()  # no number where nothing is asked for

    def _gains(self, names: list[str], reply: torch.Tensor, whole: torch.Tensor) -> list[float]:
        """Of each weight, the regression of its `reply` on its update over the numbers `whole`."""
        expected, previous = stack_of(self._expected, names), stack_of(self._previous, names)
        update = torch.where(whole, expected - previous, 0)
        found = torch.where(whole, reply.double() - previous, 0)
        return ((found * update).sum((1, 2)) / update.square().sum((1, 2))).tolist()

    def accept(self, gains: Iterable[str]) -> None:
        """The layers of `gains` are proved, as far as they were judged: their next update is counted from here."""
        for names in grouped(gains, lambda name: self._expected[name].shape):
            judged, expected, previous = (
                torch.stack([of[name] for name in names]) for of in (self._judged, self._expected, self._previous)
            )
            self._previous |= zip(names, torch.where(judged, expected, previous).unbind(), strict=True)


def grouped(names: Iterable[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    """`names` that are alike in `key`, to be judged at once: a small operation a weight is what an audit would take."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())


def stack_of(tensors: Mapping[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """(weights, VECTORS, features) in float64, in which an update is a small difference."""
    return torch.stack([tensors[name] for name in names]).double()


@dataclass(frozen=True)
class StackedReplies:
    """One worker's shares of several weights of one shape: (weights, VECTORS, features), and the eps of each."""

    output: torch.Tensor
    covered: torch.Tensor
    eps: list[float]


def stacked(replies: Sequence[KernelReply]) -> StackedReplies:
    outputs, covered = (torch.stack(parts) for parts in zip(*((r.output, r.covered) for r in replies), strict=True))
    return StackedReplies(outputs, covered, [r.eps for r in replies])


def complete_replies(shares: list[StackedReplies]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The workers' shares as (reply, the numbers of it that are whole), partial sums added up worker by worker.

    What two workers hold whole gives two replies, so that one of them cannot be stale behind the other; so do the
    partial sums of two replicas, whose workers come one replica after another.
    """
    complete = []
    if shares:
        output, covered = torch.zeros_like(shares[0].output), torch.zeros_like(shares[0].covered)
    for share in shares:
        output, covered = output + share.output, covered + share.covered
        whole = covered > 1 - 1e-3  # a sum of fractions
        if whole.any():
            complete.append((output, whole))
            output, covered = output.masked_fill(whole, 0), covered.masked_fill(whole, 0)
    return complete


def whole_copies(shares: list[StackedReplies], weights: int) -> list[int]:
    """Of each of so many weights, how many times the workers' shares of its reply cover every number of it."""
    if not shares:
        return [0] * weights
    covered = sum(share.covered for share in shares)
    return (covered + 1e-3).flatten(1).amin(dim=1).int().tolist()  # a sum of fractions


def fresh_from(update_size: float, syncs: int) -> float:
    """The least gain of a fresh kernel for an update of such a size, in the least that can be judged by.

    Of an update of several `syncs` it may lack the last one alone, and have a gain of 1 - 1 / syncs.
    """
    scatter = (1 - STALE_BELOW) / update_size
    return 1 - max(scatter, 1 - CLEARLY_STALE_BELOW) / syncs


def worst(gains: Iterable[Gain]) -> Gain:
    """A stale one before any other, then the one furthest from 1, as far as each can be told from it."""
    return max(gains, key=lambda gain: gain.badness)


def stale_modules(gains: Mapping[str, Gain]) -> list[str]:
    """The layers whose kernel does not hold the weight it was sent."""
    return [name for name, gain in gains.items() if not gain.is_fresh]


def sample_spans(rows: Span, processes: int = 1, span_rows: int = SPAN_ROWS) -> list[Span]:
    """Stretches of so many output features spread over `rows`; every one where there are few.

    Where each of so many `processes` looks at rows of its own, fewer of them each, but enough to judge by.
    """
    first, count = rows[0], rows[1] - rows[0]
    spans = max(FEWEST_SPANS, SAMPLED_SPANS // processes)
    if count <= spans * span_rows:
        return [rows] if count else []
    starts = [first + i * (count - span_rows) // (spans - 1) for i in range(spans)]
    return [(start, start + span_rows) for start in starts]


def on_host(tensors: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """`tensors`, of one dtype, on the CPU: in one transfer from each device, which waits for it once."""
    found = dict(tensors)
    for device in {tensor.device for tensor in tensors.values()} - {torch.device("cpu")}:
        there = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        flat = torch.cat([tensor.flatten() for tensor in there.values()]).cpu()
        parts = flat.split([tensor.numel() for tensor in there.values()])
        found |= {name: part.view(there[name].shape) for name, part in zip(there, parts, strict=True)}
    return found


def stretch_bounds(features: int) -> list[int]:
    """Where the inputs of each probe vector begin and the last one's end."""
    return [i * features // VECTORS for i in range(VECTORS + 1)]


@functools.lru_cache(maxsize=64)
def probe_vectors(features: int, device: torch.device) -> torch.Tensor:
    """(VECTORS, features), the i-th of +1 and -1 on the i-th stretch of the inputs, else 0; to be read only.

    The same for every layer of this width.
    """
    generator = torch.Generator().manual_seed(features)
    signs = torch.randint(0, 2, (features,), generator=generator).mul_(2).sub_(1)
    vectors = torch.zeros(VECTORS, features)
    for vector, (first, last) in zip(vectors, itertools.pairwise(stretch_bounds(features)), strict=True):
        vector[first:last] = signs[first:last]
    return vectors.to(device)


@functools.lru_cache(maxsize=256)
def covered_by(columns: Span, features: int) -> torch.Tensor:
    """(VECTORS,): the part of each probe vector's inputs that lies in `columns`; to be read only."""
    bounds = torch.tensor(stretch_bounds(features))
    inside = bounds.clamp(*columns).diff()
    return inside / bounds.diff().clamp(min=1)


def tokens_of_experts(vectors: torch.Tensor, experts: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every vector for every expert in turn: tokens (experts * VECTORS, features) and their routes (..., 1)."""
    chosen = torch.tensor(list(experts), device=vectors.device)
    return vectors.repeat(len(chosen), 1), chosen.repeat_interleave(len(vectors))[:, None]


def products(weights: torch.Tensor, x: torch.Tensor) -> Sequence[torch.Tensor]:
    """x W^T (VECTORS, out) in float32 for each of `weights` (weights, out, in)."""
    return (weights.float() @ x.mT).mT.contiguous().unbind()
