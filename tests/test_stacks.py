"""Stacks of experts, as an engine finds them in its own checkpoint: expert by expert, or as they are."""

import pytest
import torch
from conftest import make_random_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fura_rl.sync.base_weights import BaseWeights
from fura_rl.sync.checkpoint_names import CheckpointNames
from fura_rl.sync.fingerprint import base_sample
from fura_rl.sync.fold import checkpoint_weights
from fura_rl.sync.stacks import parts_of

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
# family -> the first matrix of its checkpoint's experts; None where it holds them stacked
FIRST_MATRIX = {
    "qwen3_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "granitemoe": None,
    "gpt_oss": None,  # (experts, in, out)
}


@pytest.fixture(scope="module", params=FIRST_MATRIX)
def checkpoint(request, tmp_path_factory):
    folder = make_random_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **EXPERTS)
    named = CheckpointNames(model := AutoModelForCausalLM.from_pretrained(folder)).named(checkpoint_weights(model))
    return folder, FIRST_MATRIX[request.param], {n: w for n, w in named.items() if len(w.shape) == 3}


def base_of(folder, stacks):
    base = BaseWeights(str(folder), None, torch.device("cpu"))
    base.parts = {name: list(parts_of(name, w.shape, w.parts)) for name, w in stacks.items() if w.parts}
    return base


def test_a_stack_is_read_from_the_checkpoint_as_the_policy_holds_it(checkpoint):
    folder, first, stacks = checkpoint
    base = base_of(folder, stacks)
    assert len(stacks) == 4
    for name, weight in stacks.items():
        assert name in base
        assert not weight.held_otherwise
        whole = weight.parameter.detach().flatten(0, 1)
        assert torch.equal(base.whole(name), whole)
        height = weight.shape[1]
        for rows in ((0, 3), (height - 2, height), (height // 2 - 1, height // 2 + 2), (5, 2 * height + 3)):
            assert torch.equal(base.read(name)(rows, (4, 13)), whole[slice(*rows), 4:13])
    parts = [part for parts in base.parts.values() for part in parts]
    assert (parts[:1] == [first]) if first else (parts == [])
    assert set(parts) <= set(load_file(folder / "model.safetensors"))


def test_the_base_of_other_experts_is_known_by_their_numbers(checkpoint, tmp_path):
    folder, first, stacks = checkpoint
    samples = {name: base_sample(w.read(), w.local_rows, w.matrix_shape[1]) for name, w in stacks.items()}
    assert base_of(folder, stacks).differences(samples) == []
    name = next(iter(stacks))
    tensors = load_file(folder / "model.safetensors")
    changed = first or name
    tensors[changed] = tensors[changed] * 1.1
    save_file(tensors, tmp_path / "model.safetensors")
    assert base_of(tmp_path, stacks).differences(samples) == [name]
    del tensors[changed]
    save_file(tensors, tmp_path / "model.safetensors")
    assert base_of(tmp_path, stacks).differences(samples) == [name]


def test_loras_payload_on_the_experts_of_a_real_shape_is_a_few_percent_of_them():
    """Qwen3-30B-A3B's, of which one layer is enough."""
    config = Qwen3MoeConfig(
        num_hidden_layers=1, hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        lora = LoraConfig(r=16, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
        policy = get_peft_model(Qwen3MoeForCausalLM(config), lora)
    stacks = [weight for weight in checkpoint_weights(policy) if weight.layer is not None]
    assert len(stacks) == 2
    sent = sum(tensor.numel() for weight in stacks for tensor in weight.factors().tensors.values())
    assert sent / sum(weight.element_count for weight in stacks) == pytest.approx(0.0217, abs=1e-4)
