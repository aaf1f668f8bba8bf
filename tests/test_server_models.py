"""Real rollout servers of models that are more than plain linear layers: mixtures of experts, fp8 kernels."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import PARITY_NATS, make_moe_checkpoint, make_tiny_checkpoint, perturb_trained
from distributed_trainer import EXPERT_CASES
from peft import LoraConfig
from rollout_server import RolloutServer
from safetensors.torch import load_file
from test_distributed import grpo_command, launch, training_lines
from test_engine_process import (
    ATTENTION,
    EXPERTS,
    PROBE,
    check_a_mixture_of_experts_follows,
    check_an_fp8_engine_follows,
    trainer_of_experts,
)
from trl import ModelConfig

from fura_rl.adapters.registry import peft_config_for
from fura_rl.sync.factors import Factors
from fura_rl.sync.http_transport import HttpTransport
from fura_rl.sync.probe import StaleEngineError

pytestmark = pytest.mark.slow


@contextmanager
def serving(folder, *options):
    server = RolloutServer(folder, folder.with_name("server.log"), *options).start()
    try:
        yield server.wait_until_up()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def moe_server(tmp_path_factory):
    with serving(make_moe_checkpoint(tmp_path_factory.mktemp("moe") / "model")) as server:
        yield server


FURA, LORA = (peft_config_for(method, ModelConfig(lora_r=4), ATTENTION, None) for method in ("fura", "lora"))
ONE_STACK = LoraConfig(task_type="CAUSAL_LM", r=4, target_parameters=["mlp.experts.down_proj"])


def test_a_served_mixture_of_experts_follows_one_trainer_after_another(moe_server):
    """Each adapts other weights than the one before, which are the checkpoint's again."""
    transport, folder = HttpTransport(moe_server.url), moe_server.model
    for config in (FURA, LORA, ONE_STACK, EXPERTS, FURA):
        check_a_mixture_of_experts_follows(transport, folder, config)


def test_adapted_experts_come_back_to_a_server_that_was_killed(moe_server):
    with trainer_of_experts(HttpTransport(moe_server.url), moe_server.model, EXPERTS) as (policy, engine, sync):
        perturb_trained(policy, 0.1, seed=0)
        sync.sync()
        before = engine.prompt_logprobs(PROBE)
        moe_server.kill()
        engine.restore(timeout=240.0)
        assert torch.equal(engine.prompt_logprobs(PROBE), before)


def test_the_one_stale_expert_of_a_server_is_named(moe_server, monkeypatch):
    stack = "model.layers.1.mlp.experts"
    with trainer_of_experts(HttpTransport(moe_server.url), moe_server.model, EXPERTS) as (policy, engine, sync):
        sync.sync()
        perturb_trained(policy, 0.1, seed=1)
        assert sync.sync().audit_gain_min == pytest.approx(1.0, abs=0.02)
        old = {name: w.factors().tensors for name, w in sync.weights.items() if w.module_name == stack}
        push = engine.push

        def all_but_expert_3(update):
            factors = dict(update.factors)
            for name, before in old.items():
                tensors = {part: tensor.clone() for part, tensor in factors[name].tensors.items()}
                for part, tensor in tensors.items():
                    tensor[3] = before[part][3]
                factors[name] = Factors(factors[name].rule, tensors)
            return push(replace(update, factors=factors))

        monkeypatch.setattr(engine, "push", all_but_expert_3)
        perturb_trained(policy, 0.1, seed=2)
        with pytest.raises(StaleEngineError, match=rf"audit: 1 of \d+ modules .*{stack}\.3 "):
            sync.sync()


def test_experts_in_pieces_are_audited_by_the_process_that_holds_them(moe_server, tmp_path):
    script = "tests/distributed_trainer.py", ",".join(EXPERT_CASES)
    launch("fsdp2", *script, moe_server.model, moe_server.url, tmp_path)
    for case in EXPERT_CASES:
        first, second = (torch.load(tmp_path / f"{case}-{process}.pt") for process in (0, 1))
        assert max(first["gaps"]) < PARITY_NATS
        unseen = [None] if case == "full-experts" else []  # no base to compare with
        assert first["gains"] == [*unseen, *[pytest.approx(1.0, abs=0.02)] * (3 - len(unseen))]
        assert second["gains"] == first["gains"]
        assert case == "full-experts" or first["gathered"] == second["gathered"] == [], "no base weight is"
        for result in (first, second):
            words = result["stale"]
            assert words.startswith("StaleEngineError: weight sync failed its audit: 1 of"), words
            assert "model.layers.1.mlp.experts.7 (gain" in words


def test_grpo_trains_experts_in_two_processes_on_one_server(moe_server, tmp_path):
    command = grpo_command("fsdp2", "lora", moe_server, tmp_path / "run")
    experts = '{"target_parameters": ["mlp.experts.down_proj"]}'
    command += ["--adapter_target_modules", "q_proj", "--adapter_kwargs", experts]
    launch("fsdp2", *command)
    steps = training_lines(tmp_path / "run")
    assert all(entry["grad_norm"] > 0 for entry in steps), "it must learn something"
    assert all(entry["sync/probe_max_gap"] < PARITY_NATS for entry in steps)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    moved = {name for name, tensor in saved.items() if "lora_B" in name and tensor.norm() > 0}
    assert {name for name in moved if "experts" in name} == {
        f"base_model.model.model.layers.{layer}.mlp.experts.lora_B.weight" for layer in range(2)
    }


def test_an_fp8_server_is_requantized_from_its_own_checkpoint(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "model", tied=False, dtype=torch.bfloat16)
    with serving(folder, "--dtype", "bfloat16", "--quantization", "fp8_per_channel") as server:
        check_an_fp8_engine_follows(HttpTransport(server.url), folder)
