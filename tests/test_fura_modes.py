"""FuRA in the circumstances PEFT users bring: dtypes, autocast, compile, checkpointing, overrides, combinations."""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from conftest import TOLERANCE, perturb_trained, relative_error
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import save_as_lora
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fura_rl import FuraConfig
from fura_rl.adapters import blocks, conversion, frames
from fura_rl.adapters.fura_tuner import PAPER_TARGETS, fura_layers

FORMS = [{"form": form, "block_axis": axis} for form in ("base", "core") for axis in ("in", "out")]


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12, bias=False)).to(dtype)


def adapted(base, **settings):
    return get_peft_model(
        copy.deepcopy(base), FuraConfig(**{"target_modules": ["0", "2"], "init_weights": False} | settings)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_other_dtypes_compute_what_float32_computes(dtype, settings):
    base = mlp()
    model = adapted(base, **settings)
    other = adapted(base.to(dtype), **settings)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "base_layer" not in k}, strict=False)
    x = torch.randn(9, 24)
    output = other(x.to(dtype))
    assert output.dtype == dtype
    assert relative_error(output, model(x)) < max(TOLERANCE[dtype], 1e-5) * (2 if settings["form"] == "core" else 1)
    output.float().square().sum().backward()
    trained = [p for p in other.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_autocast_starts_at_the_base_models_autocast_output_and_keeps_float32_gradients(settings):
    base = mlp()
    model = adapted(base, init_weights=True, **settings)
    x = torch.randn(9, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, output = base(x), model(x)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(output, expected) if settings["form"] == "base" else relative_error(output, expected) < 2e-2
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_autocast_leaves_float64_alone_as_it_does_in_the_base_model(settings):
    base = mlp(torch.float64)
    model, x = adapted(base, **settings), torch.randn(9, 24, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert base(x).dtype == torch.float64
        output = model(x)
    assert torch.equal(output, model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"block_axis": "out"}, {"singular_values": "freeze"}], ids=str)
@pytest.mark.parametrize("forward_under", [False, True])
def test_a_backward_that_is_called_under_autocast_has_the_same_gradients(dtype, settings, forward_under):
    torch.manual_seed(1)
    layer = adapted(mlp().to(dtype), **settings).base_model.model[0]
    x, gradients = torch.randn(600, 24, dtype=dtype, requires_grad=True), []
    for enabled in (False, True):
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_under):
            y = layer(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y.backward(grad)
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert all(relative_error(b, a) < TOLERANCE[torch.bfloat16] for a, b in zip(*gradients, strict=True))
    if settings == {} and not (forward_under and dtype is torch.float32):  # one step of autograd, alone
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_compiles_in_one_graph(settings):
    model = adapted(mlp(), **settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 24)
    expected = model(x)
    assert relative_error(compiled(x), expected) < TOLERANCE[torch.float32]
    grads = []
    for function in (model, compiled):
        model.zero_grad()
        function(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(relative_error(b, a) < 1e-4 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(tied_checkpoint, settings):
    ids = torch.randint(5, 30, (2, 16))
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
        model = get_peft_model(model, FuraConfig(init_weights=False, **settings)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(relative_error(b, a) < 1e-4 for a, b in zip(*grads, strict=True))


def test_only_the_input_and_small_matrices_are_saved_for_the_backward():
    """x (and on a frozen linear map nothing else): tensors as large as an activation are counted through the hooks."""
    base = nn.Linear(64, 48, bias=False)
    tokens = 512
    for axis, kept in (("in", 64), ("out", 48)):
        model = get_peft_model(nn.Sequential(copy.deepcopy(base)), FuraConfig(target_modules=["0"], block_axis=axis))
        saved = {}

        def note(tensor, saved=saved):
            if tensor.numel() >= tokens * 16:
                saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(torch.randn(tokens, 64, requires_grad=True))
        assert list(saved.values()) == [tokens * kept]


LARGE_CORES = [{"form": "core"} | more for more in ({}, {"train_core": "large"}, {"train_core": "both"})]


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("settings", [{}, *LARGE_CORES, {"form": "core", "quantize_core": "nf4"}], ids=str)
def test_tensors_made_on_the_meta_device_are_filled_by_a_checkpoint(settings, axis):
    model = adapted(mlp(), block_axis=axis, **settings)
    with torch.device("meta"):
        empty = adapted(mlp(), block_axis=axis, **settings)
    assert all(t.device.type == "meta" for t in [*empty.parameters(), *empty.buffers()])
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, empty)]
    assert trained[0] == trained[1]
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(3, 24)
    assert torch.equal(empty(x), model(x))


def test_low_cpu_mem_usage_loads_without_converting_again(tmp_path, monkeypatch):
    base = mlp()
    model = adapted(base)
    model.save_pretrained(tmp_path)

    def refuse(*args):
        raise AssertionError("the saved basis makes a conversion needless")

    monkeypatch.setattr("fura_rl.adapters.frames.svd_frame", refuse)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    x = torch.randn(3, 24)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("settings", [{}, LARGE_CORES[1], {"core_dtype": "float32"}], ids=str)
def test_low_cpu_mem_usage_loads_the_bits_that_are_loaded_without_it(settings, autocast_adapter_dtype, tmp_path):
    base = mlp(torch.bfloat16)
    model = adapted(base, **settings)
    perturb_trained(model, 0.3, seed=0)
    model.save_pretrained(tmp_path)
    tensors = []
    for low_cpu_mem_usage in (False, True):
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": autocast_adapter_dtype}
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
        tensors.append([t for layer in fura_layers(loaded) for t in layer.fura_core["default"].state_dict().values()])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("settings", [*FORMS, *LARGE_CORES, {"save_basis": False}], ids=str)
def test_a_state_of_16_bits_that_is_assigned_is_that_of_16_bits_that_is_copied(settings):
    base, x = mlp(), torch.randn(9, 24)
    model = adapted(base, **settings)
    state = {name: t.bfloat16() if "fura_core" in name else t for name, t in model.state_dict().items()}
    other = adapted(base, **settings)
    other.load_state_dict(state, assign=True)
    output = other(x)
    output.square().sum().backward()
    assert relative_error(output, model(x)) < TOLERANCE[torch.bfloat16]
    assert all(p.grad.isfinite().all() for p in other.parameters() if p.requires_grad)
    cores = [layer.fura_core["default"] for layer in fura_layers(other)]
    assert {buffer.dtype for core in cores for buffer in core.buffers()} == {torch.float32}


@pytest.mark.parametrize(
    "settings", [{"singular_values": "train"}, {"basis": "qr", "singular_values": "merge_trained"}]
)
def test_a_whole_models_state_brings_its_own_large_core(settings):
    model, other = (
        adapted(nn.Sequential(nn.Linear(24, 16)), target_modules=["0"], form="core", **settings) for _ in "ab"
    )
    x = torch.randn(9, 24)
    assert relative_error(other(x), model(x)) > 0.1
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_core_form_whose_saved_basis_differs_takes_the_saved_one(tmp_path, quantize):
    """Another machine's SVD may flip signs: here every second singular pair is flipped before the adapter is saved."""
    base = mlp()
    settings = {"form": "core", "quantize_core": quantize}
    model = adapted(base, **settings)
    for layer in fura_layers(model):
        core = layer.fura_core["default"]
        flips = torch.ones(core.basis_v.shape[-1])
        flips[::2] = -1
        core.basis_v *= flips
        core.delta_r.data *= flips[:, None]
        layer.base_layer.replace(layer.base_layer.dense() * flips.repeat(core.basis_v.shape[0]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 24)
    # NF4's codes are not symmetric, so a flipped column is rounded a little otherwise
    assert relative_error(loaded(x), model(x)) < (TOLERANCE[torch.float32] if quantize is None else 0.1)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("settings", [*LARGE_CORES, {"form": "core", "quantize_core": "nf4"}], ids=str)
def test_a_core_form_that_was_cast_leaves_linear_layers_of_the_models_dtype(settings, merged):
    model = adapted(mlp(), **settings).to(torch.bfloat16)
    x = torch.randn(9, 24, dtype=torch.bfloat16)
    with model.disable_adapter() if not merged else nullcontext():
        expected = model(x)
    plain = model.merge_and_unload() if merged else model.unload()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert relative_error(plain(x), expected) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("train_core", ["large", "both"])
def test_a_large_core_that_trains_does_not_start_rounded_to_the_base_models_16_bits(train_core, axis):
    base = mlp(torch.bfloat16)
    settings = {"form": "core", "train_core": train_core, "block_axis": axis, "init_weights": True}
    for layer, plain in zip(fura_layers(adapted(base, **settings)), (base[0], base[2]), strict=True):
        assert relative_error(layer.folded_weight(["default"]), plain.weight) < TOLERANCE[torch.float32]
    config = FuraConfig(target_modules=["0"], **settings)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_overrides_choose_blocks_per_module_and_keys_that_match_nothing_are_named():
    with pytest.warns(UserWarning, match=r"block_size_pattern has keys that match no adapted module: \['nope'\]"):
        model = adapted(mlp(), block_axis="out", block_size_pattern={"0": 8, "nope": 2}, block_axis_pattern={"2": "in"})
    cores = [layer.fura_core["default"] for layer in fura_layers(model)]
    assert [(core.axis, core.block_size) for core in cores] == [("out", 8), ("in", 4)]


def test_head_blocks_follow_the_models_head_dimension_where_it_divides(tied_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint, intermediate_size=80, ignore_mismatched_sizes=True)
    head_dim = model.config.head_dim
    with pytest.warns(UserWarning, match=r"block_size='head' does not divide 2 layers, e.g. model.layers.0.mlp"):
        model = get_peft_model(model, FuraConfig(block_size="head", target_modules=["o_proj", "down_proj"]))
    sizes = {layer.layer_name.rpartition(".")[2]: layer.fura_core["default"].block_size for layer in fura_layers(model)}
    assert sizes["o_proj"] == head_dim
    assert sizes["down_proj"] != head_dim


def test_head_blocks_need_a_head_dimension():
    with pytest.raises(ValueError, match="config gives no head dimension for 0"):
        adapted(mlp(), block_size="head")


@pytest.mark.parametrize("bias", ["none", "all", "fura_only"])
def test_biases_train_and_travel_with_the_adapter(bias, tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(copy.deepcopy(base), FuraConfig(target_modules=["0"], bias=bias))
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert trained == {"none": set(), "all": {"0", "1"}, "fura_only": {"0"}}[bias]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    assert torch.allclose(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x), atol=1e-6)


def test_layers_to_transform_and_modules_to_save(tied_checkpoint):
    config = FuraConfig(target_modules=["q_proj"], layers_to_transform=[1], modules_to_save=["norm"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_checkpoint), config)
    assert [layer.layer_name for layer in fura_layers(model)] == ["model.layers.1.self_attn.q_proj"]
    assert any("modules_to_save" in name and p.requires_grad for name, p in model.named_parameters())


def test_tied_embeddings_stay_tied(tied_checkpoint):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_checkpoint), FuraConfig(init_weights=False))
    merged = model.merge_and_unload()
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("axes", [("in", "in"), ("out", "out"), ("in", "out")])
def test_active_adapters_of_different_axes_and_sizes_add_up(axes):
    base = mlp()
    model = adapted(base, block_axis=axes[0])
    model.add_adapter("other", FuraConfig(target_modules=["0"], block_axis=axes[1], block_size=2, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model[0]
    x = torch.randn(3, 24)
    weight = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert relative_error(layer(x), nn.functional.linear(x, weight, layer.bias)) < 1e-5
    assert relative_error(layer.folded_weight(["default", "other"]), weight) < 1e-6


@pytest.mark.parametrize("treatment", ["train", "freeze", "merge_frozen", "merge_trained", "split"])
def test_a_weighted_adapter_is_the_exact_combination(treatment):
    model = adapted(mlp(), singular_values=treatment)
    model.add_adapter("other", FuraConfig(target_modules=["0", "2"], singular_values=treatment, init_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.7, -0.2], "mix")
    for layer in fura_layers(model):
        expected = 0.7 * layer.get_delta_weight("default") - 0.2 * layer.get_delta_weight("other")
        assert relative_error(layer.get_delta_weight("mix"), expected) < 1e-5


def test_a_weighted_adapter_of_different_blocks_is_refused():
    model = adapted(mlp())
    model.add_adapter("other", FuraConfig(target_modules=["0", "2"], block_size=2))
    with pytest.raises(ValueError, match=r"0: adapters .* have different blocks"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mix")
    with pytest.raises(ValueError, match="there is no adapter"):
        model.add_weighted_adapter(["default", "absent"], [0.5, 0.5], "mix")


def test_a_weighted_adapter_unites_the_layers_of_its_parts_each_with_its_own_blocks():
    model = adapted(mlp(), target_modules=["0"], block_axis="out")
    model.add_adapter("other", FuraConfig(target_modules=["2"], block_size=2, init_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.7, -0.2], "mix")
    first, second = fura_layers(model)
    assert relative_error(first.get_delta_weight("mix"), 0.7 * first.get_delta_weight("default")) < 1e-5
    assert relative_error(second.get_delta_weight("mix"), -0.2 * second.get_delta_weight("other")) < 1e-5
    assert model.peft_config["default"].target_modules == {"0"}
    assert all("mix" in layer.fura_core for layer in (first, second))


class Nested(nn.Module):
    """Two layers of one name, one inside another module."""

    def __init__(self):
        super().__init__()
        self.proj, self.inner = nn.Linear(24, 24), nn.ModuleDict({"proj": nn.Linear(24, 24)})

    def forward(self, x):
        return self.inner["proj"](torch.tanh(self.proj(x)))


def test_a_weighted_adapter_has_the_blocks_of_each_layer_whatever_its_name_and_the_firsts_patterns_match():
    model = adapted(
        Nested(), target_modules=r"proj", block_size_pattern={".*proj": 8}, block_axis_pattern={".*": "out"}
    )
    model.add_adapter("other", FuraConfig(target_modules=r"inner\.proj", block_size=3, init_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.7, -0.2], "mix")
    outer, inner = fura_layers(model)
    assert relative_error(outer.get_delta_weight("mix"), 0.7 * outer.get_delta_weight("default")) < 1e-5
    assert relative_error(inner.get_delta_weight("mix"), -0.2 * inner.get_delta_weight("other")) < 1e-5
    model.add_weighted_adapter(["default"], [2.0], "twice")
    assert "twice" not in inner.fura_core


def test_a_weighted_adapter_of_an_adapter_that_trains_biases_leaves_them_the_models():
    model = adapted(mlp(), target_modules=["0"], bias="all")
    model.add_weighted_adapter(["default"], [0.5], "fraction")
    [layer] = fura_layers(model)
    assert relative_error(layer.get_delta_weight("fraction"), 0.5 * layer.get_delta_weight("default")) < 1e-5
    assert model.peft_config["fraction"].bias == "none"


def test_a_weighted_adapter_of_whole_modules_is_refused_and_leaves_nothing_behind():
    model = adapted(mlp(), target_modules=["0"], modules_to_save=["2"])
    with pytest.raises(ValueError, match=r"adapters \['default'\] train whole modules too \(modules_to_save\)"):
        model.add_weighted_adapter(["default"], [0.5], "fraction")
    assert list(model.peft_config) == ["default"]


def test_a_weighted_adapter_on_a_16_bit_base_is_stored_as_its_parts_are():
    model = adapted(mlp(torch.bfloat16), target_modules=["0"])
    model.add_weighted_adapter(["default"], [0.7], "mix")
    core = fura_layers(model)[0].fura_core
    assert core["mix"].delta_r.dtype == core["default"].delta_r.dtype == torch.float32
    assert relative_error(core["mix"].update(), 0.7 * core["default"].update()) < 1e-5


def test_a_batch_of_mixed_adapters_is_refused():
    model = adapted(mlp()).eval()
    with pytest.raises(ValueError, match=r"adapter_names=\['default', '__base__'\]: FuRA has no batches of mixed"):
        model(torch.randn(2, 24), adapter_names=["default", "__base__"])


def test_a_weighted_adapter_of_a_taken_name_is_refused_and_leaves_its_owner_alone():
    model = adapted(mlp(), target_modules=["0"])
    model.add_adapter("other", FuraConfig(target_modules=["2"]))
    before = model.peft_config["other"]
    with pytest.raises(ValueError, match="there is an adapter 'other' already; delete it first"):
        model.add_weighted_adapter(["default"], [0.5], "other")
    assert model.peft_config["other"] is before


@pytest.mark.parametrize("settings", [*FORMS, *LARGE_CORES[1:]], ids=str)
def test_a_converted_lora_of_full_rank_is_the_same_update(settings, tmp_path):
    base = mlp()
    model = adapted(base, target_modules=["0"], **settings)
    save_as_lora(tmp_path, model, rank=16)
    x = torch.randn(3, 24)
    assert relative_error(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x)) < 1e-5


def test_a_core_form_of_a_conv1d_is_not_converted_to_lora(tmp_path):
    model = adapted(nn.Sequential(Conv1D(24, 24)), target_modules=["0"], form="core")
    with (
        pytest.warns(UserWarning, match=r"0: PEFT cannot convert the core form of a Conv1D to LoRA.*form='base'"),
        pytest.raises(TypeError, match="do not support LoRA conversion"),
    ):
        save_as_lora(tmp_path, model, rank=24)


def test_an_adapter_of_a_random_basis_is_not_converted_to_lora(tmp_path):
    model = adapted(mlp(), basis="random", form="core", singular_values="merge_trained")
    with (
        pytest.warns(UserWarning, match=r"0: basis='random' trains from a projection.*merge_and_unload\(\) it"),
        pytest.raises(TypeError, match="do not support LoRA conversion"),
    ):
        save_as_lora(tmp_path, model, rank=12)


def test_linear_layers_that_share_a_weight_are_merged_each_for_itself_and_unmerged_to_the_bit():
    base = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    base[2].weight = base[0].weight
    model = adapted(base)
    x, weight = torch.randn(3, 24), base[0].weight.clone()
    expected = model(x)
    model.merge_adapter()
    assert relative_error(model(x), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    first, second = (layer.get_base_layer().weight for layer in fura_layers(model))
    assert first is second
    assert torch.equal(first, weight)


def test_a_weight_that_is_computed_from_others_is_not_merged_in_vain():
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(24, 24)))
    model = adapted(base, target_modules="0")
    x = torch.randn(3, 24)
    layer = fura_layers(model)[0]
    assert relative_error(model(x), nn.functional.linear(x, layer.folded_weight(["default"]), layer.bias)) < 1e-5
    with pytest.raises(TypeError, match=r"the weight of 0 is computed from others.*remove_parametrizations"):
        model.merge_adapter()


def test_a_base_model_whose_weights_are_offloaded_is_refused_by_name():
    offloaded = cpu_offload(mlp(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"0 is offloaded, so its weight is not there.*before it is offloaded"):
        get_peft_model(offloaded, FuraConfig(target_modules=["0", "2"]))


def test_a_basis_that_no_state_can_fill_is_named():
    with torch.device("meta"):
        empty = adapted(mlp(), save_basis=False)
    with pytest.raises(RuntimeError, match=r"0\.fura_core\.default: save_basis=False computes the basis from the base"):
        empty.load_state_dict(adapted(mlp(), save_basis=False).state_dict(), assign=True)


def test_an_adapter_that_is_added_later_says_what_it_leaves():
    model = adapted(mlp(), target_modules=["0"])
    model.base_model.model[2].weight.data[:, 0] = 0
    with (
        pytest.warns(UserWarning, match="1 block directions have no pretrained column"),
        pytest.warns(UserWarning, match=r"block_size_pattern has keys that match no adapted module: \['nope'\]"),
    ):
        model.add_adapter("other", FuraConfig(target_modules=["2"], block_size_pattern={"nope": 2}))


def test_an_adapter_called_like_one_of_its_tensors_is_refused():
    model = adapted(mlp())
    with pytest.raises(ValueError, match="an adapter called 'delta_r' would be mixed up with FuRA's tensors"):
        model.add_adapter("delta_r", FuraConfig(target_modules=["0"]))


def test_hotswap_is_refused_clearly(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model = adapted(mlp())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?i)hotswap.*FURA"):
        hotswap_adapter(model, tmp_path, adapter_name="default")


def test_the_core_form_does_not_share_its_layer():
    model = adapted(mlp(), form="core")
    with pytest.raises(ValueError, match="an adapter in core form owns its layer"):
        model.add_adapter("other", FuraConfig(target_modules=["0"]))


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("settings", [*LARGE_CORES, {"form": "core", "quantize_core": "nf4"}], ids=str)
def test_a_deleted_core_form_leaves_the_base_model_and_room_for_another_adapter(settings, axis):
    model = adapted(mlp(), block_axis=axis, **settings)
    x = torch.randn(3, 24)
    with model.disable_adapter():
        plain = model(x)
    model.delete_adapter("default")
    assert relative_error(model.base_model(x), plain) < TOLERANCE[torch.float32]
    model.add_adapter("next", FuraConfig(target_modules=["0"]))
    model.set_adapter("next")
    assert relative_error(model(x), plain) < TOLERANCE[torch.float32]
    model.merge_adapter()
    model.unmerge_adapter()
    assert relative_error(model(x), plain) < TOLERANCE[torch.float32]


def test_a_merged_core_form_is_no_tensor_of_the_model_or_of_its_file():
    model = adapted(mlp(), form="core")
    names, saved = set(model.state_dict()), set(get_peft_model_state_dict(model))
    model.merge_adapter()
    assert set(model.state_dict()) == names
    assert set(get_peft_model_state_dict(model)) == saved


def test_layers_that_fura_cannot_take_are_refused_by_name():
    from peft import LoraConfig

    with_lora = get_peft_model(mlp(), LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"0 carries another adapter already.*unload\(\) that one first"):
        get_peft_model(with_lora.base_model.model, FuraConfig(target_modules=["0"]))
    with_fura = adapted(mlp())
    with pytest.raises(ValueError, match="already carries an adapter called 'default'"):
        get_peft_model(with_fura.base_model.model, FuraConfig(target_modules=["0"]))
    integers = mlp()
    integers[0].weight = nn.Parameter(torch.ones(16, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"0 has torch.int8 weights"):
        adapted(integers)
    with pytest.raises(TypeError, match=r"0 has torch.float8_e4m3fn weights; .* load the model in bfloat16"):
        adapted(mlp(torch.float8_e4m3fn))


def test_the_random_basis_warns_of_what_it_loses():
    with pytest.warns(UserWarning, match="0: basis='random' keeps the base weight up to a relative error of 0"):
        adapted(mlp(), basis="random", form="core", singular_values="merge_trained")


def test_core_dtype_is_kept():
    for core_dtype in ("float32", "bfloat16"):
        model = adapted(mlp(torch.bfloat16), core_dtype=core_dtype)
        dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
        assert dtypes == {core_dtype}


def test_fused_experts_stay_frozen_with_a_warning_and_the_rest_is_adapted():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"4 fused expert parameters, e.g. .*experts.*leaves them frozen"):
        model = get_peft_model(Qwen3MoeForCausalLM(config), FuraConfig(target_modules=PAPER_TARGETS))
    assert {layer.layer_name.rpartition(".")[2] for layer in fura_layers(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    assert not any(p.requires_grad for name, p in model.named_parameters() if "experts" in name)


def test_a_long_conversion_shows_its_progress(monkeypatch, capsys):
    monkeypatch.setattr("fura_rl.adapters.fura_tuner.QUIET_SECONDS", 0.0)
    adapted(mlp())
    assert "Converting to FuRA: 100%" in capsys.readouterr().err


def test_the_update_follows_a_basis_that_is_written_to_or_replaced():
    core = fura_layers(adapted(mlp()))[0].fura_core["default"]
    for change in (lambda: core.basis_s.mul_(2), lambda: setattr(core, "basis_s", 3 * core.basis_s), core.double):
        before = core.update().detach()
        change()
        expected = blocks.block_update(core.change(), core.basis_v, core.scale())
        assert torch.allclose(core.update(), expected, atol=1e-5)
        assert change == core.double or not torch.allclose(core.update(), before, atol=1e-5)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_a_model_made_in_inference_mode_computes_what_another_computes(settings):
    base, x = mlp(), torch.randn(9, 24)
    with torch.inference_mode():
        torch.manual_seed(1)
        model = adapted(base, **settings)
        inside = model(x)
    torch.manual_seed(1)
    expected = adapted(base, **settings)(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert torch.equal(inside, expected)


def test_training_may_follow_an_evaluation_in_inference_mode():
    model = adapted(mlp())
    with torch.inference_mode():
        model(torch.randn(9, 24))
    model(torch.randn(9, 24)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_layer_is_decomposed_where_it_lies_where_the_gpu_has_no_room(monkeypatch):
    """The meta device stands in for a full GPU."""
    base = mlp()
    expected = adapted(base, init_weights=True).state_dict()
    decompose = frames.svd_frame

    def full(weight, size):
        if weight.device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decompose(weight, size)

    monkeypatch.setattr(frames, "svd_frame", full)
    monkeypatch.setattr(conversion, "conversion_device", lambda home: torch.device("meta"))
    with pytest.warns(UserWarning, match=r"meta has no room .* shape \(16, 24\) .* decomposed on cpu instead"):
        model = adapted(base, init_weights=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
