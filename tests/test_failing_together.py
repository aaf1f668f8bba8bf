"""Two processes of a trainer whose policy is in pieces, one of which fails in the middle of a sync."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_remote_engine import Worker
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fura_rl.sync import update_watch
from fura_rl.sync.remote_engine import Follower, RemoteEngine
from fura_rl.sync.weight_sync import WeightSync

FAILS_AT = 3  # of the weights


def out_of_memory_at_a_weight(watch, weight, factors, rounding_seed):
    if weight.name == f"{FAILS_AT}.weight":
        raise MemoryError("no room for a sample")


def trainer(rank, failing, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    policy = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(8)])
    fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
    engine = Follower(torch.float32) if rank else RemoteEngine(Worker())
    sync = WeightSync(policy, engine, [1, 2], score=lambda *_: torch.zeros(1))
    if rank == failing:
        update_watch.UpdateWatch.note = out_of_memory_at_a_weight
    try:
        sync.sync()
        words = "none"
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    with open(f"{folder}/{rank}", "w") as file:
        file.write(words)
    os._exit(0)  # a group of which one is lost takes its time to end


@pytest.mark.parametrize("failing", [0, 1], ids=["the one that sends", "another one"])
def test_a_process_that_fails_between_two_gathers_stops_all_of_them_with_its_words(failing, tmp_path):
    mp.spawn(trainer, (failing, str(tmp_path)), nprocs=2)
    words = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert words[failing] == "MemoryError: no room for a sample"
    assert words[1 - failing] == f"PeerFailedError: process {failing} of the trainer failed: {words[failing]}"
