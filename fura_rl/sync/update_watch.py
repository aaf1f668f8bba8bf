"""What is noted of every trained weight while a sync is made: what its kernel must compute, and what rounding takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fura_rl.sync.audit import (
    FLOAT32_SPAN_ROWS,
    ROUNDINGS_PER_DRAW,
    ROUNDINGS_PER_UPDATE,
    SPAN_ROWS,
    KernelAudit,
    sample_spans,
)
from fura_rl.sync.engine import rounding_generator
from fura_rl.sync.factors import Factors, Span, cut_to_rows, fold_slice, stacked
from fura_rl.sync.fold import BaseSlices, CheckpointWeight
from fura_rl.sync.rounding import round_weight

# Of samples that wait for more of their shape, so many bytes at most: on a CPU what its cache holds (four times as much
# costs more than the operations that it saves), elsewhere such that what is made of them is about a layer of a 1.7B.
WAITING_BYTES = 16 * 2**20
CPU_WAITING_BYTES = 2 * 2**20


class UpdateCosine:
    """Accumulates <exact, delivered> / (|exact| |delivered|) over layers, where the layers are: the products of rows
    (..., in) in their own dtype, their sum in float64."""

    def __init__(self) -> None:
        self._products: dict[torch.device, torch.Tensor] = {}  # exact exact, exact delivered, delivered delivered

    def add(self, exact: torch.Tensor, delivered: torch.Tensor) -> None:
        pairs = (exact, exact), (exact, delivered), (delivered, delivered)
        products = torch.stack([torch.linalg.vecdot(*pair).sum(dtype=torch.float64) for pair in pairs])
        self._products[products.device] = self._products.get(products.device, 0) + products

    def value(self) -> float:
        parts = [torch.zeros(3, dtype=torch.float64), *(part.cpu() for part in self._products.values())]
        exact_square, dot, delivered_square = torch.stack(parts).sum(0).tolist()
        if exact_square == 0:
            return 1.0
        if delivered_square == 0:
            return 0.0
        return dot / (exact_square * delivered_square) ** 0.5


@dataclass(frozen=True)
class RowSample:
    """Rows of one trained weight on its way: of its base value, where that is at hand, and what folds them."""

    name: str
    spans: list[Span]
    base: torch.Tensor | None  # (rows, in)
    factors: Factors
    rounding_seed: int | None

    @property
    def kind(self) -> Hashable:
        """Equal for samples that can be folded at once."""
        tensors = {"base": self.base} if self.base is not None else {}
        tensors |= self.factors.tensors
        return (
            *(self.factors.rule, tuple(self.spans), self.rounding_seed),
            *((name, t.shape, t.dtype, t.device) for name, t in tensors.items()),
        )

    @property
    def nbytes(self) -> int:
        return self.factors.nbytes + (0 if self.base is None else self.base.nbytes)


class UpdateWatch:
    """Looks at a sample of every trained weight on its way: what the audit must see, and what rounding leaves of it.

    Weights of one shape are looked at together, since it is mostly the number of small operations that it costs.

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
        read: Callable[[CheckpointWeight], BaseSlices],
        processes: int,
        looks: bool,
    ) -> None:
        self.cosine = UpdateCosine()
        self.all_bases_kept = True  # whether every trained weight has its base value at hand, for the cosine
        self.seconds = 0.0
        self.audit_seconds = 0.0  # the part of them that the cosine would not have taken
        self._audit, self._dtype, self._read = audit, dtype, read
        self._processes, self._looks = processes, looks
        self._rounds = dtype.itemsize < 4
        self._span_rows = SPAN_ROWS if self._rounds else FLOAT32_SPAN_ROWS
        self._seen: set[str] = set()
        self._waiting: dict[Hashable, list[RowSample]] = {}  # by kind, of which all have the same size
        self._waiting_bytes = 0

    def saw(self, weight: CheckpointWeight) -> bool:
        return weight.name in self._seen

    @torch.no_grad()
    def note(self, weight: CheckpointWeight, factors: Factors, rounding_seed: int | None) -> None:
        """Keep a sample of the rows of one weight, to be folded exactly and rounded to the engine's dtype; that an
        engine of 16 bits rounds the factors as well is left out."""
        if self.saw(weight):
            return
        self._seen.add(weight.name)
        nobody_asks = self._audit is None and not self._rounds
        if nobody_asks or not self._looks or len(weight.shape) != 2 or not weight.trained:
            return
        spans = sample_spans(whole_blocks(weight.local_rows, factors), self._processes, self._span_rows)
        if not spans:
            return
        with self._timed():
            read = self._read(weight) if weight.layer is not None else None
            base = None if read is None else read.rows(tuple(spans))
            cut = cut_to_rows(read, factors, tuple(spans), weight.shape[1])
            sample = RowSample(weight.name, spans, base, cut, rounding_seed)
            self._waiting.setdefault(sample.kind, []).append(sample)
            self._waiting_bytes += sample.nbytes
            on_cpu = next(iter(cut.tensors.values())).device.type == "cpu"
            if self._waiting_bytes > (CPU_WAITING_BYTES if on_cpu else WAITING_BYTES):
                sizes = {kind: len(samples) * samples[0].nbytes for kind, samples in self._waiting.items()}
                largest = max(sizes, key=sizes.get)
                self._waiting_bytes -= sizes[largest]
                self._look_at(self._waiting.pop(largest))

    @torch.no_grad()
    def finish(self) -> None:
        """Look at what waits for more of its shape."""
        with self._timed():
            for samples in self._waiting.values():
                self._look_at(samples)
            self._waiting.clear()
            self._waiting_bytes = 0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        taken = time.perf_counter() - started
        self.seconds += taken
        if not self._rounds:  # then there is no cosine to take
            self.audit_seconds += taken

    def _look_at(self, samples: list[RowSample]) -> None:
        """Fold samples of one kind, exactly and rounded to the engine's dtype."""
        factors = stacked([sample.factors for sample in samples])
        base = None if samples[0].base is None else torch.stack([sample.base for sample in samples])
        start = factors.tensors["weight"] if base is None else base
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        exact = torch.empty_like(start)
        rows, columns = ((0, size) for size in exact.shape[1:])
        fold_slice(lambda *_: start, factors, rows, columns, exact)
        delivered, drawn = exact, False
        served = None if base is None else base.to(self._dtype)
        if self._rounds:
            drawn = samples[0].rounding_seed is not None
            delivered = self._rounded(exact, samples)
            if base is None:
                self.all_bases_kept = False
            else:
                self.cosine.add(exact - start, delivered - served)
        if self._audit is not None:
            noted = time.perf_counter()
            roundings = ROUNDINGS_PER_DRAW if drawn else ROUNDINGS_PER_UPDATE
            # the engine's draw of each weight is not repeated row by row
            expected, at_first = (exact, base) if drawn else (delivered, served)
            self._audit.expect([sample.name for sample in samples], expected, at_first, samples[0].spans, roundings)
            if self._rounds:
                self.audit_seconds += time.perf_counter() - noted

    def _rounded(self, exact: torch.Tensor, samples: list[RowSample]) -> torch.Tensor:
        """`exact` as the engine's dtype holds it, in the dtype of `exact`."""
        if samples[0].rounding_seed is None:
            return exact.to(self._dtype).to(exact.dtype)
        rounded = torch.empty_like(exact)
        for sample, part, target in zip(samples, exact, rounded, strict=True):
            generator = rounding_generator(sample.rounding_seed, sample.name, exact.device)
            target.copy_(round_weight(part, self._dtype, generator))
        return rounded


def whole_blocks(rows: Span, factors: Factors) -> Span:
    """Those of `rows` that fold from `rows` alone: row blocks that other processes share are left out."""
    if factors.rule != "block_rows":
        return rows
    size = factors.tensors["update"].shape[-1]
    first, last = -(-rows[0] // size) * size, rows[1] // size * size
    return (first, last) if first < last else (rows[0], rows[0])
