"""The fold, for every adapter method of the table: what it serves is what the policy computes, and W is not written."""

import copy
import dataclasses

import pytest
import torch
from conftest import TOLERANCE, perturb_trained, relative_error
from peft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    RandLoraConfig,
    RoadConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import ModelConfig

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.registry import METHODS, peft_config_for
from fura_rl.sync import payload
from fura_rl.sync.factors import RULES, Factors, fold_slice
from fura_rl.sync.fold import check_folds, checkpoint_weights, fold, folded_weight
from fura_rl.sync.fold_rules import SMALL_FORMS, core_to_batch, small_factors, small_factors_together
from fura_rl.trainer_settings import check_settings

# Methods by their PEFT config, and the rule that folds them; "dense" where nothing smaller than the weight will do.
TARGETS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj", "down_proj"]}
FOLDS = {
    "fura": (FuraConfig(**TARGETS), "block_columns"),
    "fura rows": (FuraConfig(**TARGETS, block_axis="out"), "block_rows"),
    "fura qr": (FuraConfig(**TARGETS, basis="qr", singular_values="merge_trained"), "block_columns"),
    "fura core": (FuraConfig(**TARGETS, form="core"), "dense"),
    "svd": (FuraConfig(**TARGETS, block_size="full"), "block_columns"),
    "lora": (LoraConfig(**TARGETS, r=4), "low_rank"),
    "rslora": (LoraConfig(**TARGETS, r=4, use_rslora=True), "low_rank"),
    "dora": (LoraConfig(**TARGETS, r=4, use_dora=True), "scaled_low_rank"),
    "pissa": (LoraConfig(**TARGETS, r=4, init_lora_weights="pissa"), "low_rank"),
    "olora": (LoraConfig(**TARGETS, r=4, init_lora_weights="olora"), "low_rank"),
    "adalora": (AdaLoraConfig(**TARGETS, total_step=10, lora_alpha=64), "dense"),
    "oft": (OFTConfig(**TARGETS, r=0, oft_block_size=16), "block_columns"),
    "oft wide": (OFTConfig(**TARGETS, r=0, oft_block_size=32), "block_columns"),
    "oft shared": (OFTConfig(**TARGETS, r=0, oft_block_size=16, block_share=True), "block_columns"),
    "hira": (HiraConfig(**TARGETS, r=4), "hadamard"),
    "randlora": (RandLoraConfig(**TARGETS, r=4), "dense"),
    "loha": (LoHaConfig(**TARGETS, r=4), "dense"),
    "lokr": (LoKrConfig(**TARGETS, r=4), "dense"),
    "miss": (MissConfig(**TARGETS, r=4), "dense"),
    "vera": (VeraConfig(**TARGETS, r=4), "dense"),
}

TINY_QWEN2 = Qwen2Config(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=100, tie_word_embeddings=False,
)  # fmt: skip
TINY_GPT2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=101, bos_token_id=1, eos_token_id=2)

ADAPTERS = [name for name, method in METHODS.items() if method.config_class is not None]


def adapted_policy(checkpoint, name, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    config = peft_config_for(name, ModelConfig(), None, None)
    model = get_peft_model(model, config)
    perturb_trained(model, 0.3, seed=1)
    return model.eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_folded_checkpoint_computes_what_the_policy_computes(tied_checkpoint, name):
    policy = adapted_policy(tied_checkpoint, name)
    plain = AutoModelForCausalLM.from_pretrained(tied_checkpoint, dtype=torch.float32).eval()
    ids = torch.randint(5, 90, (2, 12))
    expected = policy(input_ids=ids).logits
    assert relative_error(plain(input_ids=ids).logits, expected) > 1e-3, "the adapter must change the policy"
    state = {weight.name: weight.value().clone() for weight in checkpoint_weights(policy)}
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}  # tied to the embedding
    assert not unexpected
    plain.tie_weights()
    assert relative_error(plain(input_ids=ids).logits, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ADAPTERS)
def test_base_weights_keep_every_bit_and_their_storage_over_many_folds(bfloat16_checkpoint, name):
    policy = adapted_policy(bfloat16_checkpoint, name, torch.bfloat16)
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)][:3]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [(weight.data_ptr(), weight.detach().clone()) for weight in weights]
    for step in range(50):
        perturb_trained(policy, 0.1, seed=step)
        for layer in layers:
            folded_weight(layer)
    for weight, (pointer, bits) in zip(weights, before, strict=True):
        assert weight.data_ptr() == pointer
        assert torch.equal(weight, bits)
    assert not any(layer.merged for layer in layers)


def test_a_fold_of_a_merged_adapter_is_refused_except_for_fura_which_keeps_the_pristine_weight(tied_checkpoint):
    lora, fura = adapted_policy(tied_checkpoint, "lora"), adapted_policy(tied_checkpoint, "fura")
    expected = folded_weight(next(m for m in fura.modules() if isinstance(m, BaseTunerLayer)))
    for policy in (lora, fura):
        policy.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call unmerge_adapter\(\) before a weight sync"):
        folded_weight(next(m for m in lora.modules() if isinstance(m, BaseTunerLayer)))
    assert torch.equal(folded_weight(next(m for m in fura.modules() if isinstance(m, BaseTunerLayer))), expected)


def test_a_failing_merge_leaves_the_base_weight_and_the_adapter_as_they_were(tied_checkpoint, monkeypatch):
    policy = adapted_policy(tied_checkpoint, "lora")
    layer = next(m for m in policy.modules() if isinstance(m, BaseTunerLayer))
    before = copy.deepcopy(layer.get_base_layer().weight.data)

    def fail(*args, **kwargs):
        layer.get_base_layer().weight.data.add_(1)
        raise FloatingPointError

    monkeypatch.setattr(layer, "merge", fail)
    with pytest.raises(FloatingPointError):
        folded_weight(layer)
    assert torch.equal(layer.get_base_layer().weight.data, before)


def test_trained_weights_beside_adapters_are_sent_too(tied_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    config = peft_config_for("lora", ModelConfig(), ["q_proj"], {"modules_to_save": ["mlp.gate_proj"]})
    policy = get_peft_model(model, config)
    trained = {weight.name for weight in checkpoint_weights(policy) if weight.trained}
    layers = model.config.num_hidden_layers
    assert trained == {
        f"model.layers.{i}.{name}.weight" for i in range(layers) for name in ("self_attn.q_proj", "mlp.gate_proj")
    }


@pytest.mark.parametrize(
    ("module", "config"),
    [
        ("lm_head", LoraConfig(r=4)),
        ("lm_head", FuraConfig()),
        ("lm_head", FuraConfig(form="core")),
        ("embed_tokens", LoraConfig(r=4)),
    ],
    ids=["lora head", "fura head", "fura core head", "lora embedding"],
)
def test_an_adapter_on_one_name_of_a_tied_weight_is_refused_and_served_where_nothing_is_tied(
    module, config, tied_checkpoint, untied_checkpoint
):
    config = dataclasses.replace(config, target_modules=["q_proj", module])
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(untied_checkpoint), config)
    assert f"{module}.weight" in {weight.name.removeprefix("model.") for weight in checkpoint_weights(policy)}
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_checkpoint), config)
    with pytest.raises(NotImplementedError, match=rf"{module}, but tie_word_embeddings.* {module} out of target_mod"):
        checkpoint_weights(policy)


def test_adapters_that_are_tied_like_their_weights_are_folded_once(tied_checkpoint):
    config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_checkpoint), config).eval()
    perturb_trained(policy, 0.3, seed=1)
    plain, ids = AutoModelForCausalLM.from_pretrained(tied_checkpoint), torch.randint(5, 90, (2, 12))
    plain.load_state_dict({weight.name: weight.value() for weight in checkpoint_weights(policy)}, strict=False)
    plain.tie_weights()
    assert relative_error(plain(input_ids=ids).logits, policy(input_ids=ids).logits) < TOLERANCE[torch.float32]


def gpt2_policy(config, dtype=torch.float32):
    """An adapter on GPT-2's attention, whose layers have biases and store their weights as (in, out)."""
    policy = get_peft_model(GPT2LMHeadModel(TINY_GPT2).to(dtype), config).eval()
    perturb_trained(policy, 0.3, seed=1)
    return policy


def biased_policy(**settings):
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, **settings)
    return gpt2_policy(config, torch.bfloat16)


def test_a_fold_leaves_the_bias_alone_where_the_methods_own_merge_would_write_it():
    layer = next(m for m in biased_policy(lora_bias=True).modules() if isinstance(m, BaseTunerLayer))
    bias = layer.get_base_layer().bias
    before, pointer = bias.detach().clone().normal_(), bias.data_ptr()
    bias.data.copy_(before)
    for _ in range(10):
        folded_weight(layer)
    assert torch.equal(bias, before)
    assert bias.data_ptr() == pointer


def test_a_bias_of_the_adapters_own_is_refused_and_the_layers_own_trained_biases_are_sent():
    with pytest.raises(NotImplementedError, match=r"c_attn: lora_bias=True trains.*bias='lora_only'"):
        checkpoint_weights(biased_policy(lora_bias=True))
    with pytest.raises(ValueError, match=r"lora_bias=True trains.*bias='lora_only'"):
        check_settings(None, LoraConfig(lora_bias=True))
    trained = {weight.name for weight in checkpoint_weights(biased_policy(bias="lora_only")) if weight.trained}
    assert trained == {f"transformer.h.0.attn.c_attn.{name}" for name in ("weight", "bias")}


# Methods whose merge moves more than a weight: the bias with it, or the whole layer for another.
@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        RoadConfig(target_modules=["q_proj", "lm_head"], group_size=4),
        LNTuningConfig(target_modules=["q_proj", "post_attention_layernorm", "norm"]),
    ],
    ids=["ia3", "road", "layer norms"],
)
def test_all_that_a_merge_moves_is_served_and_nothing_of_the_base_written(config):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(TINY_QWEN2)
    for parameter in base.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)  # biases, too, which start at 0
    policy = get_peft_model(copy.deepcopy(base), config).eval()
    perturb_trained(policy, 1.0, seed=1)
    before = [(parameter, parameter.data_ptr(), parameter.detach().clone()) for parameter in policy.parameters()]
    plain, ids = copy.deepcopy(base).eval(), torch.randint(5, 90, (2, 12))
    plain.load_state_dict({weight.name: weight.value() for weight in checkpoint_weights(policy)}, strict=False)
    expected = policy(input_ids=ids).logits
    assert relative_error(plain(input_ids=ids).logits, expected) < TOLERANCE[torch.float32]
    assert relative_error(base.eval()(input_ids=ids).logits, expected) > 1e-2
    assert all(p.data_ptr() == pointer and torch.equal(p, value) for p, pointer, value in before)


def test_a_bias_trained_beside_an_adapter_does_not_tell_the_base():
    policy = get_peft_model(Qwen2ForCausalLM(TINY_QWEN2), VeraConfig(target_modules=["q_proj"], r=4, bias="all"))
    told = {weight.name for weight in checkpoint_weights(policy) if weight.holds_the_checkpoints}
    assert "model.layers.0.self_attn.q_proj.weight" in told
    assert not any(name.endswith("bias") for name in told)


def test_a_method_that_peft_cannot_merge_is_refused_by_name(untied_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(untied_checkpoint)
    policy = get_peft_model(model, LilyConfig(target_modules=["q_proj"], r=4))
    with pytest.raises(NotImplementedError, match=r"q_proj\.weight: peft\.tuners\.lily.* cannot be folded:"):
        check_folds(policy)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_one_name_of_a_tied_weight_trained_apart_is_refused_and_both_as_one_are_served(saved, tied_checkpoint):
    def policy(**settings):
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=list(saved), **settings)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(tied_checkpoint), config)

    with pytest.raises(NotImplementedError, match=rf"{saved[0]}.* apart, but tie_word_embeddings.*ensure_weight_tying"):
        checkpoint_weights(policy())
    trained = {weight.name for weight in checkpoint_weights(policy(ensure_weight_tying=True)) if weight.trained}
    assert "model.embed_tokens.weight" in trained
    assert "lm_head.weight" not in trained


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({}, "block_rows"), ({"block_axis": "out"}, "block_columns"), ({"form": "core"}, "dense")],
)
def test_a_transposed_weight_is_described_as_its_checkpoint_stores_it(settings, rule):
    stored = {name: tuple(tensor.shape) for name, tensor in GPT2LMHeadModel(TINY_GPT2).state_dict().items()}
    policy = gpt2_policy(FuraConfig(target_modules=["c_attn", "c_fc"], **settings))
    weights = {weight.name: weight for weight in checkpoint_weights(policy)}
    assert {name: weight.shape for name, weight in weights.items()} == {name: stored[name] for name in weights}
    updates = {name: weight.factors() for name, weight in weights.items() if weight.layer is not None}
    assert {factors.rule for factors in updates.values()} == {rule}
    payload.check(updates, stored)
    for name in updates:
        layer, identity = weights[name].layer, torch.eye(stored[name][0])
        own = layer(identity) - layer.get_base_layer().bias
        assert relative_error(weights[name].value(), own) < TOLERANCE[torch.float32]


def adapted_layers(checkpoint, name, dtype=torch.float32, count=3):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype), copy.deepcopy(FOLDS[name][0]))
    perturb_trained(model, 0.3, seed=1)
    return [module for module in model.eval().modules() if isinstance(module, BaseTunerLayer)][:count]


@pytest.mark.parametrize("name", FOLDS)
def test_fold_equals_the_methods_own_forward_and_leaves_the_base_alone(untied_checkpoint, name):
    for layer in adapted_layers(untied_checkpoint, name):
        own = layer.pristine_weight() if name == "fura core" else layer.get_base_layer().weight
        before = own.detach().clone()
        folded = fold(before, layer)
        x = torch.randn(5, before.shape[1])
        expected = layer(x)
        assert relative_error(x @ folded.T, expected) < TOLERANCE[torch.float32]
        assert relative_error(x @ before.T, expected) > 1e-4, "the adapter must change the layer"
        assert torch.equal(before, own)


# Pairs of `FOLDS` active together, and the rule that folds both.
TWO_ADAPTERS = [
    ("fura", "fura", "block_columns"),
    ("fura rows", "fura rows", "block_rows"),
    ("fura", "fura rows", "dense"),
    ("fura", "svd", "dense"),
    ("lora", "rslora", "low_rank"),
    ("dora", "dora", "dense"),
    ("dora", "lora", "dense"),
    ("lora", "dora", "dense"),
    ("hira", "hira", "dense"),
    ("oft", "oft", "block_columns"),
    ("oft", "oft wide", "block_columns"),
    ("oft shared", "oft shared", "block_columns"),
]


@pytest.mark.parametrize(("first", "second", "rule"), TWO_ADAPTERS)
def test_two_active_adapters_fold_to_what_the_layer_computes_with_both(untied_checkpoint, first, second, rule):
    model = AutoModelForCausalLM.from_pretrained(untied_checkpoint)
    policy = get_peft_model(model, copy.deepcopy(FOLDS[first][0]))
    policy.add_adapter("second", copy.deepcopy(FOLDS[second][0]))
    policy.base_model.set_adapter(["default", "second"])
    perturb_trained(policy, 1.0, seed=1)
    for layer in [module for module in policy.eval().modules() if isinstance(module, BaseTunerLayer)][:3]:
        weight = layer.get_base_layer().weight.detach().clone()
        x = torch.randn(5, weight.shape[1])
        expected = layer(x)
        for folded in (folded_weight(layer), fold(weight, layer)):
            assert relative_error(x @ folded.T, expected) < TOLERANCE[torch.float32]
        factors = small_factors(layer)
        assert (factors.rule if factors else "dense") == rule
        for adapter in ("default", "second"):
            layer.set_adapter(adapter)
            assert relative_error(layer(x), expected) > 1e-3, "both adapters must change the layer"


def test_ofts_small_form_takes_memory_of_the_order_of_its_blocks():
    """A dense rotation of a layer that is much wider than high would be many times the layer."""
    policy = get_peft_model(nn.Sequential(nn.Linear(4096, 8)), OFTConfig(target_modules=["0"], oft_block_size=16))
    layer = next(module for module in policy.modules() if isinstance(module, BaseTunerLayer))
    with torch.profiler.profile(profile_memory=True) as profile:
        factors = small_factors(layer)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert factors.nbytes <= largest < 8 * factors.nbytes < 4096 * 4096 * 4


@pytest.mark.parametrize("name", FOLDS)
def test_every_method_folds_by_the_rule_of_the_table(untied_checkpoint, name):
    layer = adapted_layers(untied_checkpoint, name)[0]
    factors = small_factors(layer)
    assert (factors.rule if factors else "dense") == FOLDS[name][1]
    if factors:
        folded, weight = torch.empty(layer.get_base_layer().weight.shape), layer.get_base_layer().weight.detach()
        whole = (0, weight.shape[0]), (0, weight.shape[1])
        fold_slice(lambda rows, columns: weight[slice(*rows), slice(*columns)], factors, *whole, folded)
        assert relative_error(folded, folded_weight(layer)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["fura", "fura rows", "svd"])
def test_block_updates_that_are_made_together_are_those_made_alone(untied_checkpoint, name):
    kinds = {}
    for layer in adapted_layers(untied_checkpoint, name, count=None):
        kinds.setdefault(core_to_batch(layer).update_kind, []).append(layer)
    assert max(map(len, kinds.values())) > 1
    for layers in kinds.values():
        for layer, together in zip(layers, small_factors_together(layers), strict=True):
            alone = small_factors(layer)
            assert together.rule == alone.rule == FOLDS[name][1]
            assert relative_error(together.tensors["update"], alone.tensors["update"]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["fura qr", "fura core", "lora"])
def test_what_is_no_block_update_of_the_papers_setting_is_made_alone(untied_checkpoint, name):
    assert core_to_batch(adapted_layers(untied_checkpoint, name)[0]) is None


def test_a_layer_with_two_active_adapters_is_folded_alone(untied_checkpoint):
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(untied_checkpoint), copy.deepcopy(FOLDS["fura"][0]))
    policy.add_adapter("second", copy.deepcopy(FOLDS["fura"][0]))
    layer = next(module for module in policy.modules() if isinstance(module, BaseTunerLayer))
    assert core_to_batch(layer) is layer.fura_core["default"]
    policy.base_model.set_adapter(["default", "second"])
    assert core_to_batch(layer) is None


@pytest.mark.parametrize("name", [name for name, (_, rule) in FOLDS.items() if rule != "dense"])
def test_a_slice_of_the_fold_is_the_fold_of_the_slice_wherever_it_is_cut(untied_checkpoint, name):
    """As tensor-parallel shards cut it, blocks straddling the edges."""
    layer = adapted_layers(untied_checkpoint, name)[-1]  # down_proj: 64 x 96
    weight, factors = layer.get_base_layer().weight.detach(), small_factors(layer)
    whole = folded_weight(layer)
    for rows, columns in (((0, 64), (0, 48)), ((0, 64), (48, 96)), ((10, 27), (0, 96)), ((33, 64), (5, 71))):
        out = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
        fold_slice(lambda r, c: weight[slice(*r), slice(*c)], factors, rows, columns, out)
        assert relative_error(out, whole[slice(*rows), slice(*columns)]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", [name for name, (_, rule) in FOLDS.items() if rule != "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_fold_is_the_exact_one_rounded_once(untied_checkpoint, name, dtype):
    layer = adapted_layers(untied_checkpoint, name, dtype)[0]
    weight, factors = layer.get_base_layer().weight.detach(), small_factors(layer)
    out = torch.empty_like(weight)
    whole = (0, weight.shape[0]), (0, weight.shape[1])
    fold_slice(lambda r, c: weight[slice(*r), slice(*c)], factors, *whole, out)
    exact = fold(weight.double(), layer)
    assert relative_error(out, exact) < 1.5 * relative_error(exact.to(dtype), exact)


def test_the_table_of_small_forms_is_covered_by_the_contract():
    layers = {type(form).__name__ for form, _ in FOLDS.values()}
    assert len(SMALL_FORMS) <= len(layers)
    assert {rule for _, rule in FOLDS.values()} | {"stacked_low_rank"} == set(RULES)


@pytest.mark.parametrize("active", [["default"], ["default", "second"]])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # of stacks (experts, out, in) and (experts, in, out)
def test_lora_of_stacked_experts_is_folded_as_it_computes(family, active):
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = CONFIG_MAPPING[family](vocab_size=64, intermediate_size=16, **sizes, **experts)
    plain = AutoModelForCausalLM.from_config(config).eval()
    for parameter in plain.parameters():
        parameter.data.normal_(std=0.5)
    stacks = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    lora = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    policy = get_peft_model(copy.deepcopy(plain), lora).eval()
    policy.add_adapter("second", lora)
    policy.base_model.set_adapter(active)
    perturb_trained(policy, 1.0, seed=0)
    weights = {weight.name: weight for weight in checkpoint_weights(policy) if weight.layer is not None}
    assert list(weights) == stacks
    ids = torch.randint(5, 60, (2, 12))
    expected = policy(input_ids=ids).logits
    assert relative_error(plain(input_ids=ids).logits, expected) > 1e-2, "the adapter must change the policy"
    for name, weight in weights.items():
        base, factors = plain.get_parameter(name).detach(), weight.factors()
        assert factors.rule == "stacked_low_rank"
        whole = fold(base, weight.layer)
        assert torch.equal(weight.parameter, base), "out of place"
        rows, columns = (5, 2 * base.shape[1] + 3), (4, 13)  # from within one expert to within another
        part = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
        fold_slice(weight.read(), factors, rows, columns, part)
        assert relative_error(part, whole.flatten(0, 1)[slice(*rows), slice(*columns)]) < TOLERANCE[torch.float32]
        assert torch.equal(weight.local_value(), whole.flatten(0, 1))
        plain.get_parameter(name).data.copy_(whole)
    assert relative_error(plain(input_ids=ids).logits, expected) < TOLERANCE[torch.float32]


def test_a_vector_is_sent_whole():
    out = torch.empty(4)
    fold_slice(None, Factors("dense", {"weight": torch.arange(8.0)}), (2, 6), (0, 1), out)
    assert out.tolist() == [2, 3, 4, 5]
