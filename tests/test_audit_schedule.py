"""When an audit is due: what it may cost, what is said of the syncs without one, and that all processes agree."""

import logging
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import make_tiny_checkpoint
from torch.multiprocessing import spawn
from transformers import AutoModelForCausalLM

from fura_rl.sync import audit_schedule
from fura_rl.sync.audit_schedule import ROLLOUT_SHARE, SMALL_COST_SECONDS, AuditSchedule
from fura_rl.sync.engine import Push
from fura_rl.sync.weight_sync import WeightSync


def audited_syncs(schedule, costs, rollouts):
    """The syncs that `schedule` has audited, the i-th at `costs[i]` seconds and after `rollouts[i]` seconds more."""
    found, total = [], 0.0
    for sync, (cost, seconds) in enumerate(zip(costs, rollouts, strict=True)):
        total += seconds
        if schedule.due(sync, first=sync == 0, rollout_seconds=total, syncs=sync - found[-1] if found else 1):
            schedule.audited(cost, total)
            found.append(sync)
    return found


def test_an_audit_within_its_share_of_one_rollout_is_made_at_every_sync():
    cost = 3.0
    rollouts = [0.0, *[1.001 * cost / ROLLOUT_SHARE] * 9]
    assert audited_syncs(AuditSchedule(None), [cost] * 10, rollouts) == [*range(10)]


@pytest.mark.parametrize("rollout", [0.5, 7.0, 19.0, 59.9])
def test_a_dearer_one_is_made_as_soon_as_rollouts_cover_it(rollout):
    cost, syncs = 3.0, 1000
    found = audited_syncs(AuditSchedule(None), [cost] * syncs, [rollout] * syncs)
    assert found == [*range(0, syncs, math.ceil(cost / (ROLLOUT_SHARE * rollout)))]


def test_audits_of_a_steady_cost_never_take_more_than_their_share_of_the_rollouts():
    generator = torch.Generator().manual_seed(0)
    rollouts = (100 * torch.rand(2000, generator=generator)).tolist()
    found = audited_syncs(AuditSchedule(None), [4.0] * 2000, rollouts)
    assert len(found) > 100
    for before, last in enumerate(found):
        assert 4.0 * before <= ROLLOUT_SHARE * sum(rollouts[1 : last + 1])


def test_a_small_cost_is_paid_at_every_sync_whatever_the_rollouts_take():
    assert audited_syncs(AuditSchedule(None), [0.99 * SMALL_COST_SECONDS] * 5, [0.0] * 5) == [*range(5)]
    assert audited_syncs(AuditSchedule(None), [1.01 * SMALL_COST_SECONDS] * 5, [0.0] * 5) == [0]


def test_the_next_audit_goes_by_what_the_last_one_cost():
    """A slow first one, of kernels that are compiled meanwhile, delays the second alone."""
    assert audited_syncs(AuditSchedule(None), [10.0] + [1.0] * 14, [20.0] * 15) == [0, *range(10, 15)]


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [*range(7)]), (3, [0, 3, 6])])
def test_a_number_of_syncs_is_kept_to_whatever_they_cost(every, expected):
    assert audited_syncs(AuditSchedule(every), [100.0] * 7, [0.0] * 7) == expected
    assert AuditSchedule(every).due(version=4, first=True, rollout_seconds=0.0, syncs=1) == (every > 0), "a resumed run"


def test_the_first_sync_without_an_audit_says_how_many_there_will_be(caplog):
    schedule = AuditSchedule(None)
    with caplog.at_level(logging.WARNING):
        schedule.audited(cost_seconds=3.0, rollout_seconds=0.0)
        assert not schedule.due(version=1, first=False, rollout_seconds=0.0, syncs=1)
        assert caplog.text == "", "nothing is known of rollouts yet"
        for version in range(2, 8):
            if schedule.due(version, first=False, rollout_seconds=16.0 * (version - 1), syncs=version):
                schedule.audited(cost_seconds=3.0, rollout_seconds=16.0 * (version - 1))
    [record] = caplog.records
    # 3 s are 5% of 60 s; 16 s so far over two syncs are 8 s a sync
    assert "takes 3.00 s" in record.message
    assert "one in 8 syncs is audited; sync_audit_every=1 audits each" in record.message


def test_nothing_is_said_where_every_sync_is_audited(caplog):
    audited_syncs(AuditSchedule(None), [0.1] * 5, [0.0, 1.0, 1.0, 1.0, 1.0])
    assert caplog.text == ""


class OwnEngine:
    """The engine of one process among several, as far as a sync without a probe asks it."""

    reads_the_trainers_base = True
    dtype = torch.float32

    def prepare(self, tensors, stacks, base_samples):
        pass

    def push(self, update):
        return Push(0, {})

    def prompt_logprobs(self, token_ids):
        return torch.zeros(len(token_ids) - 1)


def noted_audits(sync):
    """The versions that are audited, noted in the place of their audits."""
    noted = []

    def note(delivery):
        noted.append(sync.version)
        return {}

    sync.proof.by_audit = note
    return noted


def syncs_of_a_process(rank, model, folder):
    """Two times five syncs; rollouts take time in the first process alone, then in the second alone."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    audit_schedule.SMALL_COST_SECONDS = 0.0
    noted, clock = [], [0.0]
    for busy in (0, 1):
        sync = WeightSync(
            AutoModelForCausalLM.from_pretrained(model),
            OwnEngine(),
            [1, 2, 3],
            audit_every=None,
            rollout_seconds=lambda: clock[0],
            score=lambda policy, token_ids: torch.zeros(len(token_ids) - 1),
        )
        noted.append(noted_audits(sync))
        for _ in range(5):
            clock[0] += 1e6 if rank == busy else 0.0
            sync.sync()
    torch.save(noted, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_audit_the_syncs_that_the_first_one_chooses(tmp_path):
    model = make_tiny_checkpoint(tmp_path / "model", tied=True, num_hidden_layers=1)
    spawn(syncs_of_a_process, args=(model, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == [[0, 1, 2, 3, 4], [0]]
    assert second == first
