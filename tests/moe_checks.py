"""The sync of a mixture of experts; run by test_sync_models.py in a process of its own."""

import pytest
import torch
from conftest import (
    PARITY_NATS,
    check_that_two_updates_arrive,
    make_moe_checkpoint,
    make_random_checkpoint,
    perturb_trained,
    start_llm,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.adapters.registry import peft_config_for
from fura_rl.sync import probe, vllm_model
from fura_rl.sync.factors import Factors
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.vllm_engine import InProcessEngine, ProcessTransport, factored_sync_settings
from fura_rl.sync.weight_sync import WeightSync

PROBE = list(range(5, 45))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(folder, adapter):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = adapter if isinstance(adapter, LoraConfig) else peft_config_for(adapter, ModelConfig(), ATTENTION, None)
    return model if config is None else get_peft_model(model, config)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = make_moe_checkpoint(tmp_path_factory.mktemp("moe"))
    return InProcessEngine(start_llm(folder)), folder


EXPERT_LORA = LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)  # fmt: skip


@pytest.mark.parametrize("adapter", ["fura", "lora", EXPERT_LORA, "full"], ids=["fura", "lora", "lora experts", "full"])
def test_a_mixture_of_experts_follows_its_policy(moe, adapter):
    engine, folder = moe
    policy = adapted(folder, adapter)
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    sync.sync(everything=True)  # the engine is shared between tests
    start_logprobs = engine.prompt_logprobs(PROBE)
    for step in range(3):
        perturb_trained(policy, 0.1, seed=step)
        assert sync.sync().probe_max_gap < PARITY_NATS
    moved = (engine.prompt_logprobs(PROBE) - start_logprobs).abs().max()
    assert moved > 1000 * PARITY_NATS, "it must move"


@pytest.mark.parametrize("adapter", [EXPERT_LORA, "full"], ids=["lora experts", "full"])
def test_the_audit_names_the_one_stale_expert(moe, adapter, monkeypatch):
    engine, folder = moe
    policy = adapted(folder, adapter)
    sync = WeightSync(policy, engine, PROBE)
    sync.sync(everything=True)
    perturb_trained(policy, 0.1, seed=1)
    assert sync.sync().audit_gain_min == pytest.approx(1, abs=0.02)
    stack = "model.layers.1.mlp.experts"
    assert all(sync.proof.audit.knows(f"{stack}.{expert}") for expert in range(8))

    weights = {weight.name: weight for weight in sync.weights.values() if weight.module_name == stack}
    old = {name: Factors("dense", {"weight": weight.local_value().clone()}) for name, weight in weights.items()}
    write = vllm_model.fill

    def all_but_expert_3(region, parameter, factors, read, generator):
        if region.name in old and region.rows[0] // weights[region.name].shape[1] == 3:
            factors = old[region.name]
        write(region, parameter, factors, read, generator)

    monkeypatch.setattr(vllm_model, "fill", all_but_expert_3)
    perturb_trained(policy, 0.1, seed=2)
    with pytest.raises(probe.StaleEngineError, match=rf"audit: 1 of \d+ modules .*{stack}\.3 "):
        sync.sync()


@pytest.mark.parametrize("mode", ["auto", "dense"])
def test_a_stack_is_made_once_for_all_its_experts(moe, mode, monkeypatch):
    engine, folder = moe
    sync = WeightSync(adapted(folder, EXPERT_LORA), engine, PROBE, mode=mode)
    made, make = [], sync._factors
    monkeypatch.setattr(sync, "_factors", lambda weight: made.append(weight.name) or make(weight))
    sync.sync(everything=True)
    assert sorted(made) == sorted(sync.weights)


FAMILIES = {
    "mixtral": {"num_experts_per_tok": 2},  # its checkpoint holds experts one by one, under names of its own
    "granitemoe": {"num_experts_per_tok": 2},  # as stacks, under names of its own
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 96, "head_dim": 32},  # as stacks (.., in, out)
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    experts = {"num_local_experts": 4} | FAMILIES[request.param]
    folder = make_random_checkpoint(tmp_path_factory.mktemp(request.param), request.param, noise=0.06, **experts)
    return start_llm(folder, **factored_sync_settings()), folder


@pytest.mark.parametrize("as_in_a_server", [True, False])  # in this order: the other one leaves no base behind
def test_experts_arrive_however_their_checkpoint_holds_them(family, as_in_a_server):
    llm, folder = family
    audited = "llama4" not in folder.name  # whose experts take no routes
    experts = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    for adapter in ("fura", experts, "full"):
        engine = RemoteEngine(ProcessTransport(llm)) if as_in_a_server else InProcessEngine(llm)
        policy = adapted(folder, adapter)
        sync = WeightSync(policy, engine, PROBE, probe_every=1)
        _, report = check_that_two_updates_arrive(sync, 0.2, everything=not as_in_a_server)
        assert report.audit_gain_min == pytest.approx(1, abs=0.02)
        seen = {name for name, numbers in sync.proof.audit._judged.items() if numbers.any()}
        judged = {name for name in seen if name.rpartition(".")[2].isdecimal()}
        assert len(judged) == (2 * 4 if audited and adapter != "fura" else 0), "every expert of both layers"
        assert adapter != experts or not as_in_a_server or report.payload_bytes < 0.1 * report.dense_bytes
        if as_in_a_server:
            engine.close()
