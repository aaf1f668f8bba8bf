"""The table of adapter methods: what each trains, the two that are ours, and what is refused before anything loads."""

import copy

import pytest
import torch
from conftest import TOLERANCE, perturb_trained, relative_error
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.adapters.budget import capacity_values, count_trained, match_budget, nearest
from fura_rl.adapters.methods.lift import PrincipalWeightAdamW, principal_weights, train_only, trained_entries
from fura_rl.adapters.methods.lora_full import LoraFullConfig
from fura_rl.adapters.methods.milora import MiloraConfig
from fura_rl.adapters.registry import METHODS, check_method, find_method, own_settings, peft_config_for
from fura_rl.quickstart import BASE_MODEL
from fura_rl.sync.fold import folded_weight

CONFIG = AutoConfig.from_pretrained(BASE_MODEL)
ASKED_FOR = (
    *("full", "lora", "rslora", "dora", "pissa", "milora", "olora", "randlora", "oft", "hira", "miss", "lora_full"),
    *("svd", "fura", "qfura", "qlora", "qdora", "lift"),
)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 40, bias=False))


def adapted(config_class, **settings):
    return get_peft_model(plain(), config_class(target_modules=["0", "2"], r=4, lora_alpha=6, **settings))


def test_the_table_holds_every_method_and_each_says_what_it_is():
    assert set(METHODS) == set(ASKED_FOR)
    for name, method in METHODS.items():
        assert method.summary, name
        assert method.limits, name
        assert method.paper_learning_rate is None or 1e-6 < method.paper_learning_rate < 1e-2, name


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_counted_without_memory_as_they_are_with_it(name, tied_checkpoint):
    config = AutoConfig.from_pretrained(tied_checkpoint)
    model_args = ModelConfig(lora_r=4)
    counted = count_trained(name, config, model_args)
    method = find_method(name)
    model = AutoModelForCausalLM.from_config(config)
    peft_config = peft_config_for(name, model_args, None, None)
    policy = model if peft_config is None else get_peft_model(model, peft_config)
    if method.optimizer is None:
        assert counted == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    else:
        method.freeze(policy, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
        optimizer_class, settings = PrincipalWeightAdamW, own_settings(name, model_args, None)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = optimizer_class(trained, lr=1e-3, **settings)
        for p in trained:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in trained]
        optimizer.step()
        assert counted == sum(int((p != b).sum()) for p, b in zip(trained, before, strict=True))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.capacity])
def test_a_matched_budget_is_the_nearest_there_is(name):
    budget = count_trained("fura", CONFIG, ModelConfig())
    settings = match_budget(name, budget, CONFIG, ModelConfig())
    [(capacity, chosen)] = settings.items()
    values = capacity_values(capacity, CONFIG, ["q_proj", "down_proj"])
    place = values.index(chosen)
    neighbours = values[max(0, place - 1) : place + 2]
    gaps = {v: abs(count_trained(name, CONFIG, ModelConfig(), None, {capacity: v}) - budget) for v in neighbours}
    assert gaps[chosen] == min(gaps.values())
    assert gaps[chosen] < 0.2 * budget


@pytest.mark.parametrize("grows", [True, False])
def test_nearest_agrees_with_looking_at_every_value(grows):
    values = [1, 2, 3, 5, 8, 13]
    for budget in range(0, 60):

        def count(value):
            return 3 * value if grows else 40 - 3 * value

        found = nearest(values, count, budget, grows)
        assert abs(count(found) - budget) == min(abs(count(value) - budget) for value in values)


@pytest.mark.parametrize("name", METHODS)
def test_all_linear_is_every_linear_layer_but_the_output_head_for_every_method(name):
    """Which the seven projections of the default are in this model."""
    everything = ["all-linear"]  # as the command line gives it
    assert count_trained(name, CONFIG, ModelConfig(), everything) == count_trained(name, CONFIG, ModelConfig())
    assert match_budget(name, 10**4, CONFIG, ModelConfig(), everything) == match_budget(
        name, 10**4, CONFIG, ModelConfig()
    )


def test_methods_without_a_budget_are_left_alone():
    for name in ("full", "svd", "fura", "lora_full"):
        assert match_budget(name, 10, CONFIG, ModelConfig()) == {}


def test_milora_starts_at_the_base_model_along_its_minor_directions():
    base, model = plain(), adapted(MiloraConfig)
    x = torch.randn(5, 48)
    assert relative_error(model(x), base(x)) < TOLERANCE[torch.float32]
    for index in ("0", "2"):
        layer, weight = model.base_model.model.get_submodule(index), base[int(index)].weight
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        minor = (left[:, -4:] * values[-4:]) @ right[-4:]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert layer.scaling["default"] == 1.5
        assert relative_error(1.5 * b @ a, minor) < 1e-4
        assert relative_error(layer.base_layer.weight, weight.double() - minor) < 1e-5
        assert relative_error(a.norm(), b.norm()) < 1e-4, "the spectrum is split evenly"


@pytest.mark.parametrize("config_class", [MiloraConfig, LoraFullConfig])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_our_relatives_of_lora_save_load_merge_and_fold(config_class, low_cpu_mem_usage, tmp_path):
    model = adapted(config_class)
    perturb_trained(model, 0.3, seed=1)
    x = torch.randn(5, 48)
    expected = model(x).detach()
    assert relative_error(plain()(x), expected) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert relative_error(loaded(x), expected) < TOLERANCE[torch.float32]
    for index in ("0", "2"):
        layer = model.base_model.model.get_submodule(index)
        before = layer.base_layer.weight.detach().clone()
        folded, inputs = folded_weight(layer), torch.randn(3, layer.in_features)
        assert relative_error(nn.functional.linear(inputs, folded, layer.base_layer.bias), layer(inputs)) < 1e-5
        assert torch.equal(layer.base_layer.weight, before)
    model.merge_adapter()
    assert relative_error(model(x), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert relative_error(model(x), expected) < TOLERANCE[torch.float32]
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged[0]) is nn.Linear
    assert relative_error(merged(x), expected) < TOLERANCE[torch.float32]


def test_lora_full_trains_the_weight_itself_and_can_be_switched_off():
    base, model = plain(), adapted(LoraFullConfig)
    x = torch.randn(5, 48)
    assert torch.equal(model(x), base(x))
    base(x).square().sum().backward()
    model(x).square().sum().backward()
    for index in ("0", "2"):
        layer = model.base_model.model.get_submodule(index)
        assert torch.allclose(layer.lora_backbone["default"].weight.grad, base[int(index)].weight.grad, atol=1e-5)
        assert not layer.base_layer.weight.requires_grad
    perturb_trained(model, 0.3, seed=1)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_our_relatives_of_lora_refuse_settings_without_meaning():
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa': MiLoRA has one start"):
        MiloraConfig(init_lora_weights="pissa")
    with pytest.raises(ValueError, match="use_dora=True"):
        LoraFullConfig(use_dora=True)
    with pytest.raises(ValueError, match=r"0: r=64 exceeds min\(out, in\)=32"):
        get_peft_model(plain(), MiloraConfig(target_modules=["0"], r=64))


def test_principal_weights_are_the_largest_entries_of_the_low_rank_approximation():
    weight = torch.randn(12, 9, dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    approximation = sum(values[i] * torch.outer(left[:, i], right[i]) for i in range(3))
    ranked = sorted(range(weight.numel()), key=lambda i: -abs(approximation.flatten()[i].item()))
    assert principal_weights(weight, 3, 20).tolist() == sorted(ranked[:20])


def lift(parameters, **settings):
    defaults = {"rank": 2, "filter_rank": 3, "refresh_steps": 1000, "lr": 1e-2, "weight_decay": 0.1}
    return PrincipalWeightAdamW(parameters, **(defaults | settings))


def gradients(shape, steps):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def test_lift_is_adamw_on_the_principal_weights_and_leaves_the_rest():
    parameter = nn.Parameter(torch.randn(16, 10))
    start = parameter.detach().clone()
    chosen = principal_weights(start, 3, 2 * (16 + 10))
    reference = nn.Parameter(start.flatten()[chosen].clone())
    ours, theirs = lift([parameter]), torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.1)
    for gradient in gradients((16, 10), 8):
        parameter.grad, reference.grad = gradient, gradient.flatten()[chosen]
        ours.step()
        theirs.step()
    flat = parameter.detach().flatten()
    assert relative_error(flat[chosen], reference) < 1e-6
    rest = torch.ones(160, dtype=torch.bool)
    rest[chosen] = False
    assert torch.equal(flat[rest], start.flatten()[rest])
    state = ours.state[parameter]
    assert {name: len(state[name]) for name in ("index", "exp_avg", "exp_avg_sq")} == dict.fromkeys(
        ("index", "exp_avg", "exp_avg_sq"), 52
    ), "the state is sparse"


def test_a_refresh_chooses_anew_and_keeps_the_moments_of_what_stays():
    parameter = nn.Parameter(torch.randn(16, 10))
    optimizer = lift([parameter], refresh_steps=3, lr=0.3)
    for gradient in gradients((16, 10), 3):
        parameter.grad = gradient
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}
    expected = principal_weights(parameter.data, 3, 52)
    parameter.grad = torch.zeros(16, 10)
    optimizer.step()
    state = optimizer.state[parameter]
    assert torch.equal(state["index"], expected)
    old = dict(zip(before["index"].tolist(), before["exp_avg"].tolist(), strict=True))
    stayed = [i for i in state["index"].tolist() if i in old]
    assert 0 < len(stayed) < 52, "some stay and some are new"
    for index, moment in zip(state["index"].tolist(), state["exp_avg"].tolist(), strict=True):
        assert moment == pytest.approx(0.9 * old.get(index, 0.0), abs=1e-6)


def test_lift_resumes_from_its_state():
    start = torch.randn(16, 10).bfloat16()
    whole, first = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps = gradients((16, 10), 9)
    reference, optimizer = lift([whole], refresh_steps=4), lift([first], refresh_steps=4)
    for gradient in steps:
        whole.grad = gradient.bfloat16()
        reference.step()
    for gradient in steps[:5]:
        first.grad = gradient.bfloat16()
        optimizer.step()
    second = nn.Parameter(first.detach().clone())
    resumed = lift([second], refresh_steps=4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state[second]["index"].dtype == torch.int64
    assert resumed.state[second]["exp_avg"].dtype == torch.float32
    for gradient in steps[5:]:
        second.grad = gradient.bfloat16()
        resumed.step()
    assert torch.equal(second, whole)


def test_lift_trains_only_the_named_matrices():
    model = AutoModelForCausalLM.from_config(CONFIG)
    train_only(model, ["q_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(CONFIG.num_hidden_layers)}
    with pytest.raises(ValueError, match=r"\['query'\] name no linear layer"):
        train_only(model, ["query"])
    with pytest.raises(ValueError, match="rank=0 to be at least 1"):
        lift([nn.Parameter(torch.zeros(2, 2))], rank=0)
    with pytest.raises(ValueError, match=r"not a parameter of shape \(2,\)"):
        lift([nn.Parameter(torch.zeros(2))])
    assert trained_entries((3, 4), 100) == 12


@pytest.mark.parametrize("name", ["pissa", "milora", "olora"])
def test_a_kl_term_is_refused_where_the_base_was_shifted(name):
    check_method(name, quantized=False, beta=0.0)
    with pytest.raises(ValueError, match=f"beta=0.04 .* adapter='{name}' is not the base model"):
        check_method(name, quantized=False, beta=0.04)


@pytest.mark.parametrize("name", ["full", "lift", "pissa", "milora", "dora", "lora_full", "oft"])
def test_a_quantized_base_is_refused_where_it_cannot_be_trained(name):
    with pytest.raises(ValueError, match=f"adapter='{name}' cannot train over a quantized base; use one of fura, "):
        check_method(name, quantized=True, beta=0.0)


def test_any_other_method_of_peft_by_its_config_class():
    config = peft_config_for("peft:LoHaConfig", ModelConfig(), ["q_proj"], {"r": 3})
    assert type(config).__name__ == "LoHaConfig"
    assert (config.r, config.target_modules) == (3, {"q_proj"})
    with pytest.raises(ValueError, match=r"has no config class 'LoHAConfig'; did you mean 'peft:LoHaConfig'\?"):
        find_method("peft:LoHAConfig")
    with pytest.raises(ValueError, match="LoHaConfig has no setting 'rank'"):
        peft_config_for("peft:LoHaConfig", ModelConfig(), None, {"rank": 3})
    for name in ("peft:PrefixTuningConfig", "peft:AdaLoraConfig"):
        with pytest.raises(ValueError, match="cannot be folded"):
            find_method(name)


def test_settings_of_a_method_that_is_an_optimizer():
    assert own_settings("lift", ModelConfig(lora_r=8), {"filter_rank": 5}) == {
        "rank": 8, "filter_rank": 5, "refresh_steps": 200,
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"adapter 'lift' has no setting 'filterrank' \(did you mean 'filter_rank'\?\)"
    ):
        own_settings("lift", ModelConfig(), {"filterrank": 5})


def test_trls_lora_options_reach_every_relative_of_lora():
    arguments = ModelConfig(lora_r=6, lora_alpha=12, lora_dropout=0.25)
    for name in ("lora", "rslora", "dora", "pissa", "milora", "olora", "qlora", "qdora", "lora_full"):
        config = peft_config_for(name, arguments, None, None)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (6, 12, 0.25), name
    assert peft_config_for("rslora", arguments, None, None).use_rslora
