"""The CPU path of a dense base layer against float64, and which layers are left to the plain composition."""

import copy

import pytest
import torch
from conftest import TOLERANCE, relative_error
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fura_rl import FuraConfig
from fura_rl.adapters import blocks, moved_linear
from fura_rl.adapters.fura_tuner import fura_layers

N, SIZE, OUT = 3, 4, 5


def composed(x, update, layer):
    """W (x + D x) + bias in float64, D written out as one block-diagonal matrix."""
    x = x.double()
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x + x @ torch.block_diag(*update.double()).T, layer.weight.double(), bias)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [(1,), (2, 2), (7,), (2, 9), ()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_are_those_of_float64(dtype, tokens, has_bias, large, monkeypatch):
    """Fewer tokens than outputs and more, small tensors and large ones in parts of two rows, in 16 bits and wider."""
    if large:
        monkeypatch.setattr(moved_linear, "LARGE_BYTES", 1)
    monkeypatch.setattr(moved_linear, "PART_BYTES", 2 * N * SIZE * dtype.itemsize)
    monkeypatch.setattr(blocks, "TOKENS_IN_CACHE", 2)
    monkeypatch.setattr(blocks, "tokens_in_a_sum", lambda blocks: 3)
    layer = nn.Linear(N * SIZE, OUT, bias=has_bias, dtype=dtype).requires_grad_(False)
    results = []
    for function in (moved_linear.moved_linear, composed):
        torch.manual_seed(1)
        x = torch.randn(*tokens, N * SIZE).to(dtype).requires_grad_()
        update = torch.randn(N, SIZE, SIZE).mul(0.3).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        assert moved_linear.takes(layer, x)
        y = function(x, update, layer)
        y.backward(torch.randn(*tokens, OUT).to(dtype).to(y.dtype))
        results.append((y, x.grad, update.grad))
    assert results[0][0].dtype == dtype
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("large", [False, True])
def test_only_the_gradients_asked_for_are_made(needs, large, monkeypatch):
    if large:
        monkeypatch.setattr(moved_linear, "LARGE_BYTES", 1)
    layer = nn.Linear(N * SIZE, OUT, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(6, N * SIZE, dtype=torch.float64, requires_grad=needs[0])
    update = torch.randn(N, SIZE, SIZE, dtype=torch.float64, requires_grad=needs[1])
    assert torch.autograd.gradcheck(lambda *t: moved_linear.moved_linear(*t, layer), (x, update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 30, 2000])
def test_the_start_is_the_base_layers_output_to_the_bit_whatever_the_input(dtype, tokens):
    base = nn.Linear(96, 64, dtype=dtype)
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), FuraConfig(target_modules=["0"]))
    x = torch.randn(tokens, 96).to(dtype)
    x[0, 0] = float("inf")
    x[-1, 1] = -0.0
    assert torch.equal(model(x), base(x))


def test_layers_that_are_not_plain_are_left_to_the_composition(monkeypatch):
    def refuse(*args):
        raise AssertionError("this layer's weight is not simply there to be multiplied")

    x = torch.randn(3, 12)
    plain = nn.Linear(12, 5).requires_grad_(False)
    assert moved_linear.takes(plain, x)
    hooked, wrapped, trained, half = (copy.deepcopy(plain) for _ in range(4))
    hooked.register_forward_pre_hook(lambda *args: None)
    wrapped.forward = wrapped.forward
    trained.bias.requires_grad_(True)
    half.to(torch.bfloat16)
    assert not any(moved_linear.takes(layer, x) for layer in (hooked, wrapped, trained, half, nn.Identity()))
    # a hook on the base layer still runs
    model = get_peft_model(nn.Sequential(nn.Linear(12, 5)), FuraConfig(target_modules=["0"], init_weights=False))
    seen = []
    fura_layers(model)[0].base_layer.register_forward_hook(lambda *args: seen.append(1))
    monkeypatch.setattr("fura_rl.adapters.fura_layer.moved_linear", refuse)
    model(x)
    assert seen == [1]


def test_views_in_the_place_of_parameters_are_taken_where_no_gradient_is_asked_for():
    """As under FSDP1, whose output is then that of the bare model to the bit."""
    layer, x = nn.Linear(N * SIZE, OUT), torch.randn(9, N * SIZE)
    flat = nn.Parameter(layer.weight.detach().flatten())
    layer.weight.requires_grad_(False)
    layer.bias = None
    assert moved_linear.takes(layer, x)
    del layer.weight
    layer.weight = flat.view(OUT, N * SIZE)
    assert not moved_linear.takes(layer, x)
    with torch.no_grad():
        assert moved_linear.takes(layer, x)


def test_a_training_step_holds_no_more_than_a_frozen_layers(monkeypatch):
    """Beyond x, y and their gradients only parts and block matrices: the frozen layer's peak and a little."""
    from fura_rl.benchmark.measure import peak_bytes

    base = nn.Linear(512, 512, bias=False).requires_grad_(False)
    monkeypatch.setattr(moved_linear, "LARGE_BYTES", 2**20)
    tokens = 4096
    model = get_peft_model(
        nn.Sequential(copy.deepcopy(base)), FuraConfig(target_modules=["0"], init_weights=False)
    ).base_model.model[0]
    x, grad = torch.randn(tokens, 512, requires_grad=True), torch.randn(tokens, 512)
    peaks = []
    for layer in (base, model):
        x.grad = None
        layer(x).backward(grad)
        x.grad = None
        model.zero_grad()
        peaks.append(peak_bytes(lambda layer=layer: layer(x).backward(grad), torch.device("cpu")))
    assert peaks[1] < peaks[0] + base.weight.nbytes + 8 * model.fura_core["default"].delta_r.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beyond_x_a_step_keeps_the_update_in_the_dtype_of_x_and_vectors(dtype):
    from fura_rl.benchmark.measure import saved_activation_bytes

    base = nn.Linear(96, 64, dtype=dtype)
    model = get_peft_model(nn.Sequential(base), FuraConfig(target_modules=["0"], init_weights=False))
    x = torch.randn(32, 96).to(dtype).requires_grad_()
    n, b, r = fura_layers(model)[0].fura_core["default"].basis_v.shape
    vectors = 2 * n * r * 4  # dS / S0, and 1 / S0, which is not a buffer
    assert saved_activation_bytes(lambda: model(x), model) == x.nbytes + n * b * b * dtype.itemsize + vectors


class Kernels(TorchDispatchMode):
    """Counts the operations that make or fill a tensor: on a GPU each is a launch, whatever its size."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        is_view = function.is_view or function is torch.ops.aten._unsafe_view.default
        self.count += isinstance(result, torch.Tensor) and not is_view
        return result


def test_a_step_beside_a_16_bit_base_launches_one_kernel_more_than_loras(monkeypatch):
    """The path of every device but a CPU, on tensors without values; a meta device has no product of 16 bits that
    comes out in 32, so there a cast is counted beside it."""
    monkeypatch.setattr("fura_rl.adapters.fura_layer.takes", lambda layer, x: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    counts = []
    for config in (LoraConfig(target_modules=["0"]), FuraConfig(target_modules=["0"])):
        base = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
        model = get_peft_model(base, config).to("meta")
        x, grad = (torch.empty(8, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
        wanted = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
        assert {p.dtype for p in wanted[1:]} == {torch.float32}
        model(x)
        with Kernels() as kernels:
            torch.autograd.grad(model(x), wanted, grad)
        counts.append(kernels.count)
    assert counts[1] <= counts[0] + 2
