"""Two evaluations of the same problems: paired differences with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fura_rl.evaluation.run_folder import CONFIG, RunFolder
from fura_rl.evaluation.scores import paired_differences, problem_values

MUST_AGREE = ("benchmark", "problems", "content_hash", "passes")


@dataclass(frozen=True)
class Comparison:
    """What B gains over A on one benchmark: measure -> mean difference and its 95% interval."""

    benchmark: str
    problems: int
    differences: dict[str, dict[str, float]]


def compare(first: Path, second: Path) -> list[Comparison]:
    """The paired differences, second minus first, of every benchmark that both folders hold.

    Raises:
        ValueError: where they share none, or differ in problems or sampling.
    """
    left, right = benchmark_folders(first), benchmark_folders(second)
    common = [name for name in left if name in right]
    if not common:
        raise ValueError(f"{first} holds {', '.join(left) or 'no evaluation'}, {second} {', '.join(right) or 'none'}")
    return [compare_benchmark(name, left[name], right[name]) for name in common]


def benchmark_folders(path: Path) -> dict[str, RunFolder]:
    folders = [path] if (path / CONFIG).is_file() else sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
    opened = [RunFolder(folder) for folder in folders]
    return {folder.settings()["benchmark"]: folder for folder in opened}


def compare_benchmark(name: str, first: RunFolder, second: RunFolder) -> Comparison:
    settings = first.settings(), second.settings()
    if different := [key for key in MUST_AGREE if settings[0][key] != settings[1][key]]:
        shown = "; ".join(f"{key}: {settings[0][key]} against {settings[1][key]}" for key in different)
        raise ValueError(f"{first.path} and {second.path} cannot be compared problem by problem: {shown}")
    ks = [k for k in settings[0]["ks"] if k in settings[1]["ks"]]
    values = []
    for folder, its in zip((first, second), settings, strict=True):
        rows, expected = folder.samples(), sum(p["n"] for p in its["passes"].values()) * its["problems"]
        if len(rows) != expected:
            raise ValueError(f"{folder.path} is not finished: {len(rows)} of {expected} samples; run it again to go on")
        values.append(problem_values(rows, ks))
    return Comparison(name, settings[0]["problems"], paired_differences(*values))
