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

from fura_rl.sync import fold_rules, message, update_watch
from fura_rl.sync.probe import StaleEngineError
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
    sync_of_two(rank, Worker(), make_policy, bring_about if rank == failing else None, folder)


def sync_of_two(rank, worker, make_policy, bring_about, folder, **settings):
    """The first sync of a policy in two pieces into `worker`; writes what it raised to `folder`."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    policy = make_policy()
    fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
    engine = Follower(torch.float32) if rank else RemoteEngine(worker)
    sync = WeightSync(policy, engine, [1, 2], score=lambda *_: torch.zeros(1), **settings)
    if bring_about:
        bring_about()
    try:
        sync.sync()
        words = f"none, {worker.commits}"
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


class WrongFor(Worker):
    """Serves other log-probs than the policy's at its first `times` probes."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def prompt_logprobs(self, token_ids):
        self.times -= 1
        return torch.full((len(token_ids) - 1,), float(self.times >= 0))


def prober(rank, times, folder):
    sync_of_two(rank, WrongFor(times), whole_weights, None, folder, audit_every=0)


def test_a_failing_probe_is_sent_once_more_by_all_processes_and_then_stops_them(tmp_path):
    for times in (1, 2):
        folder = tmp_path / str(times)
        folder.mkdir()
        mp.spawn(prober, (times, str(folder)), nprocs=2)
        first, second = ((folder / str(rank)).read_text().rpartition("\n")[0] for rank in (0, 1))
        if times == 1:
            assert (first, second) == ("none, [1, 1]", "none, []")
        else:
            assert first.startswith(
                "StaleEngineError: weight sync failed its proof: engine and trainer differ by 1 nats"
            )
            assert "sent once more; an audit finds no update" in first
            assert second == f"PeerFailedError: process 0 of the trainer failed: {first}"


def test_a_failing_probe_says_why_the_weights_could_not_be_sent_once_more(monkeypatch):
    monkeypatch.setattr(message, "KEPT_BYTES", 0)
    policy = nn.Sequential(nn.Linear(16, 16, bias=False))
    sync = WeightSync(policy, RemoteEngine(WrongFor(9)), [1, 2], score=lambda *_: torch.zeros(1))
    with pytest.raises(StaleEngineError, match=r"differ by 1 nats .*could not be sent once more: .* are not kept"):
        sync.sync()
