"""What an ablation compares, from one YAML file; every cell of it is one training run of the script."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from fura_rl import validation
from fura_rl.adapters.registry import find_method
from fura_rl.config import read_yaml


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: an adapter with its settings and its own learning rates, where it has some."""

    adapter: str
    label: str = ""
    adapter_kwargs: dict[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scoring:
    """How every trained policy is scored: learning rates are chosen on `validation`, the table is of `test`."""

    validation: str = "quickstart_validation"
    test: str = "quickstart"
    max_problems: int | None = None
    num_samples: int = 8
    k: tuple[int, ...] = (1, 8)
    measure: str = "pass@1"  # what chooses a learning rate


@dataclass(frozen=True)
class Spec:
    """An ablation: adapters x learning rates x seeds over one training config.

    Args:
        base: training config that every cell starts from, relative to the spec's file.
        adapters: what is compared.
        learning_rates: tried for every adapter that names none itself.
        seeds: of data order, rollouts and initialization; the same for all.
        settings: overrides of the base, the same for every cell.
        baseline: label of the entry that the others are compared with.
        match_parameters: adapter whose number of trained parameters the others are brought to, or None.
        search_seeds: seeds that choose each entry's learning rate, on the validation split; only the chosen rate is
            then run with `seeds`, which make the table.  Empty: all of `seeds` run at every rate and choose.
        scoring: how policies are scored.
    """

    base: str
    adapters: tuple[Entry, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    baseline: str
    settings: dict[str, Any] = field(default_factory=dict)
    match_parameters: str | None = None
    search_seeds: tuple[int, ...] = ()
    scoring: Scoring = field(default_factory=Scoring)

    @property
    def choosing_seeds(self) -> tuple[int, ...]:
        return self.search_seeds or self.seeds

    def rates_of(self, entry: Entry) -> tuple[float, ...]:
        return entry.learning_rates or self.learning_rates


@dataclass(frozen=True)
class Cell:
    """One training run: entry, learning rate and seed."""

    label: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label}/lr-{self.learning_rate:g}/seed-{self.seed}"


def load_spec(path: Path) -> Spec:
    """The spec in a YAML file.

    Raises:
        ValueError: for unknown keys, unknown adapters, labels or baselines, and empty lists, all in one message.
    """
    raw = read_yaml(str(path))
    refuse_unknown(raw, Spec, str(path))
    entries = []
    for item in raw.get("adapters") or []:
        values = {"adapter": item} if isinstance(item, str) else dict(item)
        refuse_unknown(values, Entry, f"adapters of {path}")
        values["learning_rates"] = tuple(float(rate) for rate in values.get("learning_rates", ()))
        values.setdefault("label", str(values.get("adapter", "")).replace(":", "-"))
        entries.append(Entry(**values))
    scoring = dict(raw.get("scoring") or {})
    refuse_unknown(scoring, Scoring, f"scoring of {path}")
    if "k" in scoring:
        scoring["k"] = tuple(scoring["k"])
    missing = [key for key in ("base", "seeds", "baseline") if not raw.get(key)]
    spec = Spec(
        base=str((path.parent / str(raw.get("base"))).resolve()),
        adapters=tuple(entries),
        learning_rates=tuple(float(rate) for rate in raw.get("learning_rates") or ()),
        seeds=tuple(raw.get("seeds") or ()),
        baseline=str(raw.get("baseline")),
        settings=dict(raw.get("settings") or {}),
        match_parameters=raw.get("match_parameters"),
        search_seeds=tuple(raw.get("search_seeds") or ()),
        scoring=Scoring(**scoring),
    )
    if faults := [f"{key} is not set" for key in missing] + spec_faults(spec):
        raise ValueError(f"{path}: " + "; ".join(faults))
    return spec


def spec_faults(spec: Spec) -> list[str]:
    labels = [entry.label for entry in spec.adapters]
    faults = [] if spec.adapters else ["adapters is empty"]
    faults += [f"label {label!r} occurs twice" for label in sorted(set(labels)) if labels.count(label) > 1]
    faults += [f"label {label!r} is no file name" for label in labels if not re.fullmatch(r"[\w.-]+", label)]
    faults += [f"{e.label} has no learning_rates" for e in spec.adapters if not spec.rates_of(e)]
    for name in [entry.adapter for entry in spec.adapters] + [spec.match_parameters or "fura"]:
        try:
            find_method(name)
        except ValueError as error:
            faults.append(str(error))
    if spec.baseline not in labels:
        faults.append(f"baseline={spec.baseline!r} is not one of the labels {', '.join(labels)}")
    for key, seeds in (("seeds", spec.seeds), ("search_seeds", spec.search_seeds)):
        faults += [f"{key} names {seed} twice" for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1})]
    own = sorted({"adapter", "adapter_kwargs", "learning_rate", "seed", "output_dir"} & spec.settings.keys())
    faults += [f"settings.{key} is what the ablation varies" for key in own]
    return faults


def refuse_unknown(values: dict[str, Any], cls: type, where: str) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown setting {validation.unknown(unknown[0], where, sorted(known))}")


def search_cells(spec: Spec) -> list[Cell]:
    """The runs that choose learning rates: every entry at every rate, seeds innermost."""
    return [
        Cell(entry.label, rate, seed)
        for entry in spec.adapters
        for rate, seed in product(spec.rates_of(entry), spec.choosing_seeds)
    ]


def table_cells(spec: Spec, rates: Mapping[str, float]) -> list[Cell]:
    """The runs that make the table: every entry that has a chosen rate, at that rate, with all seeds."""
    return [
        Cell(entry.label, rates[entry.label], seed)
        for entry in spec.adapters
        if entry.label in rates
        for seed in spec.seeds
    ]


def scored_splits(spec: Spec, cell: Cell) -> list[str]:
    """What a run is scored on: the validation split where it helps to choose, the test split where it is reported."""
    uses = {"validation": cell.seed in spec.choosing_seeds, "test": cell.seed in spec.seeds}
    return [split for split, used in uses.items() if used]


def training_options(spec: Spec, cell: Cell, adapter_kwargs: dict[str, Any], output_dir: Path) -> list[str]:
    """The training script's options for a cell.  Nothing but adapter, learning rate and seed differs between cells."""
    [entry] = [entry for entry in spec.adapters if entry.label == cell.label]
    options = ["--config", spec.base]
    for key, value in spec.settings.items():
        options += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    options += ["--adapter", entry.adapter, "--learning_rate", repr(cell.learning_rate), "--seed", str(cell.seed)]
    options += ["--output_dir", str(output_dir)]
    if "eval_strategy" not in spec.settings:  # held-out accuracy during training is for its curve alone
        options += ["--eval_problems", "0"]
    return options + (["--adapter_kwargs", json.dumps(adapter_kwargs)] if adapter_kwargs else [])


def matched_settings(spec: Spec) -> dict[str, dict[str, Any]]:
    """label -> adapter_kwargs, brought to the budget of `match_parameters` where that is set."""
    if spec.match_parameters is None:
        return {entry.label: entry.adapter_kwargs for entry in spec.adapters}
    from transformers import AutoConfig

    from fura_rl.adapters.budget import count_trained, match_budget
    from fura_rl.config import parse_arguments, resolve_model

    arguments = parse_arguments(["--config", spec.base])
    model_config = AutoConfig.from_pretrained(resolve_model(arguments.model.model_name_or_path))
    targets = arguments.script.adapter_target_modules
    budget = count_trained(spec.match_parameters, model_config, arguments.model, targets)
    return {
        entry.label: match_budget(entry.adapter, budget, model_config, arguments.model, targets, entry.adapter_kwargs)
        for entry in spec.adapters
    }
