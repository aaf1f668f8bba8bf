"""Runs the cells of an ablation, each in its own process, some at a time, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fura_rl.ablation.cell import CELL, RESULT
from fura_rl.ablation.rate_choice import best_rates, finished, rate_scores
from fura_rl.ablation.spec import (
    Cell,
    Spec,
    matched_settings,
    scored_splits,
    search_cells,
    table_cells,
    training_options,
)
from fura_rl.report import environment, write_json

SPEC, LOG, FAILED = "spec.json", "log.txt", "failed.txt"
TAIL_LINES = 12


def open_sweep(spec: Spec, output: Path) -> None:
    """A new folder, or the folder of the very same ablation.

    Raises:
        ValueError: where it holds another ablation.
    """
    wanted = json.loads(json.dumps(dataclasses.asdict(spec)))
    file = output / SPEC
    if file.is_file():
        old = json.loads(file.read_text())["spec"]
        differing = sorted(key for key in wanted if wanted[key] != old.get(key))
        if differing:
            raise ValueError(
                f"{str(output)!r} holds another ablation: {', '.join(differing)} differ; name another output"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_json(file, {"spec": wanted, "environment": environment()})


def run_sweep(spec: Spec, output: Path, processes: int, tell: Callable[[str], None]) -> list[Cell]:
    """Run every cell that has no result yet, `processes` at a time; the cells that failed.

    First the cells that choose the learning rates, then those of the chosen rates that are still missing.  A failed
    cell is tried again the next time; a killed one goes on from its last checkpoint.
    """
    settings, search = matched_settings(spec), search_cells(spec)
    failed = run_cells(spec, search, settings, output, processes, tell)
    rates = best_rates(rate_scores(spec, finished(search, output)))
    rest = [cell for cell in table_cells(spec, rates) if cell not in search]
    if rest:
        tell("chosen on the validation split: " + ", ".join(f"{label} {rate:g}" for label, rate in rates.items()))
        failed += run_cells(spec, rest, settings, output, processes, tell)
    return failed


def run_cells(
    spec: Spec, every: Sequence[Cell], settings: dict[str, dict[str, Any]], output: Path, processes: int,
    tell: Callable[[str], None],
) -> list[Cell]:  # fmt: skip
    """Run those of `every` that have no result yet; the cells that failed."""
    waiting = [cell for cell in every if not (output / cell.name / RESULT).is_file()]
    tell(f"{len(every)} cells, {len(every) - len(waiting)} done already")
    for cell in waiting:
        folder = output / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        options = training_options(spec, cell, settings[cell.label], folder / "run")
        scoring = dataclasses.asdict(spec.scoring)
        write_json(folder / CELL, {"options": options, "splits": scored_splits(spec, cell), "scoring": scoring})
        (folder / FAILED).unlink(missing_ok=True)
    failed, done = [], len(every) - len(waiting)
    with ThreadPoolExecutor(max_workers=processes) as pool:
        running = {pool.submit(run_cell, output / cell.name): cell for cell in waiting}
        for future in as_completed(running):
            cell, code = running[future], future.result()
            done += 1
            if code:
                failed.append(cell)
            state = f"failed with exit code {code}, see {output / cell.name / LOG}" if code else "done"
            tell(f"[{done}/{len(every)}] {cell.name}: {state}")
    return failed


def run_cell(folder: Path) -> int:
    """Run one cell to its end; its exit code.  What it prints goes to its log, the end of it to `failed.txt`."""
    command = [sys.executable, "-m", "fura_rl.ablation.cell", str(folder)]
    with open(folder / LOG, "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code or not (folder / RESULT).is_file():
        tail = (folder / LOG).read_text().splitlines()[-TAIL_LINES:]
        (folder / FAILED).write_text("\n".join([f"exit code {code}", *tail]) + "\n")
        return code or 1
    return 0
