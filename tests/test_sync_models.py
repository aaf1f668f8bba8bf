"""The fold into live engines that store weights in other ways: fp8 kernels, unpacked layouts, 16 bits, experts."""

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import (
    PARITY_NATS,
    check_that_two_updates_arrive,
    make_pythia_checkpoint,
    make_random_checkpoint,
    make_tiny_checkpoint,
    perturb_trained,
    start_llm,
)
from peft import IA3Config, LNTuningConfig, LoraConfig, RoadConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import ModelConfig

from fura_rl import FuraConfig
from fura_rl.adapters.registry import peft_config_for
from fura_rl.quickstart import BASE_MODEL
from fura_rl.sync import vllm_model, vllm_private
from fura_rl.sync.factors import Factors
from fura_rl.sync.fold import BaseSlices
from fura_rl.sync.probe import StaleEngineError
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.vllm_engine import InProcessEngine, ProcessTransport, factored_sync_settings
from fura_rl.sync.vllm_model import PoisonedEngineError
from fura_rl.sync.vllm_modules import is_in_checkpoint_layout
from fura_rl.sync.vllm_plan import Region
from fura_rl.sync.vllm_replies import kernel_of
from fura_rl.sync.weight_sync import WeightSync

PROBE = list(range(5, 45))


def start(folder, dtype="float32", **options):
    return InProcessEngine(start_llm(folder, dtype, **options))


def adapted(folder, adapter, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return get_peft_model(model, peft_config_for(adapter, ModelConfig(), None, None))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("dense"), tied=True)
    return start(folder), folder


def test_mixtures_of_experts_in_a_process_of_their_own():
    """An engine with experts cannot be started after one without: vLLM's expert-parallel group is the process's."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / "moe_checks.py")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


def test_weights_in_checkpoint_layout_are_written_in_place(tmp_path, monkeypatch):
    """As on a GPU: the parameters are what the kernel reads, so addresses that CUDA graphs hold stay valid."""
    import vllm._custom_ops as ops

    monkeypatch.setattr(ops, "_supports_onednn", False)
    folder = make_tiny_checkpoint(tmp_path / "model", tied=True)
    engine = start(folder)
    policy = adapted(folder, "fura")
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    layers = {name: module for name, module in engine.model.modules.items() if name.endswith("_proj")}
    addresses = {name: module.weight.data_ptr() for name, module in layers.items()}
    assert all(is_in_checkpoint_layout(m, engine.model.regions[name]) for name, m in layers.items())
    for step in range(3):
        perturb_trained(policy, 0.1, seed=step)
        report = sync.sync()
        assert report.probe_max_gap < PARITY_NATS
        assert report.audit_gain_min == pytest.approx(1.0, abs=0.01)
    assert {name: module.weight.data_ptr() for name, module in layers.items()} == addresses


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Its weights are stored (in, out), and its engine's kernels want (out, in)."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=256, vocab_size=len(tokenizer))
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return start(folder), folder


@pytest.mark.parametrize(
    "config",
    [
        FuraConfig(target_modules=["c_attn", "c_proj", "c_fc"]),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True),
        IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=[]),  # scales the biases, too
        LNTuningConfig(target_modules=["ln_1", "ln_f"]),
    ],
    ids=["fura", "lora", "ia3", "layer norms"],
)
def test_weights_that_a_checkpoint_stores_the_other_way_round_arrive(config, gpt2):
    engine, folder = gpt2
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    reports = check_that_two_updates_arrive(sync, 1.0, everything=True)
    assert [report.audit_gain_min for report in reports] == [None] * 2, "the probe is the proof"


FAMILIES = [
    "arcee", "cohere2", "ernie4_5", "exaone4", "gemma2", "gemma3_text", "glm4", "granite", "hunyuan_v1_dense", "llama",
    "nemotron", "olmo2", "olmo3", "opt", "phi3", "seed_oss", "stablelm", "starcoder2",
]  # fmt: skip


def check_that_a_policy_is_served(policy, engine, scale):
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    reports = check_that_two_updates_arrive(sync, scale, everything=True)
    assert [report.audit_gain_min for report in reports] == [pytest.approx(1.0, abs=0.01)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_model_families_are_served_with_no_code_of_their_own(family, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = make_random_checkpoint(tmp_path, family, noise=0.06, head_dim=32, **sizes)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), FuraConfig(target_modules="all-linear"))
    with vllm_private.keeping_classes(policy):
        engine = start(folder)
    check_that_a_policy_is_served(policy, engine, 0.3)


@pytest.mark.parametrize("as_in_a_server", [False, True])
def test_rows_that_a_loader_puts_in_another_order_arrive_and_are_audited(as_in_a_server, tmp_path, monkeypatch):
    folder = make_pythia_checkpoint(tmp_path)
    llm = start_llm(folder, **factored_sync_settings())
    for config in (
        FuraConfig(target_modules="all-linear"),
        RoadConfig(target_modules=["query_key_value"], group_size=8),
    ):
        engine = RemoteEngine(ProcessTransport(llm)) if as_in_a_server else InProcessEngine(llm)
        policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        sync = WeightSync(policy, engine, PROBE, probe_every=1)
        reports = check_that_two_updates_arrive(sync, 0.3, everything=not as_in_a_server)
        assert [report.audit_gain_min for report in reports] == [pytest.approx(1.0, abs=0.01)] * 2
        if as_in_a_server:
            engine.close()
    assert "embed_out.weight" in sync.weights
    if as_in_a_server:
        return
    stale, write = "gpt_neox.layers.1.attention.query_key_value", vllm_model.fill
    monkeypatch.setattr(
        vllm_model, "fill", lambda region, *rest: None if region.name == f"{stale}.weight" else write(region, *rest)
    )
    perturb_trained(policy, 0.3, seed=2)
    with pytest.raises(StaleEngineError, match=rf"1 of \d+ modules .*{stale}"):
        sync.sync()


def test_a_checkpoint_of_the_base_model_alone_is_known_by_a_server(tmp_path):
    """As GPT-2's on the hub, whose names lack the `transformer.` of the whole model."""
    folder = make_random_checkpoint(tmp_path, "gpt2", n_embd=64, n_layer=2, n_head=2)
    weights = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    llm = start_llm(folder, block_size=32, **factored_sync_settings())
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), FuraConfig(target_modules=["c_attn", "c_fc"]))
    with closing(RemoteEngine(ProcessTransport(llm))) as engine:
        check_that_two_updates_arrive(WeightSync(policy, engine, PROBE, probe_every=1), 1.0)


@pytest.mark.slow
def test_what_an_attention_layer_derives_from_a_weight_follows_it(tmp_path):
    """To decode, multi-head latent attention multiplies by parts of kv_b_proj, in fp8 engines by copies of them; what
    it makes of a prompt, and so the probe, shows nothing of these."""
    sizes = {"num_key_value_heads": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    ranks = {"kv_lora_rank": 512, "q_lora_rank": 64, "first_k_dense_replace": 2, "topk_method": "noaux_tc"}
    folder = make_random_checkpoint(tmp_path, "deepseek_v3", **sizes, **ranks)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    policy = get_peft_model(policy, LoraConfig(target_modules=["kv_b_proj"]))
    engine = start(folder, "bfloat16", quantization="fp8_per_channel")
    # vLLM 0.31 and transformers 5 differ on this model by 0.08 nats in float32, before anything is synced
    sync = WeightSync(policy, engine, PROBE, probe_tolerance=2.0)
    sync.sync()
    layers = [module for module in engine.model.modules.values() if hasattr(module, "W_UV")]
    assert len(layers) == 2
    before = [(layer.W_UV.clone(), layer.W_UV.data_ptr()) for layer in layers]
    perturb_trained(policy, 2.0, seed=0)
    sync.sync()
    for layer, (old, address) in zip(layers, before, strict=True):
        synced = layer.W_UV.clone()
        with engine.model.context():
            layer.process_weights_after_loading(engine.dtype)
        assert torch.equal(synced, layer.W_UV)
        assert not torch.equal(synced, old)
        assert layer.W_UV.data_ptr() == address, "CUDA graphs read it there"


def test_a_policy_of_a_class_that_vllm_rewrites_computes_trains_and_is_served(tmp_path):
    folder = make_random_checkpoint(tmp_path, "smollm3")
    policy = adapted(folder, "fura")
    with vllm_private.keeping_classes(policy):
        engine = start(folder)
    check_that_a_policy_is_served(policy, engine, 0.1)
    ids = torch.tensor([PROBE])
    policy(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)
    again = AutoModelForCausalLM.from_pretrained(folder)
    with policy.disable_adapter():
        assert torch.equal(again(input_ids=ids).logits, policy(input_ids=ids).logits)


@pytest.mark.parametrize("targets", [["k_proj"], ["q_proj", "k_proj", "v_proj", "down_proj"]])
def test_biases_that_a_merge_moves_arrive_in_a_fused_module_too(targets, tmp_path):
    folder = make_random_checkpoint(tmp_path, "qwen2", tie_word_embeddings=True)
    engine = start(folder)
    config = RoadConfig(target_modules=targets, group_size=8)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    check_that_a_policy_is_served(policy, engine, 1.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.3), ("float16", 0.03)])
def test_a_16_bit_engine_is_as_near_to_its_trainer_after_syncs_as_before(tmp_path, dtype, tolerance):
    folder = make_tiny_checkpoint(tmp_path / "model", tied=True, dtype=getattr(torch, dtype))
    engine = start(folder, dtype)
    policy = adapted(folder, "fura", dtype=getattr(torch, dtype))
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    floor = sync.sync().probe_max_gap
    for step in range(3):
        perturb_trained(policy, 0.1, seed=step)
        report = sync.sync()
        assert report.probe_max_gap < max(3 * floor, tolerance)
        assert 0.8 < report.audit_gain_min < 1.2


def test_a_float16_engine_refuses_what_it_cannot_hold_before_it_generates(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "model", tied=True)
    engine = start(folder, "float16")
    policy = adapted(folder, "lora")
    name = "model.layers.1.mlp.up_proj"
    layer = policy.get_base_model().get_submodule(name)
    base, down = layer.get_base_layer().weight.data, layer.lora_A["default"].weight.data
    sync = WeightSync(policy, engine, PROBE)
    sync.sync()

    layer.lora_B["default"].weight.data[3, 0] = 1e6 / float(down[0].abs().max())  # a finite step: only its fold is not
    with pytest.raises(OverflowError, match=rf"{re.escape(name)}\.weight.*exceeds 65504.*bfloat16"):
        sync.sync()
    with pytest.raises(PoisonedEngineError, match="refuses to generate"):
        engine.model.model(None)
    layer.lora_B["default"].weight.data.zero_()
    sync.sync()

    base[5, 5] = 1e5
    with pytest.raises(ValueError, match=rf"float16.*1 weights are larger: {re.escape(name)}\.weight \(1e\+05"):
        WeightSync(policy, engine, PROBE)


def test_an_fp8_engine_is_requantized_from_the_folded_weight_and_audited(tmp_path, monkeypatch):
    folder = make_tiny_checkpoint(tmp_path / "model", tied=False, dtype=torch.bfloat16)
    engine = start(folder, "bfloat16", quantization="fp8_per_channel")
    policy = adapted(folder, "fura", dtype=torch.bfloat16)
    sync = WeightSync(policy, engine, PROBE, probe_every=1, probe_tolerance=2.0)
    floor = sync.sync().probe_max_gap
    before = engine.prompt_logprobs(PROBE)
    perturb_trained(policy, 0.03, seed=0)  # weights move by 2e-3 of themselves
    assert sync.sync().audit_gain_min is None, "in fp8's own rounding, which bfloat16's would take for stale weights"
    perturb_trained(policy, 2.0, seed=1)
    report = sync.sync()
    assert (engine.prompt_logprobs(PROBE) - before).abs().max() > 3 * report.probe_max_gap, "it must move"
    assert report.probe_max_gap < 3 * floor
    assert report.audit_gain_min == pytest.approx(1.0, abs=0.3)

    perturb_trained(policy, 2.0, seed=2)
    monkeypatch.setattr(engine.model, "write", lambda *args: None)
    with pytest.raises(StaleEngineError, match=r"audit: 14 of 14 modules "):
        sync.sync()


@pytest.mark.parametrize("known", [True, False])
def test_a_row_that_a_loader_makes_a_vector_of_is_written(known):
    """As the routers' bias of Ernie 4.5."""
    region = Region("bias", (0, 1), (0, 4), 4, False, "bias", 0, (4,), (1,))
    row, bias = torch.arange(4.0)[None], torch.zeros(4)
    vllm_model.fill(region, bias, Factors("dense", {"weight": row}) if known else None, lambda _: BaseSlices(row), None)
    assert torch.equal(bias, row[0])


def test_an_upgrade_of_vllm_that_moves_a_private_name_is_refused_by_name(monkeypatch):
    moved = {"vllm.model_executor.model_loader.reload.layerwise": ("no_such_name",), "vllm.no_such_module": ("x",)}
    monkeypatch.setattr(vllm_private, "PRIVATE_NAMES", moved)
    with pytest.raises(
        RuntimeError, match=r"layerwise\.no_such_name, vllm\.no_such_module\.x.*fura_rl reads vLLM 0\.31"
    ):
        vllm_private.check_layout()


def test_a_tensor_without_a_place_in_the_engine_is_refused_before_anything_is_written(dense):
    engine, folder = dense
    sync = WeightSync(adapted(folder, "fura"), engine, PROBE)
    del engine.model.owners["model.layers.1.self_attn.o_proj.weight"]
    with pytest.raises(KeyError, match=r"no place for model\.layers\.1\.self_attn\.o_proj\.weight"):
        sync.sync()
    assert engine.model.poisoned is None


def test_an_interrupted_write_makes_the_engine_refuse_to_generate_until_it_is_synced(dense, monkeypatch):
    engine, folder = dense
    policy = adapted(folder, "fura")
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    sync.sync(everything=True)  # the engine is shared between tests
    perturb_trained(policy, 0.1, seed=0)
    write = engine.model._write_module

    def interrupted(module, *args):
        if module.startswith("model.layers.1"):
            raise KeyboardInterrupt
        write(module, *args)

    monkeypatch.setattr(engine.model, "_write_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sync.sync()
    with pytest.raises(PoisonedEngineError, match="interrupted while it wrote"):
        engine.model.model(None, None)
    monkeypatch.undo()
    assert sync.sync().probe_max_gap < PARITY_NATS


@pytest.mark.parametrize(
    ("dtype", "quantization", "tolerance"), [("float32", None, PARITY_NATS), ("bfloat16", "fp8_per_channel", 2.0)]
)
def test_a_module_that_could_not_be_filled_computes_what_it_did_from_where_it_did(
    tmp_path, monkeypatch, dtype, quantization, tolerance
):
    folder = make_tiny_checkpoint(tmp_path / "model", tied=False, dtype=getattr(torch, dtype))
    engine = start(folder, dtype, quantization=quantization)
    policy = adapted(folder, "fura", dtype=getattr(torch, dtype))
    sync = WeightSync(policy, engine, PROBE, probe_every=1, probe_tolerance=tolerance)
    sync.sync()
    name = "model.layers.1.mlp.gate_up_proj"
    module, kernel = engine.model.modules[name], kernel_of(engine.model, name)
    x = torch.randn(3, 64, dtype=getattr(torch, dtype))
    address, before = module.weight.data_ptr(), kernel(x)
    fill = vllm_model.fill

    def half_way(region, *args):
        if region.name == "model.layers.1.mlp.up_proj.weight":
            raise MemoryError("out of memory in a fold")
        fill(region, *args)

    perturb_trained(policy, 2.0, seed=1)
    monkeypatch.setattr(vllm_model, "fill", half_way)
    with pytest.raises(MemoryError):
        sync.sync()
    monkeypatch.undo()
    assert torch.equal(kernel(x), before)
    assert module.weight.data_ptr() == address
    assert engine.model.poisoned
    report = sync.sync()
    assert not torch.equal(kernel(x), before)
    assert module.weight.data_ptr() == address
    assert report.probe_max_gap < tolerance
    assert report.audit_gain_min == pytest.approx(1.0, abs=0.3)


def test_a_bias_is_as_it_was_where_its_module_could_not_be_filled(gpt2, monkeypatch):
    """A bias is no tensor that is rebuilt, so it is filled live."""
    engine, folder = gpt2
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), FuraConfig(target_modules=["c_attn"]))
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    sync.sync(everything=True)  # the engine is shared between tests
    name = "transformer.h.1.mlp.c_fc"
    bias = engine.model.modules[name].bias
    before, fill = bias.clone(), vllm_model.fill

    def full(region, *args):
        fill(region, *args)
        if region.name == f"{name}.bias":
            raise MemoryError("out of memory in a fold")

    policy.get_base_model().get_submodule(name).bias.data.add_(1.0)
    monkeypatch.setattr(vllm_model, "fill", full)
    with pytest.raises(MemoryError):
        sync.sync(everything=True)
    assert torch.equal(bias, before)
    monkeypatch.undo()
    assert sync.sync(everything=True).probe_max_gap < PARITY_NATS
    assert torch.allclose(bias, before + 1.0)


def not_packed(engine, monkeypatch):
    """A module whose packed weight is gone when the new one cannot be made."""

    def no_room(module):
        raise MemoryError("no room for the packed weight")

    method = engine.model.modules["model.layers.1.self_attn.o_proj"].quant_method
    monkeypatch.setattr(method, "process_weights_after_loading", no_room)


def half_filled(engine, monkeypatch):
    """A weight that is written in place, as all of them are on a GPU."""
    fill = vllm_model.fill

    def half_way(region, parameter, *args):
        if region.name == "model.layers.1.post_attention_layernorm.weight":
            parameter.data[:32] = 0.0
            raise MemoryError("out of memory in a fold")
        fill(region, parameter, *args)

    monkeypatch.setattr(vllm_model, "fill", half_way)


@pytest.mark.parametrize("fault", [not_packed, half_filled])
def test_what_a_failed_write_has_begun_is_mended_by_the_next_one_that_succeeds_whatever_it_is_for(
    dense, monkeypatch, fault
):
    """Without adapters on those modules, the next sync has nothing for them."""
    engine, folder = dense
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = get_peft_model(model, peft_config_for("fura", ModelConfig(), ["up_proj"], None))
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    sync.sync(everything=True)  # the engine is shared between tests
    perturb_trained(policy, 0.1, seed=0)
    fault(engine, monkeypatch)
    with pytest.raises(MemoryError):
        sync.sync(everything=True)
    with pytest.raises(PoisonedEngineError):
        engine.model.model(None)
    monkeypatch.undo()
    assert sync.sync().probe_max_gap < PARITY_NATS
