"""Checkpoints on disk that are whole or are not there: written aside, sealed, renamed, and found again.

A checkpoint is written to OUTPUT_DIR/_unfinished/checkpoint-N, sealed with the sizes of its files, and renamed to
OUTPUT_DIR/checkpoint-N, so that a kill at any moment leaves the checkpoints before it and nothing half-written under
that name.  What is in a checkpoint is the trainer's business.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fura_rl.redaction import redacted

logger = logging.getLogger(__name__)

UNFINISHED = "_unfinished"  # with an underscore in front, which transformers never uploads
SEAL = "sealed.json"
SETTINGS = "settings.json"
STATE = "trainer_state.json"  # transformers' own, the last file that it writes
PROBE_BYTES = 64 * 2**10
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

# Settings that change what is shown, kept or sent where, and no number of the training.
SETTINGS_OF_NO_NUMBER = frozenset({
    "output_dir", "run_name", "resume_from_checkpoint", "logging_strategy",
    "logging_first_step", "logging_steps", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm",
    "report_to", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "log_completions",
    "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo", "include_num_input_tokens_seen",
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint", "push_to_hub",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "local_rank",
    "eval_problems", "eval_samples", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "dataset_test_split",
    "dataset_eval_split", "metric_for_best_model", "greater_is_better", "dry_run",
    "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_pin_memory", "dataloader_persistent_workers", "skip_memory_metrics", "ddp_timeout",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
    "sync_transport", "sync_probe_every", "sync_probe_tolerance", "sync_audit_every",
})  # fmt: skip


class CheckpointError(OSError):
    """A checkpoint cannot be written, or the next one could not be; those before it are whole."""


@contextmanager
def a_full_disk_named(output_dir: Path) -> Iterator[None]:
    """Turns what a write raises where there is no room (of a log, completions, the report) into one message.

    Raises:
        CheckpointError: saying from where the same command goes on.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors tells the system's number in its text alone
        texts = [f"(os error {number})" for number in NO_ROOM]
        if getattr(error, "errno", None) not in NO_ROOM and not any(text in str(error) for text in texts):
            raise
        raise CheckpointError(
            f"output_dir={str(output_dir)!r} could not be written to: {cause_and_mend(error, output_dir)}"
        ) from error


def cause_and_mend(error: Exception, output_dir: Path) -> str:
    """How a message ends that says what could not be written."""
    last = last_checkpoint(output_dir)
    return (
        f"{str(error).splitlines()[0]}. Free some space there; the same command goes on from "
        f"{'the start' if last is None else last.name}"
    )


def step_of(checkpoint: Path) -> int | None:
    """N of a folder checkpoint-N, None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N, oldest first, whole or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=step_of)


def seal(folder: Path) -> int:
    """Put every file on the disk and note its size, as the last thing that is written; the bytes of all of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / SEAL).write_text(json.dumps({"bytes_of_file": sizes}, indent=1) + "\n")
    for path in (*files, folder / SEAL, folder):
        flush(path)
    return sum(sizes.values())


def flush(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """What makes `folder` no whole checkpoint, None for a whole one.

    One without a seal, of another trainer, counts as whole where its `trainer_state.json` can be read.
    """
    try:
        json.loads((folder / STATE).read_text())
        sealed = json.loads((folder / SEAL).read_text()) if (folder / SEAL).exists() else {"bytes_of_file": {}}
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    for name, size in sealed["bytes_of_file"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} has {found} bytes instead of {size}" if found is not None else f"{name} is missing"
    return None


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None.  Damaged newer ones are named in a warning."""
    for folder in reversed(checkpoints(output_dir)):
        fault = damage(folder)
        if fault is None:
            return folder
        logger.warning("%s is no whole checkpoint (%s) and is passed over", folder, fault)
    return None


def whole(output_dir: Path, wanted: str | bool) -> Path:
    """The checkpoint to resume from: the newest of the run folder for True, otherwise the folder that is named.

    Raises:
        ValueError: where there is none or it is damaged.
    """
    if wanted is True:
        newest = last_checkpoint(output_dir)
        if newest is None:
            raise ValueError(f"resume_from_checkpoint: there is no whole checkpoint in output_dir={str(output_dir)!r}")
        return newest
    fault = damage(Path(wanted))
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint={str(wanted)!r} is no whole checkpoint: {fault}; 'latest' takes the newest whole "
            "one of output_dir"
        )
    return Path(wanted)


def publish(staged: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; an older one of that name makes way."""
    if final.exists():
        discard(final)
    os.rename(staged, final)
    flush(final.parent)


def discard(folder: Path) -> None:
    """Delete a checkpoint; its name goes first, so that a kill in between leaves no half of it behind."""
    doomed = folder.parent / UNFINISHED / f"discarded-{folder.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, protected: str | None = None) -> None:
    """Keep `limit` whole checkpoints as transformers does: the newest, the `protected` one (the best model's), and the
    newest of the others."""
    if not limit or limit < 1:
        return
    whole = [path for path in checkpoints(output_dir) if damage(path) is None]
    kept = {*whole[-1:], *(path for path in whole if protected is not None and path == Path(protected))}
    others = [path for path in whole if path not in kept]
    room = max(0, limit - len(kept))
    for path in others[: max(0, len(others) - room)]:
        discard(path)


def clear_leftovers(output_dir: Path) -> None:
    """Finish or remove what a killed process left: a sealed checkpoint gets its name, the rest is deleted."""
    unfinished = output_dir / UNFINISHED
    for staged in checkpoints(unfinished):
        if (staged / SEAL).exists() and damage(staged) is None and not (output_dir / staged.name).exists():
            publish(staged, output_dir / staged.name)
    shutil.rmtree(unfinished, ignore_errors=True)


def check_output_dir(output_dir: Path) -> None:
    """Look before the first step whether files can be written.

    Raises:
        ValueError: where they cannot, with the reason.
    """
    probe = output_dir / f"{UNFINISHED}.{os.getpid()}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"\0" * PROBE_BYTES)
            flush(probe)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir={str(output_dir)!r} cannot be written to ({error.strerror or error}), so the run could save "
            "nothing: free some space there or name another folder"
        ) from error


def check_room(output_dir: Path, needed: int, reached: str) -> None:
    """Look whether a checkpoint of `needed` bytes still fits, while there is nothing to lose.

    Raises:
        CheckpointError: where it does not; `reached` says what has been saved.
    """
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise CheckpointError(
            f"output_dir={str(output_dir)!r} has {free / 1e6:.1f} MB free and the next checkpoint takes about "
            f"{needed / 1e6:.1f} MB: {reached}. Free some space or lower save_total_limit; the same command goes on"
        )


def changed_settings(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (value recorded, value now), of those that differ and that a number of the training depends on."""
    now = plain(current)
    return {
        name: (recorded.get(name), now.get(name))
        for name in sorted((recorded.keys() | now.keys()) - SETTINGS_OF_NO_NUMBER)
        if recorded.get(name) != now.get(name) and not name.startswith("alarm_")
    }


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they read back from JSON, without secrets."""
    return redacted(json.loads(json.dumps(settings, default=str)))


def recorded_settings(checkpoint: Path) -> dict[str, Any] | None:
    file = checkpoint / SETTINGS
    return json.loads(file.read_text()) if file.is_file() else None


def record_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Note in a checkpoint what `changed_settings` compares."""
    (checkpoint / SETTINGS).write_text(json.dumps(plain(settings), indent=1) + "\n")
