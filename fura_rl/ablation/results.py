"""From the raw files of an ablation to its table: the learning rate of each entry, scores on the test split, costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fura_rl.ablation.rate_choice import best_rates, finished, rate_scores
from fura_rl.ablation.spec import Cell, Spec, search_cells, table_cells
from fura_rl.ablation.sweep import FAILED
from fura_rl.evaluation.estimators import bootstrap
from fura_rl.evaluation.run_folder import RunFolder
from fura_rl.evaluation.scores import Values, problem_values

Interval = dict[str, float]  # mean, low, high
Spread = dict[str, float]  # mean and deviation over seeds
UPDATE_FIGURES = ("relative_size", "stable_rank", "overlap", "chance")


@dataclass(frozen=True)
class Line:
    """One entry at its chosen learning rate.

    `scores` and `differences` (to the baseline) hold measure -> mean and 95% interval over test problems, each
    problem's value being its mean over seeds; `seed_deviation` is the standard deviation over seeds of a measure.
    """

    label: str
    learning_rate: float
    seeds: int
    scores: dict[str, Interval]
    differences: dict[str, Interval]
    seed_deviation: dict[str, float]
    trained_parameters: int
    peak_memory_gib: float
    phase_seconds_per_step: dict[str, float]
    payload_bytes: int
    validation: dict[str, float]  # learning rate -> mean of the choosing measure on the validation split
    at_edge: bool  # the chosen rate is the smallest or largest tried
    # measured on the trained policy; None where a cell was run before it was measured
    kl_per_token: Spread | None = None  # nats, policy against base, on the policy's own completions
    kl_per_completion: Spread | None = None
    update: dict[str, Spread | None] = field(default_factory=dict)  # see diagnostics.UpdateShape
    update_cosine: Spread | None = None  # what rounding leaves of the update, mean over syncs
    spectrum: list[float] | None = field(repr=False, default=None)  # singular values of the update over the largest
    base_spectrum: list[float] | None = field(repr=False, default=None)
    rewards: list[list[float]] = field(repr=False, default_factory=list)  # per seed, per step
    evaluations: list[list[tuple[int, float]]] = field(repr=False, default_factory=list)  # per seed: (step, pass@1)


@dataclass(frozen=True)
class Results:
    lines: list[Line]
    failed: dict[str, str]  # cell -> the end of its log
    unfinished: list[str]
    measures: list[str]
    environments: list[dict[str, Any]]  # what the cells ran on: one, unless they were run in different places


def collect(spec: Spec, output: Path) -> Results:
    """The table of what has been run so far.

    The learning rate of an entry is chosen by the search cells alone, among the rates at which every search seed
    finished; the entry stands in the table once every seed finished at that rate.
    """
    search = search_cells(spec)
    validation = rate_scores(spec, finished(search, output))
    planned = table_cells(spec, best_rates(validation))
    every = [*search, *(cell for cell in planned if cell not in search)]
    raw = finished(every, output)
    failures = {cell.name: output / cell.name / FAILED for cell in every if cell not in raw}
    failed = {name: file.read_text() for name, file in failures.items() if file.is_file()}
    groups = {label: [cell for cell in planned if cell.label == label] for label in validation}
    chosen = {label: group for label, group in groups.items() if all(cell in raw for cell in group)}
    values = {label: [test_values(output, cell, spec) for cell in group] for label, group in chosen.items()}
    baseline = mean_over_seeds(values[spec.baseline]) if spec.baseline in values else None
    lines = [
        make_line(spec, group, [raw[cell] for cell in group], values[label], baseline, validation[label])
        for label, group in chosen.items()
    ]
    unfinished = [cell.name for cell in every if cell not in raw and cell.name not in failed]
    measures = list(next(iter(values.values()))[0]) if values else []
    return Results(lines, failed, unfinished, measures, environments(output, raw))


def environments(output: Path, ran: Iterable[Cell]) -> list[dict[str, Any]]:
    """The distinct environments that the runs of these cells recorded, of a resumed run every one."""
    found: list[dict[str, Any]] = []
    for file in (output / cell.name / "run" / "environment.json" for cell in ran):
        if file.is_file():
            last = json.loads(file.read_text())
            found += [one for one in (*last.pop("earlier", []), last) if one not in found]
    return found


def test_values(output: Path, cell: Cell, spec: Spec) -> Values:
    return problem_values(RunFolder(output / cell.name / "test").samples(), spec.scoring.k)


def mean_over_seeds(values: Sequence[Values]) -> Values:
    """Each problem's mean over seeds: what is left to resample are problems."""
    return {
        measure: [statistics.fmean(column) for column in zip(*(seed[measure] for seed in values), strict=True)]
        for measure in values[0]
    }


def make_line(
    spec: Spec, group: Sequence[Cell], raw: Sequence[dict[str, Any]], values: Sequence[Values],
    baseline: Values | None, validation: dict[float, float],
) -> Line:  # fmt: skip
    means, first = mean_over_seeds(values), group[0]
    [entry] = [entry for entry in spec.adapters if entry.label == first.label]
    rates = spec.rates_of(entry)
    differences = {}
    if baseline is not None and first.label != spec.baseline:
        differences = {
            measure: asdict(bootstrap([b - a for a, b in zip(baseline[measure], column, strict=True)]))
            for measure, column in means.items()
        }
    steps = sum(result["steps_timed"] for result in raw)
    phases = {name: sum(r["phase_seconds"][name] for r in raw) / max(1, steps) for name in raw[0]["phase_seconds"]}
    return Line(
        label=first.label,
        learning_rate=first.learning_rate,
        seeds=len(group),
        scores={measure: asdict(bootstrap(column)) for measure, column in means.items()},
        differences=differences,
        seed_deviation={m: deviation([statistics.fmean(seed[m]) for seed in values]) for m in means},
        trained_parameters=raw[0]["trained_parameters"],
        peak_memory_gib=max(result["peak_memory_gib"] for result in raw),
        phase_seconds_per_step=phases,
        payload_bytes=raw[0]["payload_bytes"] or 0,
        validation={f"{rate:g}": score for rate, score in validation.items()},
        at_edge=len(rates) > 1 and first.learning_rate in (min(rates), max(rates)),
        kl_per_token=spread(figures(raw, "divergence", "per_token")),
        kl_per_completion=spread(figures(raw, "divergence", "per_completion")),
        update={name: spread(figures(raw, "update", name)) for name in UPDATE_FIGURES},
        update_cosine=spread([mean_cosine(result.get("update_cosines", ())) for result in raw]),
        spectrum=mean_curve(figures(raw, "update", "spectrum")),
        base_spectrum=mean_curve(figures(raw, "update", "base_spectrum")),
        rewards=[result["rewards"] for result in raw],
        evaluations=[result.get("evaluations", []) for result in raw],
    )


def figures(raw: Sequence[dict[str, Any]], part: str, name: str) -> list[Any]:
    """One figure of every seed, None where a cell lacks it."""
    return [result.get(part, {}).get(name) for result in raw]


def mean_cosine(cosines: Sequence[float | None]) -> float | None:
    known = [cosine for cosine in cosines if cosine is not None]
    return statistics.fmean(known) if known else None


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation over seeds; None where any seed has no value."""
    if any(value is None for value in values):
        return None
    return {"mean": statistics.fmean(values), "deviation": deviation(values)}


def mean_curve(curves: Sequence[list[float] | None]) -> list[float] | None:
    """Value by value over seeds; None where any seed has none."""
    if any(curve is None for curve in curves):
        return None
    return [statistics.fmean(column) for column in zip(*curves, strict=True)]


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
