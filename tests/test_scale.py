"""The simulator's counts against the models, adapters and payloads themselves."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from trl import ModelConfig

from fura_rl.adapters.budget import count_trained
from fura_rl.adapters.registry import peft_config_for
from fura_rl.benchmark.models import SIZES
from fura_rl.quickstart import BASE_MODEL
from fura_rl.scale import (
    GIB,
    MODELS,
    Hardware,
    Model,
    Plan,
    adapter_of,
    check,
    engine_bytes,
    main,
    step_seconds,
    sync_bytes,
    trainer_bytes,
)  # fmt: skip
from fura_rl.sync.fold import checkpoint_weights
from fura_rl.sync.payload import decode, encode

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = [
    kind(**SHAPE, **HEADS, tie_word_embeddings=tied)
    for kind in (LlamaConfig, Qwen2Config, Qwen3Config)
    for tied in (False, True)
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.model_type}-{config.tie_word_embeddings}")
@pytest.mark.parametrize("adapter", ["fura", "lora", "full"])
def test_counts_are_those_of_the_model(config, adapter):
    if config.model_type == "qwen2":
        config.head_dim = config.hidden_size // config.num_attention_heads
    model = Model.of(config)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    assert model.parameters == sum(p.numel() for p in real.parameters())
    assert adapter_of(model, adapter, 8).trained == count_trained(adapter, config, ModelConfig(lora_r=8))
    if adapter == "fura":
        with torch.device("meta"):
            policy = get_peft_model(real, peft_config_for("fura", ModelConfig(), None, None))
        frozen = sum(b.numel() for name, b in policy.named_buffers() if "fura_core" in name)
        assert adapter_of(model, adapter, 8).frozen == frozen


@pytest.mark.parametrize(("name", "size"), [("0.6b", "qwen3-0.6b"), ("1.7b", "qwen3-1.7b"), ("7b", "7b")])
def test_the_named_models_are_those_of_the_benchmark(name, size):
    model = MODELS[name]
    shape = SIZES[size]
    assert (model.hidden, model.intermediate, model.layers, model.vocab) == (
        shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"], shape["vocab_size"],
    )  # fmt: skip
    assert (model.heads, model.kv_heads, model.head_dim) == (
        shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"],
    )  # fmt: skip


def test_the_largest_has_the_size_of_its_name():
    assert MODELS["70b"].parameters == 70_553_706_496  # Llama 3 70B, as its model card's safetensors say
    assert MODELS["32b"].parameters == pytest.approx(32.8e9, rel=0.01)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("adapter", ["fura", "lora"])
def test_the_payload_is_what_a_sync_of_the_quickstart_encodes(adapter, dtype, itemsize):
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    policy = get_peft_model(base, peft_config_for(adapter, ModelConfig(lora_r=8), None, None))
    updates = {weight.name: weight.factors() for weight in checkpoint_weights(policy) if weight.trained}
    sent = 0
    for chunk in encode(updates, dtype):
        for factors in decode(chunk.data, chunk.checksum).values():
            sent += sum(tensor.nbytes for tensor in factors.tensors.values())
    plain = adapter_of(Model.of(base.config), adapter, 8, engine_itemsize=itemsize)
    assert sent == plain.payload * plain.payload_itemsize


def test_sharding_divides_what_it_says():
    model, count = MODELS["7b"], 32
    sizes = {kind: trainer_bytes(model, Plan(sharding=kind)) for kind in ("ddp", "zero2", "zero3", "fsdp2")}
    assert sizes["ddp"]["base weights"] == sizes["zero2"]["base weights"] == model.parameters * 2
    assert sizes["fsdp2"] == sizes["zero3"]
    for name in ("gradients", "Adam's moments"):
        assert sizes["ddp"][name] == count * sizes["zero2"][name] == count * sizes["fsdp2"][name]
    assert sizes["ddp"]["base weights"] == count * sizes["fsdp2"]["base weights"]
    assert sizes["ddp"]["frozen bases of the adapter"] == sizes["fsdp2"]["frozen bases of the adapter"]


def test_70b_needs_sharding_and_a_split_engine():
    model, hardware = MODELS["70b"], Hardware()
    assert sum(trainer_bytes(model, Plan(sharding="fsdp2")).values()) < hardware.gpu_gib * GIB
    assert sum(trainer_bytes(model, Plan(sharding="zero2")).values()) > hardware.gpu_gib * GIB
    assert engine_bytes(model, Plan(tensor_parallel=1), hardware)["keys and values"] < 0
    moved = sync_bytes(model, Plan())
    assert moved["payload to one server"] < 0.03 * moved["a sync of every weight, to one server"]


def test_twice_the_machines_take_half_of_what_divides():
    model, hardware = MODELS["7b"], Hardware()
    one = step_seconds(model, Plan(sharding="ddp"), hardware)
    two = step_seconds(model, Plan(sharding="ddp", trainer_nodes=8), hardware)
    assert two["training: arithmetic"] == pytest.approx(one["training: arithmetic"] / 2)
    assert two["rollouts"] == one["rollouts"]
    assert step_seconds(model, Plan(completion_tokens=8192), hardware)["rollouts"] > 2 * one["rollouts"]


def test_what_does_not_fit_together_is_said_at_once(capsys):
    with pytest.raises(ValueError, match=r"gpus=0 must be 1 or more; sharding='fsdp' is not one of ddp, zero2"):
        check(Plan(gpus=0, sharding="fsdp"))
    assert main(["--tensor_parallel", "5"]) == 2
    assert "tensor_parallel=5 does not divide the 32 rollout GPUs" in capsys.readouterr().err
    assert main([]) == 0
    assert "70.55 billion parameters" in capsys.readouterr().out
