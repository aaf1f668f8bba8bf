"""Contract of the table of methods: each trains real GRPO steps on one live vLLM engine, through the script's own path.

Every sync is proved by its own audit and probe; what training moved and what it left alone is looked at afterwards.
"""

import pytest
import torch
from conftest import PARITY_NATS, REPOSITORY, one_trainer_engine

from fura_rl.adapters.registry import METHODS
from fura_rl.config import parse_arguments
from fura_rl.run import prepare_run

pytestmark = pytest.mark.slow
STEPS = 3
OPTIONS = [
    *("--config", str(REPOSITORY / "configs" / "quickstart.yaml"), "--max_steps", str(STEPS)),
    *("--per_device_train_batch_size", "32", "--eval_problems", "0", "--save_strategy", "no", "--lora_r", "8"),
    *("--sync_probe_every", "1"),
]
NATS = 10 * PARITY_NATS  # at these rates log-probs reach tens of nats, whose own rounding in float32 is as large


@pytest.fixture(scope="module")
def one_engine():
    """Every trainer of this module gets the engine that the first one started."""
    with one_trainer_engine():
        yield


def snapshot(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("adapter", [*METHODS, "peft:LoHaConfig"])
def test_every_method_trains_with_real_rollouts(adapter, one_engine, tmp_path):
    rate = "1e-3" if adapter in ("full", "lift", "lora_full", "svd") else "1e-2"
    arguments = parse_arguments(
        [*OPTIONS, "--adapter", adapter, "--learning_rate", rate, "--output_dir", str(tmp_path)]
    )
    run = prepare_run(arguments)
    trainer, policy = run.trainer, run.trainer.accelerator.unwrap_model(run.trainer.model)
    trainer.weight_sync.sync(everything=True)  # the engine comes with the weights of the method before
    before = snapshot(policy)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert len(trainer.sync_reports) == STEPS
    for report in trainer.sync_reports:
        assert report.probe_max_gap < NATS
        assert report.audit_gain_min is None or 0.9 < report.audit_gain_min < 1.1
    after = dict(policy.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved, "training must move something"
    assert all(after[name].requires_grad for name in moved), "a frozen weight moved"
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == STEPS
