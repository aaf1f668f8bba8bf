"""The folder of an evaluation: its settings, every sample as a line of JSON, its scores.

    config.json      what was asked for and what it ran on; a run in this folder goes on only with the same settings
    samples.jsonl    one line a sample, written batch by batch
    summary.json     the scores, with intervals

A batch is written at once and counts only when it is whole, so a killed run loses at most the batch in progress, and
goes on to the very file that an unkilled one writes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fura_rl.report import write_json

CONFIG, SAMPLES, SUMMARY = "config.json", "samples.jsonl", "summary.json"


@dataclass(frozen=True)
class RunFolder:
    """One benchmark's evaluation of one model."""

    path: Path

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], environment: dict[str, Any]) -> RunFolder:
        """A new folder, or an old one of the same settings.

        Raises:
            ValueError: where the folder holds a run of other settings, naming those that differ.
        """
        settings = json.loads(json.dumps(settings))
        file = path / CONFIG
        if file.is_file():
            old = json.loads(file.read_text())["settings"]
            differing = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
            if differing:
                shown = ", ".join(f"{key}: {old.get(key)!r} there, {settings.get(key)!r} now" for key in differing)
                raise ValueError(
                    f"--output {str(path)!r} holds another run ({shown}); name another folder or delete it"
                )
            return cls(path)
        if (path / SAMPLES).exists():
            raise ValueError(f"--output {str(path)!r} has {SAMPLES} but no {CONFIG}; name another folder or delete it")
        path.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": settings, "environment": environment})
        return cls(path)

    def samples(self) -> list[dict[str, Any]]:
        """Every sample that was written whole; a line cut short by a kill is left out."""
        file = self.path / SAMPLES
        rows = []
        for line in file.read_text().splitlines() if file.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the kill struck here, and nothing follows
        return rows

    def keep_whole_batches(self, wanted: dict[tuple[str, int], int]) -> set[tuple[str, int]]:
        """Drop the samples of batches that are not whole; the (pass, first problem) of those that are.

        `wanted` tells how many samples each batch has.
        """
        rows = self.samples()
        counts = Counter((row["pass"], row["batch"]) for row in rows)
        whole = {batch for batch, count in counts.items() if count == wanted.get(batch)}
        kept = "".join(json.dumps(row) + "\n" for row in rows if (row["pass"], row["batch"]) in whole)
        temporary = self.path / f"{SAMPLES}.tmp"
        temporary.write_text(kept)
        os.replace(temporary, self.path / SAMPLES)
        return whole

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        with open(self.path / SAMPLES, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def settings(self) -> dict[str, Any]:
        """Raises ValueError where this is no folder of an evaluation."""
        file = self.path / CONFIG
        if not file.is_file():
            raise ValueError(f"{str(self.path)!r} is no folder of an evaluation: it has no {CONFIG}")
        return json.loads(file.read_text())["settings"]

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / SUMMARY, summary)
