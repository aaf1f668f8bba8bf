"""What is noted of every trained weight while a sync is made: what its kernel must compute, and what rounding takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fura_rl.sync.audit import ROUNDINGS_PER_DRAW, ROUNDINGS_PER_UPDATE, KernelAudit, sample_spans
from fura_rl.sync.engine import rounding_generator
from fura_rl.sync.factors import Factors, Read, Span, fold_rows
from fura_rl.sync.fold import CheckpointWeight


class UpdateCosine:
    """Accumulates <exact, delivered> / (|exact| |delivered|) over layers, in float64 and where the layers are."""

    def __init__(self) -> None:
        self._products: dict[torch.device, torch.Tensor] = {}  # all products of (exact, delivered), (2, 2)

    def add(self, exact: torch.Tensor, delivered: torch.Tensor) -> None:
        both = torch.stack([exact.flatten(), delivered.flatten()]).double()
        products = both @ both.mT
        self._products[products.device] = self._products.get(products.device, 0) + products

    def value(self) -> float:
        parts = [torch.zeros(2, 2, dtype=torch.float64), *(part.cpu() for part in self._products.values())]
        (exact_square, dot), (_, delivered_square) = torch.stack(parts).sum(0).tolist()
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
        self.audit_seconds = 0.0  # the part of them that the cosine would not have taken
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
        rounds = self._dtype.itemsize < 4
        nobody_asks = self._audit is None and not rounds
        if nobody_asks or not self._looks or len(weight.shape) != 2 or not weight.trained:
            return
        started = time.perf_counter()
        spans = sample_spans(whole_blocks(weight.local_rows, factors), self._processes)
        columns = 0, weight.shape[1]
        if not spans:
            return
        read = self._read(weight) if weight.layer is not None else None
        base = None if read is None else torch.cat([read(span, columns) for span in spans])
        device = next(iter(factors.tensors.values())).device
        options = {"device": device, "size": (sum(last - first for first, last in spans), columns[1])}

        def rows(base: torch.Tensor | None, dtype: torch.dtype, seed: int | None = None) -> torch.Tensor:
            out = torch.empty(dtype=dtype, **options)
            fold_rows(read, base, factors, spans, out, rounding_generator(seed, weight.name, device))
            return out

        delivered = rows(base, self._dtype, rounding_seed)
        exact = delivered = delivered.to(torch.promote_types(self._dtype, torch.float32))
        served = None if base is None else base.to(self._dtype)
        if rounds and base is not None:
            wide = base.to(torch.promote_types(base.dtype, torch.float32))
            exact = rows(wide, wide.dtype)
            self.cosine.add(exact - wide, delivered - served)
        elif rounds:
            self.all_bases_kept = False
        noted = time.perf_counter()
        if self._audit is not None:
            drawn = rounding_seed is not None and rounds  # the engine's draw of each weight is not repeated row by row
            roundings = ROUNDINGS_PER_DRAW if drawn else ROUNDINGS_PER_UPDATE
            expected, at_first = (exact, base) if drawn else (delivered, served)
            self._audit.expect(weight.name, expected, at_first, spans, roundings)
        ended = time.perf_counter()
        self.seconds += ended - started
        self.audit_seconds += ended - (noted if rounds else started)


def whole_blocks(rows: Span, factors: Factors) -> Span:
    """Those of `rows` that fold from `rows` alone: row blocks that other processes share are left out."""
    if factors.rule != "block_rows":
        return rows
    size = factors.tensors["update"].shape[-1]
    first, last = -(-rows[0] // size) * size, rows[1] // size * size
    return (first, last) if first < last else (rows[0], rows[0])
