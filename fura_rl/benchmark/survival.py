"""What a 16-bit engine leaves of the update, and what that costs: the quickstart task, arm by arm and seed by seed.

Every run starts from the embedded model with its weights on the bfloat16 grid, as published checkpoints have them.
A finished cell (arm, seed) is kept in `survival.json`, so that the study goes on where it was stopped.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl.benchmark.measure import Settings
from fura_rl.benchmark.report import pyplot_or_none
from fura_rl.quickstart import BASE_MODEL

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
IN_BFLOAT16 = ("--dtype", "bfloat16", "--bf16", "true")
ARMS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16, nearest": (*IN_BFLOAT16, "--vllm_dtype", "bfloat16"),
    "bfloat16, stochastic": (*IN_BFLOAT16, "--vllm_dtype", "bfloat16", "--fold_rounding", "stochastic"),
    "float16 engine": (*IN_BFLOAT16, "--vllm_dtype", "float16"),
}
# What is kept of a run: mean over its steps of a logged metric.
LOGGED = {
    "update_cosine": "sync/update_cosine",
    "logp_gap_mean": "sampling/sampling_logp_difference/mean",
    "logp_gap_max": "sampling/sampling_logp_difference/max",
    "probe_gap": "sync/probe_max_gap",
}
MEASURES = ("update_cosine", "update_cosine_first", "logp_gap_mean", "logp_gap_max", "probe_gap", "reward", "greedy")
LAST_STEPS = 10  # the reward is the mean over so many


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per arm: mean and standard deviation over the seeds that are finished, and how many those are."""
    settings.out.mkdir(parents=True, exist_ok=True)
    store = settings.out / "survival.json"
    cells: dict[str, dict[str, float]] = json.loads(store.read_text()) if store.is_file() else {}
    wanted = {
        f"{arm} | seed {seed} | {settings.steps} steps": (arm, seed)
        for seed in range(settings.seeds)  # every arm of a seed before the next, so that arms are compared on the same
        for arm in ARMS
    }
    with tempfile.TemporaryDirectory(prefix="fura-survival-") as scratch:
        model = make_base_model(Path(scratch) / "base")
        for key in settings.budget.units("survival", [key for key in wanted if key not in cells]):
            arm, seed = wanted[key]
            cells[key] = run_cell(settings, ARMS[arm], seed, model, Path(scratch) / "run")
            print(f"{key}: {cells[key]}", flush=True)
            store.write_text(json.dumps(cells, indent=1) + "\n")
    finished = {arm: [cells[key] for key, (name, _) in wanted.items() if name == arm and key in cells] for arm in ARMS}
    plot(settings.out / "survival.png", finished, settings.steps)
    return [summary(arm, runs) for arm, runs in finished.items() if runs]


def make_base_model(folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder)
    return folder


def run_cell(settings: Settings, arm: Sequence[str], seed: int, model: Path, output_dir: Path) -> dict[str, float]:
    """One training run of `launch/grpo_math.py`, in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from fura_rl.config import parse_arguments
    from fura_rl.run import prepare_run, score_held_out, train

    arguments = parse_arguments([
        *("--config", str(CONFIG), "--model_name_or_path", str(model), "--output_dir", str(output_dir)),
        *("--seed", str(seed), "--max_steps", str(settings.steps), "--save_strategy", "no", "--eval_samples", "4"),
        # the run logs how far the engine's log-probs are from the trainer's only where it corrects for it, as TRL does
        # unless told otherwise
        *("--vllm_importance_sampling_correction", "true", "--vllm_gpu_memory_utilization", "0.02"),
        *("--sync_probe_every", "1", "--use_cpu", str(settings.device.type == "cpu").lower(), *arm),
    ])  # fmt: skip
    started = time.perf_counter()
    run = prepare_run(arguments)
    train(run)
    greedy = score_held_out(run).greedy
    history = run.trainer.state.log_history
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    cell = {name: statistics.mean(logged(history, metric)) for name, metric in LOGGED.items()}
    moved = [value for value in logged(history, LOGGED["update_cosine"])[1:6]]  # the first sync has no update yet
    cell |= {
        "update_cosine_first": statistics.mean(moved),
        "reward": statistics.mean(rewards[-LAST_STEPS:]),
        "greedy": greedy,
        "greedy_before": run.before.greedy,
        "seconds": time.perf_counter() - started,
    }
    del run
    gc.collect()
    return cell


def logged(history: list[dict[str, Any]], metric: str) -> list[float]:
    return [float(entry[metric]) for entry in history if metric in entry]


def summary(arm: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    def spread(measure: str) -> str:
        values = [run[measure] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):.3g} +- {deviation:.2g}"

    return {"engine": arm, "seeds": len(runs), **{measure: spread(measure) for measure in MEASURES}}


def plot(path: Path, finished: dict[str, list[dict[str, float]]], steps: int) -> None:
    """One panel per question: what survives, how far engine and trainer are apart, what is learnt."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return
    shown = ("update_cosine_first", "logp_gap_mean", "greedy")
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3.4), layout="constrained")
    for axis, measure in zip(axes, shown, strict=True):
        for position, runs in enumerate(finished.values()):
            values = [run[measure] for run in runs]
            axis.plot([position] * len(values), values, "o", color=f"C{position}", alpha=0.6)
            if values:
                axis.hlines(statistics.mean(values), position - 0.3, position + 0.3, color=f"C{position}")
        axis.set_xticks(range(len(finished)), [arm.replace(", ", "\n").replace(" ", "\n") for arm in finished])
        axis.set_title(measure, loc="left")
        axis.grid(alpha=0.3)
    figure.suptitle(f"quickstart, {steps} steps; dots are seeds, lines their means", fontsize=9)
    figure.savefig(path, dpi=144)
    pyplot.close(figure)
