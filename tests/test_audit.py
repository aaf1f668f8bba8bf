"""The arithmetic of the audit, on plain matrices in place of an engine's kernels."""

import itertools
import math

import pytest
import torch

from fura_rl.sync.audit import (
    ROUNDINGS_PER_DRAW,
    ROUNDINGS_PER_UPDATE,
    Gain,
    KernelAudit,
    KernelReply,
    complete_replies,
    covered_by,
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
            reply = (x @ weight.mT).float()
            replies[name] = KernelReply(reply, torch.ones_like(reply))
        return [replies]


class Workers:
    """The workers of one or more replicas: each holds the columns of "layer" from one of `bounds` to the next."""

    def __init__(self, dtype, bounds, *replicas):
        self.dtype, self.bounds, self.replicas = dtype, bounds, replicas

    def kernel_replies(self, spans):
        workers = []
        for weights in self.replicas:
            for columns, weight in zip(itertools.pairwise(self.bounds), weights, strict=True):
                weight = torch.cat([weight[slice(*span)] for span in spans["layer"]])
                x = probe_vectors(weight.shape[1], weight.device)[:, slice(*columns)]
                reply = (x.to(self.dtype) @ weight[:, slice(*columns)].to(self.dtype).mT).float()
                covered = covered_by(columns, weight.shape[1])[:, None].expand_as(reply)
                workers.append({"layer": KernelReply(reply, covered)})
        return workers


@pytest.fixture
def base():
    return torch.randn(64, 32)


def expect(audit, weight, base, name="layer"):
    base = None if base is None else base[None]
    audit.expect([name], weight[None], base, sample_spans((0, weight.shape[0])))


def test_gain_is_1_for_the_new_weight_0_for_the_old_and_what_lies_between(base):
    new = base + 0.01 * torch.randn_like(base)
    for share in (0.0, 0.5, 1.0):
        audit = KernelAudit()
        expect(audit, new, base)
        gain = audit.gains(Matrices(torch.float32, layer=torch.lerp(base, new, share)))["layer"]
        assert gain.value == pytest.approx(share, abs=1e-3)
    gains = {"fresh": 1.0, "stale": 0.1, "broken": float("nan"), "wild": 40.0}
    assert stale_modules({name: Gain(value) for name, value in gains.items()}) == ["stale", "broken", "wild"]


@pytest.mark.parametrize(("dtype", "size", "stale"), [
    (torch.float32, 1e-2, ["layer"]),
    (torch.bfloat16, 2e-3, []),  # near the rounding, in which the gain of a fresh layer scatters
])  # fmt: skip
def test_what_lacks_a_third_of_an_update_is_stale_where_rounding_leaves_no_doubt(base, dtype, size, stale):
    audit, new = KernelAudit(), base + size * torch.randn_like(base)
    expect(audit, new, base)
    gains = audit.gains(Matrices(dtype, layer=torch.lerp(base, new, 0.67)))
    assert gains["layer"].value == pytest.approx(0.67, abs=0.15)
    assert stale_modules(gains) == stale


def test_of_several_syncs_one_that_is_missing_counts(base):
    audit, new = KernelAudit(), base + 0.01 * torch.randn_like(base)
    expect(audit, new, base)
    for held, stale_of_one, stale_of_five in [(0.99, [], []), (0.8, [], ["layer"]), (3.0, ["layer"], ["layer"])]:
        engine = Matrices(torch.float32, layer=torch.lerp(base, new, held))
        assert stale_modules(audit.gains(engine)) == stale_of_one
        assert stale_modules(audit.gains(engine, syncs=5)) == stale_of_five


def test_an_update_of_several_syncs_must_be_as_much_larger_to_be_judged_by(base):
    audit = KernelAudit()
    direction = torch.randn_like(base)
    for size, seen in [(1.0, {1: True, 4: False}), (5.0, {1: True, 4: True})]:
        new = base + size * 3e-3 * direction
        expect(audit, new, base)
        for syncs, wanted in seen.items():
            assert bool(audit.gains(Matrices(torch.bfloat16, layer=new), syncs)) == wanted, (size, syncs)


def test_of_several_gains_the_worst_counts():
    def worst_of(*values):
        return worst(map(Gain, values)).value

    assert worst_of(0.98, 1.03, 1.0) == 1.03
    assert worst_of(1.0, 0.0) == 0.0
    assert worst_of(1.0, 4.0) == 4.0, "what moved too far is as wrong as what did not move"
    assert math.isnan(worst_of(0.0, float("nan"), 4.0))
    certain = Gain(0.7, fresh_from=0.75)
    assert worst([Gain(0.65), certain]) == certain, "the one that is stale, though the other is further from 1"
    assert worst([Gain(1.9, fresh_from=0.75), certain]) == certain


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
    assert audit.gains(Matrices(torch.float32, layer=new))["layer"].value == pytest.approx(0, abs=1e-3)


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


@pytest.mark.parametrize("times", [1, 2])  # so far each gain is asked to be nearer to 1
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_fresh_layer_is_never_near_stale_however_small_an_update_is_audited(rounding, times):
    """A long run audits millions of updates just above the smallest looked at, and ends at the first failure."""
    gains = []
    for seed in range(400):
        torch.manual_seed(seed)
        base = torch.randn(64, 48).to(torch.bfloat16).float()
        update = torch.randn_like(base)

        def audited(size, base=base, update=update):
            new = base + 1e-4 * size * update
            if rounding == "nearest":
                expected = held = new.to(torch.bfloat16).float()
            else:
                bits = new.view(torch.int32)
                expected, held = new, ((bits + torch.randint_like(bits, 2**16)) & -(2**16)).view(torch.float32)
            audit = KernelAudit()
            roundings = ROUNDINGS_PER_UPDATE if rounding == "nearest" else ROUNDINGS_PER_DRAW
            audit.expect(["layer"], expected[None], base[None], sample_spans((0, 64)), roundings)
            return audit, audit.gains(Matrices(torch.bfloat16, layer=held))

        smallest = next(size for size in itertools.count(1) if audited(size)[1])
        audit, found = audited(times * smallest)
        assert audit.gains(Matrices(torch.bfloat16, layer=base))["layer"].value < 0.25, "the old weight is still told"
        gains.append(found["layer"])
    values = torch.tensor([gain.value for gain in gains])
    assert abs(1 - values.mean()) < 4 * values.std() / len(gains) ** 0.5
    assert all((1 - gain.fresh_from) / values.std() > 7 for gain in gains), "so many standard deviations"


def test_of_weights_judged_at_once_each_has_its_own_gain_and_its_own_eps():
    shapes = {"q": (64, 32), "k": (16, 32), "o": (64, 32), "down": (64, 96)}
    old, new = ({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2))
    audit = KernelAudit()
    for name in shapes:
        expect(audit, new[name], old[name], name)
    held = {"q": new["q"], "k": old["k"], "o": torch.lerp(old["o"], new["o"], 0.25), "down": new["down"]}
    gains = audit.gains(Matrices(torch.float32, **held))
    values = {name: gain.value for name, gain in gains.items()}
    assert values == pytest.approx({"q": 1.0, "k": 0.0, "o": 0.25, "down": 1.0}, abs=1e-3)
    assert stale_modules(gains) == ["k", "o"]

    class Coarse(Matrices):
        """ "o" is kept so coarsely that its update is lost in the rounding."""

        def kernel_replies(self, spans):
            [replies] = super().kernel_replies(spans)
            replies["o"] = KernelReply(replies["o"].output, replies["o"].covered, eps=100.0)
            return [replies]

    assert list(audit.gains(Coarse(torch.float32, **held))) == ["q", "k", "down"]


def test_a_layer_the_engine_does_not_have_is_left_out(base):
    audit = KernelAudit()
    expect(audit, base + 1, base, name="elsewhere")
    assert audit.gains(Matrices(torch.float32)) == {}


@pytest.mark.parametrize(("bounds", "workers"), [((0,), 0), ((0, 16), 1)])
def test_a_layer_that_was_answered_for_once_must_be_answered_for_again_and_whole(base, bounds, workers):
    audit, new = KernelAudit(), base + 0.01 * torch.randn_like(base)
    newer = new + 0.01 * torch.randn_like(base)
    expect(audit, new, base)
    audit.accept(audit.gains(Workers(torch.float32, (0, 16, 32), 2 * [new])))
    expect(audit, newer, None)
    assert stale_modules(audit.gains(Workers(torch.float32, bounds, workers * [newer]))) == ["layer"]
    assert stale_modules(audit.gains(Workers(torch.float32, (0, 16, 32), 2 * [newer]))) == []


class AllBut(Workers):
    """Of all the workers, the last `silent` do not answer."""

    def __init__(self, silent, *args):
        super().__init__(*args)
        self.silent = silent

    def kernel_replies(self, spans):
        return super().kernel_replies(spans)[: -self.silent or None]


@pytest.mark.parametrize(("bounds", "silent"), [((0, 32), 1), ((0, 16, 32), 1), ((0, 16, 32), 2)])
def test_a_replica_that_falls_silent_is_noticed_though_another_one_answers_for_all(base, bounds, silent):
    audit, new, shards = KernelAudit(), base + 0.01 * torch.randn_like(base), len(bounds) - 1
    newer = new + 0.01 * torch.randn_like(base)
    expect(audit, new, base)
    audit.accept(audit.gains(Workers(torch.float32, bounds, *2 * [shards * [new]])))
    expect(audit, newer, None)
    replicas = 2 * [shards * [newer]]
    assert stale_modules(audit.gains(AllBut(silent, torch.float32, bounds, *replicas))) == ["layer"]
    assert stale_modules(audit.gains(AllBut(0, torch.float32, bounds, *replicas))) == []


@pytest.mark.parametrize("bounds", [(0, 16, 32), (0, 8, 16, 24, 32), tuple(range(0, 33, 4)), (0, 11, 22, 32)])
def test_one_stale_worker_of_those_that_share_the_columns_is_named(base, bounds):
    new, workers = base + 0.01 * torch.randn_like(base), len(bounds) - 1
    audit = KernelAudit()
    expect(audit, new, base)
    assert audit.gains(Workers(torch.float32, bounds, workers * [new]))["layer"].value == pytest.approx(1, abs=1e-3)
    for stale in range(workers):
        held = [base if worker == stale else new for worker in range(workers)]
        gains = audit.gains(Workers(torch.float32, bounds, held))
        assert stale_modules(gains) == ["layer"], (stale, gains)


@pytest.mark.parametrize("replicas", [2, 3])
def test_one_stale_replica_of_sharing_workers_is_named(base, replicas):
    new = base + 0.01 * torch.randn_like(base)
    for bounds in ((0, 16, 32), (0, *range(1, 32, 3), 32)):  # the second's workers hold less than a vector's inputs
        shards = len(bounds) - 1
        for stale in range(replicas):
            audit = KernelAudit()
            expect(audit, new, base)
            held = [shards * [base if replica == stale else new] for replica in range(replicas)]
            assert audit.gains(Workers(torch.float32, bounds, *held))["layer"].value == pytest.approx(0, abs=1e-3)


def test_a_worker_whose_columns_have_hardly_moved_is_judged_once_they_have(base):
    """Else a fresh worker's share would be all rounding, and a stale one's lost with what the others proved."""
    audit, halves, start = KernelAudit(), (0, 16, 32), base.to(torch.bfloat16).float()
    step = torch.where(torch.arange(32) < 16, 0.1, 1.2e-3) * torch.randn_like(base)
    first, second = start + step, start + 2 * step
    expect(audit, first, start)
    gains = audit.gains(Workers(torch.bfloat16, halves, [first, start]))
    assert stale_modules(gains) == [], gains
    audit.accept(gains)
    expect(audit, second, None)
    assert audit.gains(Workers(torch.bfloat16, halves, [second, second]))["layer"].value == pytest.approx(1, abs=0.3)
    assert audit.gains(Workers(torch.bfloat16, halves, [second, start]))["layer"].value == pytest.approx(0, abs=0.3)


def test_partial_sums_of_workers_add_up_and_every_holder_of_a_whole_row_answers_for_itself():
    halves = [KernelReply(torch.full((4, 3), float(i)), torch.full((4, 3), 0.5)) for i in (1, 2, 3, 5)]
    (first, all_of_it), (second, _) = complete_replies(halves)
    assert (first.unique().item(), second.unique().item()) == (3.0, 8.0), "two replicas of two workers each"
    assert all_of_it.all()
    first, second = (torch.tensor(row).expand(4, 3) for row in ([1.0, 1.0, 0.0], [0.0, 1.0, 1.0]))
    replies = complete_replies([KernelReply(2 * first, first), KernelReply(2 * second, second)])
    assert [whole[0].tolist() for _, whole in replies] == [[True, True, False], [False, True, True]]
    assert [reply[whole].unique().item() for reply, whole in replies] == [2.0, 2.0]


def test_samples_are_spread_from_the_first_row_to_the_last_without_overlap():
    assert sample_spans((0, 100)) == [(0, 100)]
    spans = sample_spans((0, 3072))
    assert spans[0][0] == 0
    assert spans[-1][1] == 3072
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
