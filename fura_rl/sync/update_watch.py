"""What is noted of every trained weight while a sync is made: what its kernel must compute, and what rounding takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fura_rl.sync.audit import ROUNDINGS_PER_DRAW, KernelAudit, sample_spans
from fura_rl.sync.engine import rounding_generator
from fura_rl.sync.factors import Factors, Read, Span, fold_rows
from fura_rl.sync.fold import CheckpointWeight


class UpdateCosine:
    """Accumulates <exact, delivered> / (|exact| |delivered|) over layers, in float64 and where the layers are."""

    def __init__(self) -> None:
        self._sums: dict[torch.device, torch.Tensor] = {}  # <exact, delivered>, |exact|^2, |delivered|^2

    def add(self, exact: torch.Tensor, delivered: torch.Tensor) -> None:
        exact, delivered = exact.flatten().double(), delivered.flatten().double()
        sums = torch.stack([exact @ delivered, exact @ exact, delivered @ delivered])
        self._sums[sums.device] = self._sums.get(sums.device, 0) + sums

    def value(self) -> float:
        sums = torch.stack([torch.zeros(3, dtype=torch.float64), *(part.cpu() for part in self._sums.values())])
        dot, exact_square, delivered_square = sums.sum(0).tolist()
        if exact_square == 0:
            return 1.0
        if delivered_square == 0:
            return 0.0
        return dot / (exact_square * delivered_square) ** 0.5


class UpdateWatch:
    """Looks at a sample of every trained weight on its way: what the audit must see, and what rounding leaves of it.

    Args:
        audit: is told what the kernel of each weight must compute; None for no audit.
        dtype: what the engine serves weights in.
        read: reads the rows that this process holds of a weight's base value, as the checkpoint has it.
        processes: how many processes each look at rows of their own.
        looks: whether this is one of them; another one looks at the rows of those that do not.
    """

    def __init__(
        self,
        audit: KernelAudit | None,
        dtype: torch.dtype,
        read: Callable[[CheckpointWeight], Read],
        processes: int,
        looks: bool,
    ) -> None:
        self.cosine = UpdateCosine()
        self.all_bases_kept = True  # whether every trained weight has its base value at hand, for the cosine
        self.seconds = 0.0
        self._audit, self._dtype, self._read = audit, dtype, read
        self._processes, self._looks = processes, looks
        self._seen: set[str] = set()

    def saw(self, weight: CheckpointWeight) -> bool:
        return weight.name in self._seen

    @torch.no_grad()
    def note(self, weight: CheckpointWeight, factors: Factors, rounding_seed: int | None) -> None:
        """Fold the sampled rows of one weight as the engine will, and exactly."""
        if self.saw(weight):
            return
        self._seen.add(weight.name)
        if not self._looks or len(weight.shape) != 2 or not weight.trained:
            return
        started = time.perf_counter()
        spans = sample_spans(whole_blocks(weight.local_rows, factors), self._processes)
        columns = 0, weight.shape[1]
        if not spans:
            return
        read = self._read(weight) if weight.layer is not None else None
        device = next(iter(factors.tensors.values())).device
        rounds = self._dtype.itemsize < 4

        def rows(dtype: torch.dtype, generator: torch.Generator | None = None) -> torch.Tensor:
            return sampled_rows(read, factors, spans, columns, dtype, device, generator)

        delivered = rows(self._dtype, rounding_generator(rounding_seed, weight.name, device))
        wants_base = rounds or (self._audit is not None and self._audit.starts_at(weight.name, spans))
        base = torch.cat([read(span, columns) for span in spans]) if read is not None and wants_base else None
        if rounds and base is not None:
            exact = rows(torch.promote_types(base.dtype, torch.float32))
            start = base.to(self._dtype).float()
            self.cosine.add(exact - base.to(exact.dtype), delivered.float() - start)
        elif rounds:
            self.all_bases_kept = False
        if self._audit is not None and (rounding_seed is None or not rounds):
            self._audit.expect(weight.name, delivered, base, spans)
        elif self._audit is not None:  # the engine's draw of each weight is not repeated row by row
            expected = exact if base is not None else delivered.float()
            self._audit.expect(weight.name, expected, base, spans, ROUNDINGS_PER_DRAW)
        self.seconds += time.perf_counter() - started


def whole_blocks(rows: Span, factors: Factors) -> Span:
    """Those of `rows` that fold from `rows` alone: row blocks that other processes share are left out."""
    if factors.rule != "block_rows":
        return rows
    size = factors.tensors["update"].shape[-1]
    first, last = -(-rows[0] // size) * size, rows[1] // size * size
    return (first, last) if first < last else (rows[0], rows[0])


def sampled_rows(
    read: Read | None,
    factors: Factors,
    spans: list[Span],
    columns: Span,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Rows `spans` of the folded weight, (features, in), one span after another, in `dtype`."""
    count = sum(last - first for first, last in spans)
    out = torch.empty(count, columns[1] - columns[0], dtype=dtype, device=device)
    fold_rows(read, factors, spans, columns, out, generator)
    return out
