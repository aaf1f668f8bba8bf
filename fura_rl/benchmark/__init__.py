"""The table of benchmarks.  A new one is a file here, with `run(settings) -> rows`, and a line in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fura_rl.benchmark import convert, fold, grpo_step, layer, model, quantize, rewards, soak, survival, sync
from fura_rl.benchmark.measure import Settings

BENCHMARKS: dict[str, Callable[[Settings], list[dict[str, Any]]]] = {
    "layer": layer.run,
    "convert": convert.run,
    "model": model.run,
    "fold": fold.run,
    "quantize": quantize.run,
    "step": grpo_step.run,
    "sync": sync.run,
    "rewards": rewards.run,
    "survival": survival.run,
    "soak": soak.run,
}

# What "all" runs, and up to which part of its time budget each may begin measurements; what is left over passes on.
SHARES = {"layer": 0.40, "convert": 0.55, "model": 0.65, "fold": 0.75, "quantize": 0.80, "step": 0.95, "sync": 1.0}
