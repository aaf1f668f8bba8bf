"""Checkpoints are whole or not there, whatever was killed, torn or full."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.utils import RepeatSampler

from fura_rl import checkpoint
from fura_rl.config import DATACLASSES, parse_arguments
from fura_rl.randomness import drawing_from, rollout_seed
from fura_rl.run import find_checkpoint
from fura_rl.trainer import FuraGRPOTrainer, OrderOfEpoch


def staged(output_dir, step, *, sealed=True, content="weights"):
    folder = output_dir / checkpoint.UNFINISHED / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "model.bin").write_text(content)
    (folder / checkpoint.STATE).write_text("{}")
    if sealed:
        checkpoint.seal(folder)
    return folder


def written(output_dir, step, **options):
    final = output_dir / f"checkpoint-{step}"
    checkpoint.publish(staged(output_dir, step, **options), final)
    return final


def names(output_dir):
    return [path.name for path in checkpoint.checkpoints(output_dir)]


def test_the_newest_whole_checkpoint_is_found_by_its_number(tmp_path):
    assert checkpoint.last_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        written(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.last_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize("fault", ["truncated", "missing", "state", "empty", "seal"])
def test_a_torn_checkpoint_is_passed_over(tmp_path, fault, caplog):
    written(tmp_path, 1)
    torn = written(tmp_path, 2)
    if fault == "truncated":
        os.truncate(torn / "shards" / "model.bin", 3)
    elif fault == "missing":
        (torn / "shards" / "model.bin").unlink()
    elif fault == "state":
        os.truncate(torn / checkpoint.STATE, 1)
    elif fault == "seal":
        os.truncate(torn / checkpoint.SEAL, 5)
    else:
        for path in (torn / checkpoint.STATE, torn / checkpoint.SEAL):
            path.unlink()
    assert checkpoint.last_checkpoint(tmp_path).name == "checkpoint-1"
    assert "checkpoint-2" in caplog.text
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.whole(tmp_path, str(torn))
    assert checkpoint.whole(tmp_path, True).name == "checkpoint-1"


def test_what_a_kill_leaves_is_finished_or_removed(tmp_path):
    written(tmp_path, 1)
    staged(tmp_path, 2)  # killed between seal and rename
    staged(tmp_path, 3, sealed=False)  # killed while it was written
    (tmp_path / checkpoint.UNFINISHED / "discarded-checkpoint-0").mkdir()  # killed while it was deleted
    checkpoint.clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / checkpoint.UNFINISHED).exists()


def test_a_step_that_is_saved_again_replaces_the_older_checkpoint(tmp_path):
    written(tmp_path, 1, content="old")
    final = written(tmp_path, 1, content="new and longer")
    assert (final / "shards" / "model.bin").read_text() == "new and longer"
    assert checkpoint.damage(final) is None


def test_the_limit_never_takes_the_only_whole_checkpoint(tmp_path):
    for step in (1, 2, 3):
        written(tmp_path, step)
    os.truncate(tmp_path / "checkpoint-3" / "shards" / "model.bin", 1)
    checkpoint.rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert checkpoint.last_checkpoint(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, 1, [1, 2, 3, 4]), (5, 1, [1, 2, 3, 4]), (3, 1, [1, 3, 4]), (2, 1, [1, 4]), (1, 1, [1, 4]),
        (2, None, [3, 4]), (1, None, [4]), (2, 4, [3, 4]),
    ],
)  # fmt: skip
def test_the_limit_keeps_the_newest_and_the_best_as_transformers_does(limit, best, kept, tmp_path):
    for step in (1, 2, 3, 4):
        written(tmp_path, step)
    protected = str(tmp_path / f"checkpoint-{best}") if best else None
    theirs = tmp_path / "theirs"
    for step in (1, 2, 3, 4):
        (theirs / f"checkpoint-{step}").mkdir(parents=True)
    rotate_checkpoints(str(theirs), limit, str(theirs / f"checkpoint-{best}") if best else None)
    assert names(theirs) == [f"checkpoint-{step}" for step in kept]
    checkpoint.rotate(tmp_path, limit, protected)
    assert names(tmp_path) == names(theirs)


def test_the_best_checkpoint_is_known_by_its_folder_however_the_path_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = SimpleNamespace(best_model_checkpoint=None, save_to_json=lambda path: None)
    trainer = SimpleNamespace(state=state, checkpoint_writers=[], args=SimpleNamespace(save_total_limit=1))
    for step in (5, 6, 7):
        folder = staged(Path("out"), step, sealed=False)
        if step == 5:  # as transformers joins it to output_dir="./out/"
            state.best_model_checkpoint = f"./out//{folder.relative_to('out')}"
        FuraGRPOTrainer._publish_checkpoint(trainer, folder, Path("out") / folder.name)
    assert Path(state.best_model_checkpoint) == Path("out/checkpoint-5")
    assert names(Path("out")) == ["checkpoint-5", "checkpoint-7"]


def test_weights_that_are_not_finite_are_in_no_checkpoint(tmp_path):
    policy = torch.nn.Linear(4, 4)
    policy.bias.data[1] = float("nan")
    trainer = SimpleNamespace(
        _get_output_dir=lambda trial: str(tmp_path), state=SimpleNamespace(global_step=3),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=policy,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"1 of 2 trained tensors are not finite at step 3.*last checkpoint"):
        FuraGRPOTrainer._save_checkpoint(trainer, policy, None)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*file/run.*cannot be written to"):
        checkpoint.check_output_dir(tmp_path / "file" / "run")
    checkpoint.check_output_dir(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_refused_before_the_first_step(small_disk):
    checkpoint.check_output_dir(small_disk / "run")
    with pytest.raises(checkpoint.CheckpointError, match=r"0\.3 MB free.*10\.0 MB: nothing"):
        checkpoint.check_room(small_disk, 10_000_000, "nothing has been trained")
    (small_disk / "filler").write_bytes(b"\0" * 250_000)
    with pytest.raises(ValueError, match="No space left on device"):
        checkpoint.check_output_dir(small_disk / "run")


def test_only_settings_of_numbers_are_compared():
    recorded = checkpoint.plain({"learning_rate": 1e-3, "output_dir": "a", "adapter_kwargs": {"block_size": (1, 2)}})
    now = {"learning_rate": 2e-3, "output_dir": "b", "adapter_kwargs": {"block_size": (1, 2)}}
    assert checkpoint.changed_settings(recorded, now) == {"learning_rate": (1e-3, 2e-3)}
    assert checkpoint.changed_settings(recorded | {"seed": 1}, now | {"learning_rate": 1e-3}) == {"seed": (1, None)}


def test_the_settings_that_are_not_compared_exist():
    known = {field.name for cls in DATACLASSES for field in dataclasses.fields(cls)}
    assert known >= checkpoint.SETTINGS_OF_NO_NUMBER


def test_draws_come_from_the_seed_alone_and_leave_the_callers_generators_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    drawn = []
    for _ in range(2):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        with drawing_from(2**47 + 5):
            drawn.append(draw())
            draw()
        assert draw() == expected
        torch.rand(3)
    assert drawn[0] == drawn[1]


def test_every_place_in_a_run_has_its_own_rollout_seed():
    places = [
        {"seed": seed, "step": step, "call": call, "training": training, "engine": engine}
        for seed in (0, 1)
        for step in range(5)
        for call in (0, 1)
        for training in (True, False)
        for engine in (0, 1, 2)
    ]
    seeds = {rollout_seed(**place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert rollout_seed(**places[0]) == rollout_seed(**places[0])


def test_rollouts_are_a_function_of_seed_and_place_and_leave_the_trainers_draws_alone():
    def rollouts(step, seed=0, calls=1):
        place = SimpleNamespace(
            state=SimpleNamespace(global_step=step), model=SimpleNamespace(training=True), _rollouts_at=(-1, True, 0),
            accelerator=SimpleNamespace(process_index=0), args=SimpleNamespace(seed=seed, vllm_tensor_parallel_size=1),
            vllm_generation=SimpleNamespace(mode="colocate"),
        )  # fmt: skip
        place._draws = functools.partial(FuraGRPOTrainer._draws, place)
        generate = FuraGRPOTrainer._seeded(place, lambda: torch.rand(8).tolist())
        return [generate() for _ in range(calls)]

    torch.manual_seed(7)
    expected = torch.rand(1)
    first, second = rollouts(3, calls=2)
    assert first != second
    torch.manual_seed(7)
    assert rollouts(3, calls=2) == [first, second]
    assert torch.rand(1) == expected
    assert rollouts(4) != [first]
    assert rollouts(3, seed=1) != [first]


def test_a_resumed_epoch_has_the_order_of_the_epoch():
    def sampler():
        return RepeatSampler(range(20), mini_repeat_count=2, batch_size=4, seed=5)

    straight, control = sampler(), TrainerControl()
    orders = [list(straight) for _ in range(3)]  # one epoch after another, as TRL draws them
    assert orders[0] != orders[1]
    for epoch, order in enumerate(orders):
        resumed = sampler()
        OrderOfEpoch(resumed).on_epoch_begin(None, TrainerState(epoch=epoch + 0.3 * (epoch > 0)), control)
        assert list(resumed) == order
    unshuffled = RepeatSampler(range(4), mini_repeat_count=1, shuffle=False)
    OrderOfEpoch(unshuffled).on_epoch_begin(None, TrainerState(epoch=1), control)
    assert list(unshuffled) == list(SequentialSampler(range(4)))


def arguments(output_dir, *more):
    options = ["--model_name_or_path", "quickstart", "--dataset_name", "quickstart", "--bf16", "false"]
    return parse_arguments([*options, "--use_cpu", "true", "--output_dir", str(output_dir), *more])


def found(output_dir, *more):
    given = arguments(output_dir, *more)
    path = find_checkpoint(given, checkpoint.plain(given.resolved()))
    return None if path is None else path.name


def test_the_same_command_starts_a_run_and_continues_it(tmp_path, caplog):
    assert found(tmp_path) is None
    checkpoint.record_settings(written(tmp_path, 7), arguments(tmp_path).resolved())
    assert found(tmp_path) == found(tmp_path, "--resume_from_checkpoint", "latest") == "checkpoint-7"
    assert found(tmp_path, "--save_steps", "3", "--report_to", "none", "--alarm_patience", "2") == "checkpoint-7"
    assert found(tmp_path, "--dry_run") is None
    assert not caplog.text


def test_other_settings_are_refused_and_taken_only_with_a_named_checkpoint(tmp_path, caplog):
    folder = written(tmp_path, 7)
    checkpoint.record_settings(folder, arguments(tmp_path).resolved())
    with pytest.raises(ValueError, match=r"step 7 with other settings: learning_rate=0\.5 \(there 1e-06\)"):
        found(tmp_path, "--learning_rate", "0.5")
    assert found(tmp_path, "--learning_rate", "0.5", "--resume_from_checkpoint", str(folder)) == "checkpoint-7"
    assert "learning_rate=0.5 (there 1e-06)" in caplog.text


def test_a_checkpoint_that_was_asked_for_must_be_there(tmp_path):
    for wanted in ("true", str(tmp_path / "checkpoint-3")):
        with pytest.raises(ValueError, match="no whole checkpoint"):
            found(tmp_path, "--resume_from_checkpoint", wanted)
