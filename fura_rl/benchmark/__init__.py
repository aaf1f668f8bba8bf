"""The table of benchmarks.  A new one is a file here, with `run(settings) -> rows`, and a line in the table."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from fura_rl.benchmark import convert, fold, grpo_step, layer, model, quantize, report, rewards, soak, survival, sync
from fura_rl.benchmark.measure import Settings, machine
from fura_rl.benchmark.sync import SkippedError

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


def measure_all(names: list[str], settings: Settings) -> int:
    """Run the benchmarks one after another, print and write their tables; the exit code.

    Of several, one that fails does not take the others' results with it.
    """
    measured, budget = machine(settings), settings.budget
    print(report.machine_line(measured), flush=True)
    results, failed = {}, []
    for name in names:
        started = time.perf_counter()
        budget.open(SHARES[name] if len(names) > 1 else 1.0)
        try:
            rows = BENCHMARKS[name](settings)
        except (SkippedError, ImportError, torch.cuda.OutOfMemoryError) as error:
            print(f"\n{name}: skipped, {error}", flush=True)
            budget.skipped.append(f"{name}: {error}")
            continue
        except Exception as error:
            if len(names) == 1:
                raise
            traceback.print_exc()
            failed.append(name)
            budget.skipped.append(f"{name}: failed, {error}")
            continue
        if rows:
            results[name] = rows
            print(f"\n{name} ({time.perf_counter() - started:.0f} s)\n{report.markdown(rows)}", flush=True)
            report.write(settings.out, results, measured | {"skipped": budget.skipped})  # kept by an interrupted run
    written = report.write(settings.out, results, measured | {"skipped": budget.skipped})
    print("\nwritten  " + "  ".join(str(path) for path in written))
    if failed:
        print(f"error: {', '.join(failed)} failed; see above", file=sys.stderr)
    return 1 if failed else 0
