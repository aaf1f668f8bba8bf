"""A run that is killed and started again by the same command is the run that was never killed, bit for bit.

FURA_KILLS=10 python -m pytest -m slow tests/test_resume.py -k random_moments     ten kills of every kind of run
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from preloaded import started
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

KILLS = os.environ.get("FURA_KILLS")
STEPS = 12
PATIENCE = 300  # seconds until a run must have come up

# A generation serves 4 steps, an epoch has 8, a log covers 2, and every step is saved: also between all of these.
SETTINGS = [
    *("--model_name_or_path", "quickstart", "--prompt_template", "{problem}", "--dtype", "float32", "--bf16", "false"),
    *("--max_steps", str(STEPS), "--learning_rate", "5e-3", "--num_generations", "4", "--beta", "0.0"),
    *("--per_device_train_batch_size", "8", "--steps_per_generation", "2", "--num_iterations", "2"),
    *("--max_completion_length", "16", "--use_vllm", "true", "--vllm_gpu_memory_utilization", "0.1"),
    *("--vllm_max_model_length", "96", "--gradient_checkpointing", "false", "--report_to", "none", "--seed", "3"),
    *("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2", "--logging_steps", "2"),
    *("--log_completions", "true", "--num_completions_to_print", "1"),
    *("--sync_audit_every", "1"),  # what an audit saw is compared too, and shall not depend on timing
]

KINDS = {
    "fura": [],
    # every other state that a run may have: a large core in 4 bits, rounding drawn at random, an engine of 16 bits
    "quantized core, stochastic rounding": [
        *("--adapter", "qfura", "--vllm_dtype", "bfloat16", "--fold_rounding", "stochastic"),
    ],
    "lora": ["--adapter", "lora", "--lora_r", "4"],
    "sparse optimizer": ["--adapter", "lift", "--adapter_kwargs", '{"rank": 4, "filter_rank": 8, "refresh_steps": 5}'],
    "all weights": ["--adapter", "full", "--learning_rate", "5e-4"],
}
KILLS_IN_CI = {"fura": 3, "quantized core, stochastic rounding": 1}


def command(folder: Path, *more: str) -> list[str]:
    """Twelve steps on ten problems, of which an epoch takes eight, in an order of its own."""
    data = folder.parent / "problems.jsonl"
    if not data.exists():
        rows = [{"problem": f"{11 * a}+{7 * b}=", "answer": str(11 * a + 7 * b)} for a in range(1, 6) for b in (3, 5)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*SETTINGS, "--dataset_name", str(data), "--output_dir", str(folder), *more]


class Launched:
    """A run in another process."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder, self.log = folder, folder.parent / f"{folder.name}.txt"
        self.ready = folder / "resolved_config.yaml"  # written when everything is loaded
        self.ready.unlink(missing_ok=True)
        self.found = set(folder.glob("checkpoint-*"))
        self.process = started("launch/grpo_math.py", *command(folder, *more), log=self.log)

    def has_saved(self) -> bool:
        return bool(set(self.folder.glob("checkpoint-*")) - self.found)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)

    def finish(self) -> tuple[float, float]:
        """Seconds from all being loaded to the first checkpoint, and from there to the end."""
        self.wait_until(self.ready.exists)
        ready = time.monotonic()
        self.wait_until(lambda: self.has_saved() or not self.process.is_alive())
        saved = time.monotonic()
        self.process.join(PATIENCE)
        assert self.process.exitcode == 0, self.said()
        return saved - ready, time.monotonic() - saved

    def kill_after(self, seconds: float, event: Callable[[], bool]) -> bool:
        """SIGKILL `seconds` after `event`; False where the run was finished by then."""
        self.wait_until(lambda: event() or not self.process.is_alive())
        self.process.join(seconds)
        killed = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return killed

    def said(self) -> str:
        return self.log.read_text()[-4000:]


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry without wall times and without what proves the engine: each start probes it once more, and audits the
    whole update since the base where a run that goes on audits that since the last sync."""
    skipped = ("seconds", "time", "_per_second", "probe_max_gap", "audit_gain_min")
    return {key: value for key, value in entry.items() if not any(word in key for word in skipped)}


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a finished run that must be the same in every bit."""
    last = folder / f"checkpoint-{STEPS}"
    state = json.loads((last / "trainer_state.json").read_text())
    return {
        "policy": load_file(next(folder.glob("*model.safetensors"))),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(last / "scheduler.pt", weights_only=True),
        "generators": torch.load(last / "rng_state.pth", weights_only=False),
        "history": [timeless(entry) for entry in state["log_history"]],
        "tokens": state["num_input_tokens_seen"],
        "rollouts": {
            file.name: pd.read_parquet(file).to_dict("list") for file in sorted((folder / "completions").glob("*"))
        },
    }


def different(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two outcomes differ; tensors in any bit."""
    if isinstance(a, dict):
        missing = [f"{path}/{key} in one only" for key in a.keys() ^ b.keys()]
        return missing + [line for key in a.keys() & b.keys() for line in different(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in different(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{path}: differ by up to {(a.double() - b.double()).abs().max():.3g}"]
    same = (a == b) if not hasattr(a, "shape") else bool((a == b).all())
    return [] if same or (a != a and b != b) else [f"{path}: {str(a)[:60]} and {str(b)[:60]}"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], tuple[dict[str, Any], tuple[float, float]]]:
    """kind of run -> its outcome, and the seconds that its parts take; run once."""

    @functools.cache
    def run(kind: str) -> tuple[dict[str, Any], tuple[float, float]]:
        folder = tmp_path_factory.mktemp("uninterrupted") / "run"
        seconds = Launched(folder, *KINDS[kind]).finish()
        return outcome(folder), seconds

    return run


@pytest.mark.parametrize("kind", KINDS if KILLS else KILLS_IN_CI)
def test_a_run_killed_at_random_moments_is_the_run_that_was_not(kind, uninterrupted, tmp_path):
    """One kill in three falls into the first generation of a start, the others between its first save and its end."""
    wanted = int(KILLS or KILLS_IN_CI[kind])
    expected, (first_step, other_steps) = uninterrupted(kind)
    moments = random.Random(os.environ.get("FURA_KILL_SEED", "0"))
    folder = tmp_path / "run"
    kills, told = 0, []
    while kills < wanted:
        run, early = Launched(folder, *KINDS[kind]), kills % 3 == 2
        moment = moments.uniform(0, first_step if early else other_steps * min(1, 2 / wanted))
        if not run.kill_after(moment, run.ready.exists if early else run.has_saved):
            assert different(expected, outcome(folder)) == [], told
            shutil.rmtree(folder)  # it came to its end: start over
            continue
        kills += 1
        told.append((round(moment, 2), sorted(path.name for path in folder.glob("*checkpoint*"))))
    print(told)
    Launched(folder, *KINDS[kind]).finish()
    assert different(expected, outcome(folder)) == [], told
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-11", f"checkpoint-{STEPS}"]
    assert not (folder / "_unfinished").exists()


@pytest.mark.parametrize(
    ("save_steps", "says"),
    [(1, "the same command goes on"), (4, "the same command goes on from checkpoint-4")],
    ids=["anything next", "a log next"],
)
def test_a_disk_that_fills_up_stops_the_run_with_one_message_and_loses_nothing(
    save_steps, says, uninterrupted, tmp_path
):
    """Where every step saves, a checkpoint or a log meets the full disk first; where every fourth does, the log."""
    disk = tmp_path / "run"  # the run folder alone: what the run says about it is kept elsewhere
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        settings = ["--save_steps", str(save_steps)]
        run = Launched(disk, *settings)
        # what still follows of the saving looks for room itself
        run.wait_until(lambda: (disk / "checkpoint-4").exists() and not (disk / "_unfinished").exists())
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        run.process.join(PATIENCE)
        assert run.process.exitcode == 1, run.said()
        assert "Traceback" not in run.said()
        assert "error: " in run.said()
        assert says in run.said()
        (disk / "filler").unlink()
        Launched(disk, *settings).finish()
        assert different(uninterrupted("fura")[0], outcome(disk)) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
