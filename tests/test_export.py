"""Exports: a folded checkpoint computes what the policy computes, in transformers and vLLM; a LoRA states its error."""

import json
import re

import pytest
import torch
from conftest import PARITY_NATS, perturb_trained, relative_error
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from fura_rl.adapters.quantized import keep_layout
from fura_rl.adapters.registry import METHODS, peft_config_for
from fura_rl.export import export, is_adapter, load_policy, updates
from fura_rl.fingerprint import describe_base, record
from fura_rl.sync import probe
from fura_rl.sync.fold import checkpoint_weights

QUICK = ("fura", "pissa", "lora_full")
ADAPTERS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name, method in METHODS.items()
    if method.config_class is not None
]


def trained_adapter(folder, checkpoint, name, **loading):
    """A checkpoint of method `name` whose trained numbers were moved, and its policy."""
    quantization = None
    if METHODS[name].load_in_4bit:
        from transformers import BitsAndBytesConfig

        quantization = "nf4"
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", **loading)
    for module in model.modules():
        keep_layout(module)
    policy = get_peft_model(model, peft_config_for(name, ModelConfig(lora_r=8), None, None))
    perturb_trained(policy, 0.2, seed=1)
    policy.save_pretrained(folder)
    record(folder, describe_base(str(checkpoint), None, quantization))
    return policy.eval()


def token_ids(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)("What is 27 + 15? \\boxed{42}")["input_ids"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_folded_checkpoint_is_the_policy_for_every_method(name, tied_checkpoint, tmp_path):
    policy = trained_adapter(tmp_path / "adapter", tied_checkpoint, name)
    told = export(str(tmp_path / "adapter"), tmp_path / "plain", None, "auto", None)
    assert not is_adapter(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").eval()
    assert plain.dtype == torch.float32
    assert not hasattr(plain.config, "quantization_config")
    ids = token_ids(tmp_path / "plain")
    gap = probe.max_gap(probe.trainer_logprobs(policy, ids), probe.trainer_logprobs(plain, ids))
    assert gap < PARITY_NATS
    base = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    moved = probe.max_gap(probe.trainer_logprobs(base, ids), probe.trainer_logprobs(plain, ids))
    assert moved > 200 * PARITY_NATS, "the export must differ from the base"
    assert float(re.search(r"difference to the policy: (\S+) nats", told).group(1)) < PARITY_NATS


@pytest.mark.parametrize("checkpoint", ["tied", "untied"])
def test_vllm_serves_a_folded_checkpoint_with_the_policys_log_probs(checkpoint, request, tmp_path):
    from vllm import LLM, SamplingParams

    folder = request.getfixturevalue(f"{checkpoint}_checkpoint")
    policy = trained_adapter(tmp_path / "adapter", folder, "fura")
    export(str(tmp_path / "adapter"), tmp_path / "plain", None, "auto", None)
    llm = LLM(
        str(tmp_path / "plain"), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**26, max_model_len=128
    )
    ids = token_ids(folder)
    [output] = llm.generate(
        [{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    served = torch.tensor([step[i].logprob for step, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True)])
    assert probe.max_gap(served, probe.trainer_logprobs(policy, ids)) < PARITY_NATS


def test_the_exported_lora_is_the_best_of_its_rank_and_its_error_is_the_stated_one(tied_checkpoint, tmp_path):
    policy = trained_adapter(tmp_path / "adapter", tied_checkpoint, "fura")
    told = export(str(tmp_path / "adapter"), tmp_path / "lora", None, "auto", 6)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied_checkpoint), tmp_path / "lora")
    wanted, kept = dict(updates(policy, str(tied_checkpoint))), dict(updates(lora, str(tied_checkpoint)))
    assert wanted.keys() == kept.keys()
    errors = {}
    for name, delta in wanted.items():
        best = torch.linalg.svdvals(delta.double())[6:].norm()
        errors[name] = (delta - kept[name]).double().norm()
        assert errors[name] == pytest.approx(best.item(), rel=1e-3)
    total = sum(error**2 for error in errors.values()) / sum(delta.double().norm() ** 2 for delta in wanted.values())
    assert float(re.search(r"error of the update: ([\d.]+);", told).group(1)) == pytest.approx(
        total.sqrt().item(), abs=1e-4
    )
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "| rank | 6 |" in card
    assert "relative error of the update" in card
    assert str(tmp_path) not in card, "no path of this machine"


def test_a_lora_of_full_rank_is_the_policy_and_loads_with_peft_alone(tied_checkpoint, tmp_path):
    policy = trained_adapter(tmp_path / "adapter", tied_checkpoint, "milora")
    export(str(tmp_path / "adapter"), tmp_path / "lora", None, "auto", 8)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    ids = torch.tensor([token_ids(tied_checkpoint)])
    delta = dict(updates(policy, str(tied_checkpoint)))
    assert max(torch.linalg.matrix_rank(d, rtol=1e-3).item() for d in delta.values()) > 8, "MiLoRA moves two subspaces"
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with torch.no_grad():
        assert relative_error(loaded(ids).logits, policy(ids).logits) < 0.5
    export(str(tmp_path / "adapter"), tmp_path / "wide", None, "auto", 16)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "wide")
    with torch.no_grad():
        assert relative_error(loaded(ids).logits, policy(ids).logits) < 1e-4


def test_a_16_bit_export_is_rounded_once_from_the_fold(bfloat16_checkpoint, tmp_path):
    policy = trained_adapter(tmp_path / "adapter", bfloat16_checkpoint, "fura")
    export(str(tmp_path / "adapter"), tmp_path / "plain", None, "auto", None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    state = plain.state_dict()
    for weight in checkpoint_weights(policy):
        assert torch.equal(state[weight.name], weight.value().to(torch.bfloat16)), weight.name


def test_exports_that_cannot_be_are_refused(tied_checkpoint, untied_checkpoint, tmp_path):
    trained_adapter(tmp_path / "adapter", tied_checkpoint, "lora")
    adapter = str(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json, so is no adapter checkpoint"):
        export(str(tied_checkpoint), tmp_path / "x", None, "auto", None)
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(adapter, tmp_path / "adapter", None, "auto", None)
    with pytest.raises(ValueError, match="--dtype 'int' is not auto"):
        export(adapter, tmp_path / "x", None, "int", None)
    with pytest.raises(ValueError, match="--lora_rank 500 must lie between 1 and 64"):
        export(adapter, tmp_path / "x", None, "auto", 500)
    with pytest.raises(ValueError, match="fingerprint mismatch"):
        export(adapter, tmp_path / "x", "quickstart", "auto", None)
    assert load_policy(adapter, str(tied_checkpoint), None) is not None
