"""`metrics.jsonl` in the run folder: every log line as it is made, once, also where a run is killed and resumed."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends each log line with its step and `time` (Unix seconds), flushed, so that a kill loses none.

    A resumed run first drops the lines after the step that it resumes from, which it is about to log again, and a last
    line that a kill cut short.  A number that is not finite is written as null, as JSON knows no other.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._file: IO[str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(self.path, state.global_step)
        self._file = open(self.path, "a")  # noqa: SIM115  it stays open as long as the training

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if self._file is not None and logs is not None:
            line = {"step": state.global_step, "time": time.time(), **logs}
            self._file.write(json.dumps({name: plain(value) for name, value in line.items()}) + "\n")
            self._file.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, and what is no line; all of them for step 0, where a run starts anew."""
    if not path.is_file():
        return
    kept = [text for text in path.read_text().splitlines(keepends=True) if 0 <= step_of(text) <= step] if step else []
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def step_of(text: str) -> int:
    """The step of one line, -1 where it was cut short."""
    try:
        return int(json.loads(text)["step"]) if text.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1
