"""FuRA over 4-bit and 8-bit weights, with bitsandbytes' own CPU kernels."""

import copy

import pytest
import torch
from conftest import TOLERANCE, perturb_trained, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fura_rl import FuraConfig
from fura_rl.adapters.fura_tuner import fura_layers
from fura_rl.adapters.large_core import LargeCore
from fura_rl.adapters.quantized import dequantized_weight, keep_layout
from fura_rl.sync.fold import folded_weight

bnb = pytest.importorskip("bitsandbytes")
BACKENDS = ["4bit", "8bit"]


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64, bias=False))


def quantized(kind, dtype=torch.float32):
    """`plain()` as transformers' loading leaves it: linear layers of bitsandbytes around the same weights."""
    model = plain().to(dtype)
    for index in (0, 2):
        layer = model[index]
        has_bias = layer.bias is not None
        if kind == "4bit":
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=has_bias, quant_type="nf4", compute_dtype=dtype
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=has_bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        if has_bias:
            new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        model[index] = new.to("cpu")
    return model


def adapted(base, **settings):
    config = FuraConfig(**{"target_modules": ["0", "2"], "init_weights": False} | settings)
    return get_peft_model(base, config)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_base_form_over_a_quantized_layer_starts_at_its_output_and_trains(kind, axis):
    base = quantized(kind)
    x = torch.randn(7, 128)
    expected = base(x)
    model = adapted(base, block_axis=axis, init_weights=True)
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained if p.shape[-1] != p.shape[0])


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_the_folded_weight_of_a_quantized_layer_is_16_bit_and_exact(kind, axis):
    """W (I + D) of the dequantized W: what a rollout engine gets, with no second quantization."""
    model = adapted(quantized(kind), block_axis=axis)
    layer = fura_layers(model)[0]
    folded = layer.folded_weight(["default"])
    weight = layer.pristine_weight()
    assert relative_error(folded, weight + layer.get_delta_weight("default")) < TOLERANCE[torch.float32]
    x = torch.randn(7, 128)
    expected = nn.functional.linear(x, folded, layer.bias)
    # bitsandbytes' 8-bit product rounds the activations too
    assert relative_error(layer(x), expected) < (1e-4 if kind == "4bit" else 2e-2)


def dora(kind, adapters=("default",)):
    base = quantized(kind)
    setattr(base, f"is_loaded_in_{kind}", True)  # as transformers' loading leaves it: PEFT then takes its own layers
    config = LoraConfig(target_modules=["0", "2"], r=4, lora_alpha=6, use_dora=True)
    model = get_peft_model(base, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    for module in model.modules():
        keep_layout(module)
    perturb_trained(model, 0.3, seed=1)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", BACKENDS)
def test_dora_over_a_quantized_layer_folds_to_what_its_forward_computes(kind, training):
    """diag(m / |W + s B A|) (W + s B A) of the dequantized W, with no second quantization."""
    model = dora(kind).train(training)
    x = torch.randn(7, 128)
    for index in ("0", "2"):
        layer = model.base_model.model.get_submodule(index)
        assert type(layer).__name__ == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind]
        packed = layer.get_base_layer().weight.detach().clone()
        folded = folded_weight(layer)
        assert folded.dtype == torch.float32
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        directed = dequantized_weight(layer.get_base_layer()).double() + 1.5 * b @ a
        magnitude = layer.lora_magnitude_vector["default"].weight.double()
        assert relative_error(folded, magnitude[:, None] * directed / directed.norm(dim=1, keepdim=True)) < 1e-5
        assert relative_error(folded, directed) > 1e-2, "the magnitude must matter"
        inputs = x[:, : layer.in_features]
        expected = layer(inputs)
        served = nn.functional.linear(inputs, folded, layer.bias)
        # bitsandbytes' 8-bit product rounds the activations too
        assert relative_error(served, expected) < (TOLERANCE[torch.float32] if kind == "4bit" else 2e-2)
        assert torch.equal(layer.get_base_layer().weight, packed)


def test_two_doras_over_a_quantized_layer_are_refused():
    layer = dora("4bit", ("default", "other")).base_model.model[0]
    with pytest.raises(NotImplementedError, match="not a plain addition"):
        folded_weight(layer)


@pytest.mark.parametrize("kind", BACKENDS)
def test_merging_into_a_quantized_layer_is_undone_to_the_bit(kind):
    model = adapted(quantized(kind))
    x = torch.randn(7, 128)
    with torch.no_grad():
        adapted_output = model(x)
        with model.disable_adapter():
            before = model(x)
        model.merge_adapter()
        merged = model(x)
        assert relative_error(merged, adapted_output) < 0.2, "requantized: equal up to the quantization's own error"
        model.unmerge_adapter()
        assert torch.equal(model(x), adapted_output)
        with model.disable_adapter():
            assert torch.equal(model(x), before)


def test_running_in_eval_mode_leaves_a_4_bit_weight_as_it_was():
    """On a CPU with AVX512-BF16 bitsandbytes would repack it, and the fold would read noise."""
    model = adapted(quantized("4bit")).eval()
    layer = fura_layers(model)[0]
    before = layer.folded_weight(["default"])
    with torch.no_grad():
        model(torch.randn(3, 128))
    assert torch.equal(layer.folded_weight(["default"]), before)


def test_a_4_bit_weight_that_was_repacked_already_is_brought_back():
    base = quantized("4bit")
    before = base[0].weight.detach().clone()
    dense = bnb.functional.dequantize_4bit(base[0].weight.data, base[0].weight.quant_state)
    layer = base[0]
    packed = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed
    with pytest.warns(UserWarning, match="4-bit weight was repacked"):
        model = adapted(base)
    assert torch.equal(base[0].base_layer.weight, before)
    assert relative_error(fura_layers(model)[0].pristine_weight(), dense) < 0.02


def nf4(weight):
    """NF4 there and back, as bitsandbytes does it."""
    packed, state = bnb.functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return bnb.functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("treatment", ["train", "freeze", "merge_frozen", "merge_trained", "split"])
def test_qfura_is_the_papers_formula_with_a_quantized_large_core(treatment, axis):
    base = plain()
    model = adapted(
        copy.deepcopy(base),
        form="core",
        quantize_core="nf4",
        singular_values=treatment,
        block_axis=axis,
        block_size=16,
        target_modules=["0"],
    )
    layer = model.base_model.model[0]
    core = layer.fura_core["default"]
    weight = base[0].weight.double()
    pieces = []
    for i, block in enumerate((weight if axis == "in" else weight.T).split(16, dim=1)):
        left, values, right = torch.linalg.svd(block, full_matrices=False)
        signs = (right @ core.basis_v[i].double()).diagonal().sign()
        inside = {"merge_frozen": values, "split": values.sqrt()}.get(treatment, torch.ones_like(values))
        pieces.append(left * signs * inside)
    large = torch.cat(pieces, dim=1).float()
    stored = nf4(large if axis == "in" else large.T.contiguous())
    assert relative_error(layer.base_layer.dense(), stored) < 1e-2
    assert relative_error(layer.base_layer.dense(), large if axis == "in" else large.T) > 1e-2, "4 bits are rounded"
    x = torch.randn(7, 128)
    expected = nn.functional.linear(x, layer.folded_weight(["default"]), layer.bias)
    assert relative_error(layer(x), expected) < 1e-4
    layer(x).square().sum().backward()
    assert layer.base_layer.weight.dtype == torch.uint8
    assert layer.base_layer.weight.numel() <= base[0].weight.numel() / 2 + 64


def test_qfura_saves_loads_merges_and_unloads(tmp_path):
    base = plain()
    model = adapted(copy.deepcopy(base), form="core", quantize_core="nf4")
    model.save_pretrained(tmp_path)
    x = torch.randn(7, 128)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert relative_error(loaded(x), model(x)) < 1e-5
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    assert relative_error(merged(x), expected) < 1e-4


def qfura(base, **settings):
    return adapted(copy.deepcopy(base), form="core", quantize_core="nf4", **settings)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("cast_before", [True, False])
def test_qfura_of_a_float64_model_computes_in_float64_from_its_4_bits(cast_before, axis):
    base = plain()
    model = qfura(base.double(), block_axis=axis) if cast_before else qfura(base, block_axis=axis).double()
    layer = fura_layers(model)[0]
    x = torch.randn(7, 128, dtype=torch.float64, requires_grad=True)
    y, folded = layer(x), layer.folded_weight(["default"])
    y.square().sum().backward()
    assert folded.dtype == torch.float64
    assert relative_error(y, nn.functional.linear(x, folded, layer.bias)) < TOLERANCE[torch.float64]
    assert relative_error(x.grad, 2 * y @ folded) < TOLERANCE[torch.float64]
    assert relative_error(layer.pristine_weight(), plain()[0].weight) < 0.15, "the error of 4 bits"


@pytest.mark.parametrize("kind", ["dense", *BACKENDS])
@pytest.mark.parametrize("train_core", ["large", "both"])
def test_what_is_trained_has_one_dtype_also_where_peft_is_told_not_to_cast_it(train_core, kind):
    base = plain().to(torch.bfloat16) if kind == "dense" else quantized(kind, torch.bfloat16)
    config = FuraConfig(target_modules=["0", "2"], form="core", train_core=train_core)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    expected = torch.float32 if kind == "8bit" else torch.bfloat16  # bitsandbytes dequantizes 8 bits to float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


@pytest.mark.parametrize("axis", ["in", "out"])
def test_qfura_on_the_meta_device_is_filled_by_the_whole_models_state(axis, tmp_path):
    model = qfura(plain(), block_axis=axis)
    with torch.device("meta"):
        empty = qfura(plain(), block_axis=axis)
    shapes = [{name: (p.shape, p.dtype) for name, p in m.named_parameters()} for m in (model, empty)]
    assert shapes[0] == shapes[1]
    empty.load_state_dict(model.state_dict(), assign=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain().to("meta"), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    loaded.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(7, 128)
    for filled in (empty, loaded):
        assert torch.equal(filled(x), model(x))
        filled(x).square().sum().backward()
    assert relative_error(empty.merge_and_unload()(x), model(x)) < 1e-4


def test_qfura_takes_the_scales_that_its_codes_were_saved_with():
    model, other = qfura(plain()), qfura(nn.Sequential(*(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64, bias=False))))
    x = torch.randn(7, 128)
    assert relative_error(other(x), model(x)) > 0.1
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_qfura_says_what_a_state_dict_lacks():
    def on_meta():
        with torch.device("meta"):
            return qfura(plain())

    state = qfura(plain()).state_dict()
    no_scales = {name: tensor for name, tensor in state.items() if ".base_layer.weight." not in name}
    dense = adapted(plain(), form="core").state_dict()
    needed = r"0\.base_layer\.weight: quantize_core='nf4' needs 4-bit codes with values and their scales"
    for lacking in (no_scales, dense, on_meta().state_dict()):
        with pytest.raises(RuntimeError, match=needed) as error:
            on_meta().load_state_dict(lacking, assign=True)
        assert "size mismatch" not in str(error.value)
    saved = LargeCore(torch.randn(64, 128), None, "nf4").state_dict()
    with pytest.raises(RuntimeError, match=r"large core has shape \(64, 128\), the one here \(128, 64\)"):
        LargeCore(torch.randn(128, 64), None, "nf4").load_state_dict(saved)


def test_bits_per_weight_of_nf4():
    """4 bits, one 8-bit scale for 64 weights, one 32-bit scale for 256 of those: 4 + 8/64 + 32/(64*256) = 4.127."""
    weight = torch.randn(1024, 1024)
    model = adapted(
        nn.Sequential(nn.Linear(1024, 1024, bias=False)), target_modules=["0"], form="core", quantize_core="nf4"
    )
    state = model.base_model.model[0].base_layer.weight.quant_state
    assert state.nested
    stored = model.base_model.model[0].base_layer.weight
    bits = 8 * (stored.numel() + state.absmax.numel() * state.absmax.element_size() + 4 * state.state2.absmax.numel())
    assert bits / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
