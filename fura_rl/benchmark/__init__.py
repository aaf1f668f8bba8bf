"""The table of benchmarks.  A new one is a file here, with `run(settings) -> rows`, and a line in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fura_rl.benchmark import convert, fold, grpo_step, layer, quantize, rewards, sync
from fura_rl.benchmark.measure import Settings

BENCHMARKS: dict[str, Callable[[Settings], list[dict[str, Any]]]] = {
    "layer": layer.run,
    "convert": convert.run,
    "fold": fold.run,
    "quantize": quantize.run,
    "sync": sync.run,
    "step": grpo_step.run,
    "rewards": rewards.run,
}
