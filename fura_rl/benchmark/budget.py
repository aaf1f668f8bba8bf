"""A time budget for a run of several benchmarks: what no longer fits is skipped and named, never cut silently."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Unit = TypeVar("Unit")


@dataclass
class Budget:
    """`seconds` for everything; each benchmark may begin units until its `open_until`, a share of the whole.

    What one benchmark leaves over, the next ones have.  `seconds=inf` skips nothing.
    """

    seconds: float = float("inf")
    begun: float = field(default_factory=time.perf_counter)
    open_until: float = float("inf")  # seconds since `begun`
    skipped: list[str] = field(default_factory=list)

    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def open(self, share: float) -> None:
        """Let the next benchmark begin units up to `share` (0..1) of the whole budget."""
        self.open_until = share * self.seconds

    def skip(self, benchmark: str, unit: Any, reason: str) -> None:
        """Print and note what is left out."""
        self.skipped.append(f"{benchmark} {unit}")
        print(f"{benchmark}: skipped {unit}, {reason}", flush=True)

    def units(self, benchmark: str, units: Iterable[Unit]) -> Iterator[Unit]:
        """The units of a benchmark that still fit, judged by its longest so far; the others are printed and noted."""
        longest = 0.0
        for unit in units:
            started = self.elapsed()
            if started + longest > self.open_until:
                self.skip(benchmark, unit, f"the time budget of {self.seconds:.0f} s has no room")
                continue
            yield unit
            longest = max(longest, self.elapsed() - started)
