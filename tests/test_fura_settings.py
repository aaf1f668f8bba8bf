"""Every setting of FuRA against an oracle that multiplies the paper's three factors out in float64."""

import copy
import itertools

import pytest
import torch
from conftest import TOLERANCE, relative_error
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fura_rl import FuraConfig
from fura_rl.adapters.fura_tuner import fura_layers

IN, OUT, SIZE, HEAD = 24, 20, 4, 2

TREATMENTS = ("train", "freeze", "merge_frozen", "merge_trained", "split")
SETTINGS = [
    {"form": form, "train_core": core, "singular_values": treatment}
    for form, core, treatment in itertools.product(("base", "core"), ("small", "large", "both"), TREATMENTS)
    if not (form == "base" and core != "small")
    and not (core == "both" and treatment in ("merge_frozen", "merge_trained"))
] + [{"basis": "qr", "form": form, "singular_values": "merge_trained"} for form in ("base", "core")]
CASES = [
    settings | {"block_axis": axis, "block_size": size}
    for settings in SETTINGS
    for axis in ("in", "out")
    for size in (SIZE, "full")
]
CASES += [case | {"conv1d": True} for case in CASES if case["singular_values"] in ("train", "merge_trained")]
CASES += [
    settings | {"block_axis": axis, "block_size": SIZE} | more
    for settings in SETTINGS
    if settings["singular_values"] == "train"
    for axis, second in (("in", ("out", 6)), ("out", ("in", 5)))
    for more in (
        {"bias": "all"},
        {"bias": "fura_only"},
        {"block_size": "head"},
        {"block_axis_pattern": {"1": second[0]}, "block_size_pattern": {"1": second[1]}},  # of two layers
    )
]


def name_of(settings):
    return "-".join(str(value) for value in settings.values())


def blocks_of(settings, name, weight):
    """Axis and size of the blocks that the settings ask for on the layer of this name and weight (out, in)."""
    axis = settings.get("block_axis_pattern", {}).get(name, settings["block_axis"])
    size = settings.get("block_size_pattern", {}).get(name, settings["block_size"])
    return axis, {"full": weight.shape[1 if axis == "in" else 0], "head": HEAD}.get(size, size)


class Oracle:
    """y = (L_i S_i R_i) x in float64 from a plain SVD or QR of each block; the factors named by the settings train."""

    def __init__(self, linear_weight, bias, layer_core, settings, name="0"):
        self.bias = bias.detach().double()
        axis, size = blocks_of(settings, name, linear_weight)
        self.row_blocks = axis == "out"
        self.basis = settings.get("basis", "svd")
        oriented = linear_weight.detach().double()
        oriented = oriented.T if self.row_blocks else oriented
        core, treatment = settings.get("train_core", "small"), settings["singular_values"]
        self.triples, self.trained = [], [self.bias] if settings.get("bias", "none") != "none" else []
        for i, block in enumerate(oriented.split(size, dim=1)):
            large, middle, small = self.factors(block, layer_core.basis_v[i], treatment, core)
            if core in ("large", "both"):
                self.trained.append(large)
            if core in ("small", "both"):
                self.trained.append(small)
            if treatment == "train":
                self.trained.append(middle)
            self.triples.append((large, middle, small))
        for tensor in self.trained:
            tensor.requires_grad_()

    def factors(self, block, reference, treatment, core):
        if self.basis == "qr":
            large, small = torch.linalg.qr(block)
            signs = small.diagonal().sign()
            return large * signs, torch.ones(len(small)).double(), signs[:, None] * small
        large, values, small = torch.linalg.svd(block, full_matrices=False)
        signs = (small @ reference.double()).diagonal().sign()  # AdamW's steps depend on the signs an SVD leaves free
        large, small = large * signs, signs[:, None] * small
        ones = torch.ones_like(values)
        if treatment == "split":
            return large * values.sqrt(), ones, values.sqrt()[:, None] * small
        into_large = treatment == ("merge_trained" if core == "large" else "merge_frozen")
        if into_large:
            return large * values, ones, small.contiguous()
        if treatment in ("merge_frozen", "merge_trained"):
            return large, ones, values[:, None] * small
        return large.contiguous(), values, small.contiguous()

    def weight(self):
        oriented = torch.cat([large @ torch.diag(middle) @ small for large, middle, small in self.triples], dim=1)
        return oriented.T if self.row_blocks else oriented

    def gradients(self):
        """Of what trains, by the layer's names and in its layout."""
        larges, middles, smalls = zip(*self.triples, strict=True)
        gradients = {}
        if larges[0].requires_grad:
            stacked = torch.cat([large.grad for large in larges], dim=1)
            gradients["large_core"] = stacked.T if self.row_blocks else stacked
        if middles[0].requires_grad:
            gradients["delta_s"] = torch.stack([middle.grad for middle in middles])
        if smalls[0].requires_grad:
            gradients["delta_r"] = torch.stack([small.grad for small in smalls])
        if self.bias.requires_grad:
            gradients["bias"] = self.bias.grad
        return gradients

    def __call__(self, x):
        return x @ self.weight().T + self.bias


def make(settings, dtype=torch.float32):
    """A base model of one layer, or two where patterns tell them apart; it with an adapter; the adapted first layer."""
    settings = dict(settings)
    conv1d = settings.pop("conv1d", False)
    shapes = [(IN, OUT), (OUT, IN)] if "block_axis_pattern" in settings else [(IN, OUT)]
    base = nn.Sequential(*[Conv1D(b, a) if conv1d else nn.Linear(a, b) for a, b in shapes])
    for layer in base:
        layer.weight.data.normal_(std=0.2)
        layer.bias.data.normal_()
    base.to(dtype).config = {"model_type": "custom", "head_dim": HEAD}
    model = get_peft_model(copy.deepcopy(base), FuraConfig(target_modules=r"\d", **settings))
    return base, model, model.base_model.model[0]


def as_linear(module, weight):
    """`weight` as the module stores it, turned to (out, in); its own inverse."""
    return weight.T if isinstance(module, Conv1D) else weight


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_five_steps_equal_the_float64_oracles(settings, optimizer_class):
    base, model, _ = make(settings)
    layers = fura_layers(model)
    oracles = [
        Oracle(as_linear(plain, plain.weight), plain.bias, layer.fura_core["default"], settings, name)
        for (name, plain), layer in zip(base.named_children(), layers, strict=True)
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(32, IN)
    output = model(x)
    target = torch.randn_like(output)
    assert relative_error(output, chain(oracles, x.double())) < TOLERANCE[torch.float32], "output at the start"
    options = {"lr": 1e-2} | ({"weight_decay": 0.0} if optimizer_class is torch.optim.AdamW else {})
    theirs = [tensor for oracle in oracles for tensor in oracle.trained]
    optimizers = [optimizer_class(trained, **options), optimizer_class(theirs, **options)]
    for step in range(5):
        losses = [((model(x) - target) ** 2).mean(), ((chain(oracles, x.double()) - target.double()) ** 2).mean()]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            check_gradients(layers, oracles, len(trained))
        for optimizer in optimizers:
            optimizer.step()
    # AdamW divides by a square root of tiny second moments, which rounding reaches: ten times the plain tolerance
    tolerance = TOLERANCE[torch.float32] * (10 if optimizer_class is torch.optim.AdamW else 1)
    folded = [(layer.folded_weight(["default"]), layer.get_delta_weight("default")) for layer in layers]
    merged = model.merge_and_unload()
    for plain, oracle, (weight, delta), done in zip(base, oracles, folded, merged, strict=True):
        expected = as_linear(plain, oracle.weight())
        assert relative_error(plain.weight, expected) > 1e-3, "the steps must have moved the weight"
        assert relative_error(weight, expected) < tolerance
        assert relative_error(delta + plain.weight, expected) < tolerance
        assert relative_error(done.weight, expected) < tolerance
        assert relative_error(done.bias, oracle.bias) < tolerance


def chain(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def check_gradients(layers, oracles, count):
    for layer, oracle in zip(layers, oracles, strict=True):
        expected = oracle.gradients()
        ours = {name.rpartition(".")[2]: p.grad for name, p in layer.named_parameters() if p.requires_grad}
        assert ours.keys() == expected.keys()
        for name, gradient in ours.items():
            assert relative_error(gradient, expected[name]) < TOLERANCE[torch.float32], f"gradient of {name}"
        count -= len(ours)
    assert count == 0, "what trains is all compared"


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("size", [SIZE, "full"])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_five_steps_of_the_random_basis_equal_the_float64_oracles(axis, size, optimizer_class):
    """The oracle takes the layer's random L as given, fits C by least squares in float64 and trains it."""
    settings = {"basis": "random", "form": "core", "singular_values": "merge_trained"}
    base, model, layer = make(settings | {"block_axis": axis, "block_size": size})
    stored = layer.base_layer.dense().double()
    core = layer.fura_core["default"]
    n, r, b = core.core().shape
    larges = (stored if axis == "in" else stored.T).split(r, dim=1)
    weight = base[0].weight.detach().double()
    pieces = (weight if axis == "in" else weight.T).split(b, dim=1)
    smalls = [torch.linalg.lstsq(*pair).solution.requires_grad_() for pair in zip(larges, pieces, strict=True)]

    def oracle_weight():
        product = torch.cat([large @ small for large, small in zip(larges, smalls, strict=True)], dim=1)
        return product if axis == "in" else product.T

    assert n * b == (IN if axis == "in" else OUT)
    assert relative_error(layer.folded_weight(["default"]), oracle_weight()) < TOLERANCE[torch.float32]
    trained = [p for p in model.parameters() if p.requires_grad]
    x, target = torch.randn(32, IN), torch.randn(32, OUT)
    options = {"lr": 1e-2} | ({"weight_decay": 0.0} if optimizer_class is torch.optim.AdamW else {})
    optimizers = [optimizer_class(trained, **options), optimizer_class(smalls, **options)]
    for _ in range(5):
        output = x.double() @ oracle_weight().T + base[0].bias.double()
        losses = [((model(x) - target) ** 2).mean(), ((output - target.double()) ** 2).mean()]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tolerance = TOLERANCE[torch.float32] * (10 if optimizer_class is torch.optim.AdamW else 1)
    assert relative_error(layer.folded_weight(["default"]), oracle_weight()) < tolerance
    assert relative_error(model.merge_and_unload()[0].weight, oracle_weight()) < tolerance


@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_merge_unmerge_disable_and_unload(settings):
    base, model, _ = make(settings | {"init_weights": False})
    x = torch.randn(5, IN)
    adapted, plain = model(x), base(x)
    assert relative_error(adapted, plain) > 1e-3
    model.merge_adapter(safe_merge=True)
    assert relative_error(model(x), adapted) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert torch.equal(model(x), adapted)
    exact = settings.get("form") == "base" or settings.get("train_core") in ("large", "both")
    with model.disable_adapter():
        assert torch.equal(model(x), plain) if exact else relative_error(model(x), plain) < TOLERANCE[torch.float32]
    unloaded = model.unload()
    assert type(unloaded[0]) is type(base[0])
    assert relative_error(unloaded(x), plain) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_save_and_load_give_the_same_function(settings, tmp_path):
    from peft import PeftModel

    base, model, _ = make(settings | {"init_weights": False})
    model.save_pretrained(tmp_path)
    x = torch.randn(5, IN)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert relative_error(loaded(x), model(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("form", ["base", "core"])
def test_conv1d_is_a_linear_layer_with_its_weight_transposed(form, axis):
    base, model, layer = make({"form": form, "block_axis": axis, "init_weights": False, "conv1d": True})
    assert layer.fura_core["default"].basis_v.shape[:2].numel() == (IN if axis == "in" else OUT)
    x = torch.randn(2, 5, IN)
    folded = layer.folded_weight(["default"])
    assert folded.shape == base[0].weight.shape
    assert relative_error(model(x), x @ folded + base[0].bias) < TOLERANCE[torch.float32]
    merged = model.merge_and_unload()[0]
    assert type(merged) is Conv1D
    assert relative_error(merged(x), x @ folded + base[0].bias) < TOLERANCE[torch.float32]
