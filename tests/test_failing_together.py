"""Two processes of a trainer whose policy is in pieces, one of which fails in the middle of a sync."""

import itertools
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from test_remote_engine import Worker
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fura_rl.sync import fold_rules, update_watch
from fura_rl.sync.remote_engine import Follower, RemoteEngine
from fura_rl.sync.weight_sync import WeightSync

WEIGHTS = 8
FAILS_AT = 3  # of the weights


def whole_weights():
    return nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(WEIGHTS)])


def dora():
    """Of each weight the adapter is gathered, and then the norms that every process takes of its own rows."""
    targets = [str(index) for index in range(WEIGHTS)]
    return get_peft_model(whole_weights(), LoraConfig(r=2, target_modules=targets, use_dora=True))


def no_room_for_a_sample():
    def note(watch, weight, factors, rounding_seed):
        if weight.name == f"{FAILS_AT}.weight":
            raise MemoryError("no room for a sample")

    update_watch.UpdateWatch.note = note


def no_room_for_a_product():
    real, calls = fold_rules._float, itertools.count()

    def widened(tensor):
        if next(calls) == 3 * FAILS_AT:  # B, A and the magnitudes of each weight
            raise MemoryError("no room for a product")
        return real(tensor)

    fold_rules._float = widened


def no_room_for_norms():
    real, calls = fold_rules.by_rows, itertools.count()

    def fail(*_):
        raise MemoryError("no room for norms")

    def by_rows(tensor, compute):
        return real(tensor, fail if next(calls) == FAILS_AT else compute)

    fold_rules.by_rows = by_rows


def trainer(rank, failing, make_policy, bring_about, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    policy = make_policy()
    fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
    worker = Worker()
    engine = Follower(torch.float32) if rank else RemoteEngine(worker)
    sync = WeightSync(policy, engine, [1, 2], score=lambda *_: torch.zeros(1))
    if rank == failing:
        bring_about()
    try:
        sync.sync()
        words = "none"
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    with open(f"{folder}/{rank}", "w") as file:
        file.write(f"{words}\n{len(worker.served)}")
    os._exit(0)  # a group of which one is lost takes its time to end


def outcomes(*args):
    """What each process of `trainer` has raised, and how many weights the engine serves."""
    mp.spawn(trainer, args, nprocs=2)
    words, served = zip(*[(args[-1] / str(rank)).read_text().rsplit("\n", 1) for rank in (0, 1)], strict=True)
    return words, int(served[0])


FAILING = pytest.mark.parametrize("failing", [0, 1], ids=["the one that sends", "another one"])


@FAILING
def test_a_process_that_fails_between_two_gathers_stops_all_of_them_with_its_words(failing, tmp_path):
    words, _ = outcomes(failing, whole_weights, no_room_for_a_sample, tmp_path)
    assert words[failing] == "MemoryError: no room for a sample"
    assert words[1 - failing] == f"PeerFailedError: process {failing} of the trainer failed: {words[failing]}"


@pytest.mark.parametrize("fault", [no_room_for_a_product, no_room_for_norms])
@FAILING
def test_a_process_that_owes_others_what_it_fails_to_compute_stops_all_of_them_with_its_words(failing, fault, tmp_path):
    words, served = outcomes(failing, dora, fault, tmp_path)
    assert words[failing] == f"MemoryError: {fault.__name__.replace('_', ' ')}"
    assert words[1 - failing] == f"PeerFailedError: process {failing} of the trainer failed: {words[failing]}"
    assert served == 0, "what is owed is sent to no engine"
