"""The learning rate of each entry, chosen by the validation scores of the search cells alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fura_rl.ablation.cell import RESULT
from fura_rl.ablation.spec import Cell, Spec, search_cells

Raw = dict[Cell, dict[str, Any]]  # finished cell -> its result


def finished(cells: Sequence[Cell], output: Path) -> Raw:
    return {cell: json.loads(file.read_text()) for cell in cells if (file := output / cell.name / RESULT).is_file()}


def rate_scores(spec: Spec, raw: Raw) -> dict[str, dict[float, float]]:
    """label -> learning rate -> mean of the choosing measure on the validation split.

    Only learning rates at which every search seed finished take part, so that no rate wins by a lucky seed.
    """
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in search_cells(spec):
        groups.setdefault((cell.label, cell.learning_rate), []).append(cell)
    scores: dict[str, dict[float, float]] = {}
    for (label, rate), group in groups.items():
        if all(cell in raw for cell in group):
            scores.setdefault(label, {})[rate] = validation_score([raw[cell] for cell in group], spec)
    return scores


def best_rates(scores: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """label -> the learning rate of the highest score; of equals, the one named first."""
    return {label: max(rates, key=rates.__getitem__) for label, rates in scores.items()}


def validation_score(group: Sequence[dict[str, Any]], spec: Spec) -> float:
    return statistics.fmean(result["scores"]["validation"]["scores"][spec.scoring.measure]["mean"] for result in group)
