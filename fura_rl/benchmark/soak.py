"""A long run watched from outside: does the memory, the number of open files or threads, or the time of a step grow?

Runs `launch/grpo_math.py` with the quickstart's settings for `--steps` steps and looks every few seconds at each of its
processes.  What grows is judged after a warm-up, by the median of a window then and of one at the end, and by the low
points of both: what is held between steps, and what a step takes that nothing else on the machine has slowed down.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fura_rl import metrics_file
from fura_rl.benchmark.measure import Settings
from fura_rl.benchmark.report import pyplot_or_none
from fura_rl.serve import die_with_parent

REPOSITORY = Path(__file__).resolve().parents[2]
INTERVAL = 1.0, 3.0  # seconds, drawn: looks in step with the steps would see one phase of them
LOW = 0.05  # quantile
WARM_UP = 200  # steps: allocators, caches and kernels have seen every shape by then
TAIL = 65536  # bytes of the metrics file, in which its last line lies


@dataclass(frozen=True)
class Sample:
    """One look at all processes of one role."""

    step: int
    role: str
    memory_mb: float  # what the processes take: a page that several share counts once, in parts (Linux's PSS)
    handles: int
    threads: int


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per quantity and role: its level after the warm-up, at the end, and by how much it grew.

    Raises:
        RuntimeError: where the run fails, with the end of what it said.
    """
    folder = settings.out / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        *(sys.executable, str(REPOSITORY / "launch" / "grpo_math.py")),
        *("--config", str(REPOSITORY / "configs" / "quickstart.yaml"), "--max_steps", str(settings.steps)),
        *("--use_cpu", str(settings.device.type == "cpu").lower(), "--output_dir", str(folder / "run")),
    ]
    metrics = folder / "run" / metrics_file.FILE
    said = folder / "run.txt"
    started = {"cwd": REPOSITORY, "preexec_fn": die_with_parent}
    with open(said, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, **started) as process:
        try:
            samples = list(watch(process, metrics, settings.steps))
        finally:
            process.terminate()
    if process.returncode:
        raise RuntimeError(f"the run ended with status {process.returncode}: {said.read_text()[-2000:]}")
    times = step_times(metrics)
    (folder / "samples.json").write_text(json.dumps([asdict(sample) for sample in samples]) + "\n")
    plot(folder / "soak.png", samples, times)
    return rows(samples, times, settings.steps)


def watch(process: subprocess.Popen, metrics: Path, steps: int) -> Iterator[Sample]:
    """Samples of every role until the process ends."""
    from tqdm import tqdm

    with tqdm(total=steps, unit="step", desc="soak") as bar:
        while process.poll() is None:
            step = last_step(metrics)
            bar.update(step - bar.n)
            yield from look(process.pid, step)
            time.sleep(random.uniform(*INTERVAL))
        bar.update(last_step(metrics) - bar.n)


def look(pid: int, step: int) -> list[Sample]:
    import psutil

    found: dict[str, list[tuple[float, int, int]]] = {}
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with process.oneshot():
                level = process.memory_full_info().pss / 2**20, process.num_fds(), process.num_threads()
                found.setdefault(role_of(process.name(), process.cmdline()), []).append(level)
    except psutil.Error:  # one has ended meanwhile: the next look will do
        return []
    return [Sample(step, role, *map(sum, zip(*levels, strict=True))) for role, levels in found.items()]


def role_of(name: str, command: list[str]) -> str:
    if name.startswith("VLLM") or any("EngineCore" in part for part in command):
        return "engine"
    return "verifiers" if any(part.startswith("rewards.") for part in command) else "trainer"


def last_step(metrics: Path) -> int:
    """The step of the last whole line, 0 where there is none."""
    if not metrics.is_file():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL))
        steps = [metrics_file.step_of(line.decode(errors="replace")) for line in file.readlines()]
    return max([0, *steps])


def step_times(metrics: Path) -> dict[int, float]:
    """Seconds from the line before to the line of each step."""
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    times = {entry["step"]: entry["time"] for entry in entries if "loss" in entry}
    return {step: times[step] - times[step - 1] for step in times if step - 1 in times}


def rows(samples: list[Sample], times: dict[int, float], steps: int) -> list[dict[str, Any]]:
    window = max(1, steps // 10)
    warm_up = min(WARM_UP, window)

    def row(
        what: str, levels: list[tuple[int, float]], of: Callable[[list[float]], float] = statistics.median
    ) -> dict[str, Any]:
        early = [level for step, level in levels if warm_up < step <= warm_up + window]
        late = [level for step, level in levels if steps - window < step <= steps]
        start, end = (of(part) if part else float("nan") for part in (early, late))
        return {
            "what": what, f"after step {warm_up}": start, f"last {window} steps": end,
            "growth": f"{end / start - 1:+.1%}", "most": max((level for _, level in levels), default=0.0),
        }  # fmt: skip

    table = []
    for role in dict.fromkeys(sample.role for sample in samples):
        own = [sample for sample in samples if sample.role == role]
        memory = [(s.step, s.memory_mb) for s in own]
        table.append(row(f"{role}: memory, MB", memory))
        table.append(row(f"{role}: memory held between steps, MB", memory, low))
        table.append(row(f"{role}: open files", [(s.step, float(s.handles)) for s in own]))
        table.append(row(f"{role}: threads", [(s.step, float(s.threads)) for s in own]))
    return [*table, row("step, s", list(times.items())), row("fastest steps, s", list(times.items()), low)]


def low(levels: list[float]) -> float:
    return sorted(levels)[int(LOW * len(levels))]


def plot(path: Path, samples: list[Sample], times: dict[int, float]) -> None:
    """Memory, open files and step time against the step."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(3, 1, figsize=(7, 6), layout="constrained", sharex=True)
    for role in dict.fromkeys(sample.role for sample in samples):
        own = [sample for sample in samples if sample.role == role and sample.step]
        axes[0].plot([s.step for s in own], [s.memory_mb for s in own], label=role)
        axes[1].plot([s.step for s in own], [s.handles for s in own], label=role)
    axes[2].plot(list(times), list(times.values()), linewidth=0.5, color="0.4")
    for axis, title in zip(axes, ("memory, MB", "open files", "seconds a step"), strict=True):
        axis.set_title(title, loc="left")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    axes[2].set_xlabel("step")
    figure.savefig(path, dpi=144)
    pyplot.close(figure)
