"""The distance of a policy from its base: the KL against a slow reference, the shape of updates made by hand."""

import math
from itertools import product

import pytest
import torch
from conftest import perturb_trained
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.ablation import diagnostics
from fura_rl.ablation.diagnostics import divergence, update_shape, update_summary
from fura_rl.adapters.fura_tuner import PAPER_TARGETS
from fura_rl.adapters.registry import peft_config_for

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
COMPLETIONS = [[20, 21], [22, 23, 24, 25, 26], [27]]


def models(checkpoint, scale=0.5):
    base, moved = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2))
    perturb_trained(moved, scale, seed=1)
    return moved, base


@torch.no_grad()
def slow_kl(policy, base, prompt, completion):
    """Token by token, without padding, in float64."""
    total = 0.0
    for length in range(len(completion)):
        ids = torch.tensor([prompt + completion[:length]])
        p, q = (model.eval()(input_ids=ids).logits[0, -1].double().softmax(-1) for model in (policy, base))
        total += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    return total


@pytest.mark.parametrize("tokens", [8, 16_384])
def test_the_kl_is_that_of_the_distributions_token_by_token(tied_checkpoint, tokens, monkeypatch):
    monkeypatch.setattr(diagnostics, "TOKENS_PER_BATCH", tokens)
    policy, base = models(tied_checkpoint)
    policy.train()
    found = divergence(policy, base, PROMPTS, COMPLETIONS)
    sums = [slow_kl(policy, base, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert min(sums) > 1e-3
    assert found.per_completion == pytest.approx(sum(sums) / 3, rel=1e-4)
    assert found.per_token == pytest.approx(sum(sums) / 8, rel=1e-4)
    policy.train()
    divergence(policy, base, PROMPTS, COMPLETIONS)
    assert policy.training, "the policy is left in the mode it came in"


def test_the_kl_over_prefixes_of_the_policy_is_that_over_completions():
    """Exact on a model of three tokens and two steps: the mean of the sums is the KL of the joint distributions."""

    class Table(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))

        def forward(self, input_ids, attention_mask):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.weight[input_ids])

    policy, base = Table(0), Table(1)
    p, q = (model.weight.detach().double().softmax(-1) for model in (policy, base))
    joint, weighted = 0.0, 0.0
    for first, second in product(range(3), repeat=2):
        chance, reference = p[3, first] * p[first, second], q[3, first] * q[first, second]
        joint += float(chance * (chance / reference).log())
        weighted += float(chance) * divergence(policy, base, [[3]], [[first, second]]).per_completion
    assert weighted == pytest.approx(joint, rel=1e-5)


def test_the_kl_of_a_model_to_itself_is_nothing_and_an_empty_completion_is_left_out(tied_checkpoint):
    policy, base = models(tied_checkpoint, scale=0.0)
    found = divergence(policy, base, PROMPTS, [*COMPLETIONS[:2], []])
    assert found.per_completion == pytest.approx(0.0, abs=1e-6)
    assert found.completions == 2
    with pytest.raises(ValueError, match="at least one token"):
        divergence(policy, base, PROMPTS, [[], [], []])


def spectral(values, seed, shape=(24, 16)):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, 16, generator=generator))[0] for side in shape)
    return u, torch.tensor(values), v


def test_an_update_along_the_leading_directions_of_the_base_overlaps_whole_and_one_along_the_others_not():
    u, values, v = spectral([2.0**-i for i in range(16)], seed=0)
    base = u * values @ v.T
    along = update_shape(0.1 * (u[:, :4] * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ v[:, :4].T, base)
    assert along.overlap == pytest.approx(1.0, abs=1e-4)
    assert along.stable_rank == pytest.approx((16 + 9 + 4 + 1) / 16, rel=1e-4)
    assert along.relative_size == pytest.approx(0.1 * math.sqrt(30) / float(values.norm()), rel=1e-4)
    assert along.chance == pytest.approx((4 / 24 + 4 / 16) / 2), "the update has rank 4"
    assert along.spectrum[:4] == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=1e-4)
    assert along.base_spectrum[:3] == pytest.approx([1.0, 0.5, 0.25], rel=1e-4)
    across = update_shape(u[:, 8:12] @ v[:, 8:12].T, base)
    assert across.overlap == pytest.approx(0.0, abs=1e-4)
    assert across.stable_rank == pytest.approx(4.0, rel=1e-4)
    one_side = update_shape(u[:, :4] @ v[:, 8:12].T, base)
    assert one_side.overlap == pytest.approx(0.5, abs=1e-4)


def test_random_updates_overlap_by_chance():
    generator = torch.Generator().manual_seed(0)
    shapes = [update_shape(*torch.randn(2, 96, 64, generator=generator)) for _ in range(30)]
    assert sum(s.overlap for s in shapes) / 30 == pytest.approx(shapes[0].chance, rel=0.1)


def test_no_update_has_no_shape():
    assert update_shape(torch.zeros(3, 4), torch.ones(3, 4)) is None


@pytest.mark.parametrize("name", ["full", "lora", "fura", "pissa", "lift"])
def test_every_method_is_measured_on_the_same_modules_against_the_checkpoint(tied_checkpoint, name):
    base = AutoModelForCausalLM.from_pretrained(tied_checkpoint, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(tied_checkpoint, dtype=torch.float32)
    config = peft_config_for(name, ModelConfig(lora_r=4), None, None)
    policy = policy if config is None else get_peft_model(policy, config)
    start = update_summary(policy, base.state_dict(), PAPER_TARGETS)
    assert start["modules"] == 2 * 7
    assert start["relative_size"] < 1e-5, "also where the method moved the base weight it sits on"
    perturb_trained(policy, 0.3, seed=1)
    moved = update_summary(policy, base.state_dict(), PAPER_TARGETS)
    assert moved["modules"] == 2 * 7
    assert moved["relative_size"] > 1e-3
    assert 1 <= moved["stable_rank"] <= (8 if name in ("lora", "pissa") else 64)
    assert len(moved["spectrum"]) == len(moved["base_spectrum"]) == 64
    if name == "lora":
        assert max(moved["spectrum"][4:]) < 1e-5, "the update has rank 4"


def test_a_policy_that_did_not_move_has_no_spectrum(tied_checkpoint):
    policy, base = models(tied_checkpoint, scale=0.0)
    summary = update_summary(policy, base.state_dict(), PAPER_TARGETS)
    assert summary["relative_size"] == 0.0
    assert summary["stable_rank"] is summary["spectrum"] is None
