"""The arithmetic of the audit, on plain matrices in place of an engine's kernels."""

import itertools
import math

import pytest
import torch

from fura_rl.sync.audit import (
    ROUNDINGS_PER_DRAW,
    ROUNDINGS_PER_UPDATE,
    KernelAudit,
    KernelReply,
    complete_replies,
    probe_vectors,
    sample_spans,
    stale_modules,
    worst,
)


class Matrices:
    """Linear layers by name, in the engine's dtype."""

    def __init__(self, dtype, **weights):
        self.dtype = dtype
        self.weights = {name: weight.to(dtype) for name, weight in weights.items()}

    def kernel_replies(self, spans):
        replies = {}
        for name in spans.keys() & self.weights.keys():
            weight = torch.cat([self.weights[name][slice(*span)] for span in spans[name]])
            x = probe_vectors(weight.shape[1], weight.device).to(self.dtype)
            replies[name] = KernelReply((x @ weight.mT).float(), torch.ones(len(weight)))
        return [replies]


@pytest.fixture
def base():
    return torch.randn(64, 32)


def expect(audit, weight, base, name="layer"):
    audit.expect(name, weight, base, sample_spans((0, weight.shape[0])))


def test_gain_is_1_for_the_new_weight_0_for_the_old_and_what_lies_between(base):
    new = base + 0.01 * torch.randn_like(base)
    for share in (0.0, 0.5, 1.0):
        audit = KernelAudit()
        expect(audit, new, base)
        gain = audit.gains(Matrices(torch.float32, layer=torch.lerp(base, new, share)))["layer"]
        assert gain == pytest.approx(share, abs=1e-3)
    assert stale_modules({"fresh": 1.0, "stale": 0.1, "broken": float("nan"), "wild": 40.0}) == [
        "stale", "broken", "wild",
    ]  # fmt: skip


def test_of_several_gains_the_worst_counts():
    assert worst([0.98, 1.03, 1.0]) == 1.03
    assert worst([1.0, 0.0]) == 0.0
    assert worst([1.0, 4.0]) == 4.0, "what moved too far is as wrong as what did not move"
    assert math.isnan(worst([0.0, float("nan"), 4.0]))


def test_processes_share_the_rows_to_look_at():
    alone, of_four, of_many = (sample_spans((64, 4096), processes) for processes in (1, 4, 64))
    assert [len(spans) for spans in (alone, of_four, of_many)] == [16, 4, 4]
    for spans in (alone, of_four):
        assert spans[0][0] == 64
        assert spans[-1][1] == 4096
    assert sample_spans((64, 96), 4) == [(64, 96)]
    assert sample_spans((64, 64), 4) == []


def test_an_accepted_update_is_the_start_of_the_next(base):
    audit, new = KernelAudit(), base + 0.01 * torch.randn_like(base)
    expect(audit, new, base)
    audit.accept(audit.gains(Matrices(torch.float32, layer=new)))
    expect(audit, new, None)
    assert audit.gains(Matrices(torch.float32, layer=new)) == {}, "nothing moved since"
    newer = new + 0.01 * torch.randn_like(base)
    expect(audit, newer, None)
    assert audit.gains(Matrices(torch.float32, layer=new))["layer"] == pytest.approx(0, abs=1e-3)


def test_updates_below_the_engines_rounding_add_up_until_they_can_be_seen(base):
    audit, weight = KernelAudit(), base.to(torch.bfloat16).float()
    step = 3e-4 * base.norm() * torch.nn.functional.normalize(torch.randn_like(base), dim=None)
    start, seen = weight, []
    for _ in range(8):
        weight = weight + step
        expect(audit, weight, start)
        gains = audit.gains(Matrices(torch.bfloat16, layer=weight))
        audit.accept(gains)
        seen.append("layer" in gains)
    assert not seen[0]
    assert any(seen)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_fresh_layer_is_never_near_stale_however_small_an_update_is_audited(rounding):
    """A long run audits millions of updates just above the smallest looked at, and ends at the first failure."""
    gains = []
    for seed in range(400):
        torch.manual_seed(seed)
        base = torch.randn(64, 48).to(torch.bfloat16).float()
        update = torch.randn_like(base)
        for size in itertools.count(1):  # up to the smallest that is audited
            new = base + 1e-4 * size * update
            if rounding == "nearest":
                expected = held = new.to(torch.bfloat16).float()
            else:
                bits = new.view(torch.int32)
                expected, held = new, ((bits + torch.randint_like(bits, 2**16)) & -(2**16)).view(torch.float32)
            audit = KernelAudit()
            roundings = ROUNDINGS_PER_UPDATE if rounding == "nearest" else ROUNDINGS_PER_DRAW
            audit.expect("layer", expected, base, sample_spans((0, 64)), roundings)
            if found := audit.gains(Matrices(torch.bfloat16, layer=held)):
                break
        assert audit.gains(Matrices(torch.bfloat16, layer=base))["layer"] < 0.25, "the old weight is still told"
        gains += found.values()
    deviation = torch.tensor(gains).std()
    assert abs(1 - torch.tensor(gains).mean()) < 4 * deviation / len(gains) ** 0.5
    assert 0.5 / deviation > 7, "so many standard deviations from STALE_BELOW"


def test_a_layer_the_engine_does_not_have_is_left_out(base):
    audit = KernelAudit()
    expect(audit, base + 1, base, name="elsewhere")
    assert audit.gains(Matrices(torch.float32)) == {}


def test_partial_sums_of_workers_add_up_and_every_holder_of_a_whole_row_answers_for_itself():
    halves = [KernelReply(torch.full((4, 3), float(i)), torch.full((3,), 0.5)) for i in (1, 2)]
    [(reply, features)] = complete_replies(halves)
    assert reply.unique().item() == 3.0
    assert features.all()
    first, second = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])
    replies = complete_replies([KernelReply(torch.ones(4, 3), first), KernelReply(torch.ones(4, 3), second)])
    assert [features.tolist() for _, features in replies] == [[True, True, False], [False, True, True]]


def test_samples_are_spread_from_the_first_row_to_the_last_without_overlap():
    assert sample_spans((0, 100)) == [(0, 100)]
    spans = sample_spans((0, 3072))
    assert spans[0][0] == 0
    assert spans[-1][1] == 3072
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
