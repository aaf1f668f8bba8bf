"""The Triton kernels against the block algebra that they replace: on a GPU, and in Triton's interpreter without one.

The interpreter must be chosen before triton is imported, so the tests of the kernels run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

from fura_rl.adapters import block_kernels, blocks, frames

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(8, 3), (16, 4), (96, 2), (148, 2)]  # (b, n): smaller than a tile, one, padded to one, several
# Triton's interpreter multiplies the bits of bfloat16 numbers as integers
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
TOKENS = 300  # no multiple of a tile

on_a_gpu_or_interpreted = pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="run by test_in_tritons_interpreter")


@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="the kernels themselves run")
def test_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "kernel_"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout.splitlines()[-1], run.stdout


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda" if HAS_GPU else "cpu").to(dtype)


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@on_a_gpu_or_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("b", "n"), SHAPES)
def test_kernel_move_adds_the_product_of_every_block(b, n, transposed, dtype):
    x, onto, matrices = (
        randn(5, TOKENS // 5, n * b, dtype=dtype),
        randn(5, TOKENS // 5, n * b, dtype=dtype),
        randn(n, b, b),
    )
    matrices = 0.1 * (matrices.mT if transposed else matrices)
    moved = block_kernels.move(x, matrices, onto)
    product = blocks.as_blocks(x.double(), n, b) @ matrices.to(dtype).double()
    expected = onto.double() + product.transpose(0, 1).reshape(x.shape)
    assert moved.dtype == dtype
    assert moved.shape == x.shape
    assert relative_error(moved, expected) < torch.finfo(dtype).eps


@on_a_gpu_or_interpreted
@pytest.mark.parametrize(("b", "n"), SHAPES)
def test_kernel_move_by_nothing_keeps_every_bit(b, n):
    x = randn(TOKENS, n * b, dtype=torch.float16)
    assert torch.equal(block_kernels.move(x, torch.zeros(n, b, b, device=x.device), x), x)


@on_a_gpu_or_interpreted
@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize(("b", "n"), SHAPES)
def test_kernel_token_products_sum_over_all_tokens_in_float32(b, n, programs, monkeypatch):
    monkeypatch.setattr(block_kernels, "PROGRAMS", programs)  # the tokens in one part, and in several
    left, right = (randn(3, TOKENS // 3, n * b, dtype=torch.float16) for _ in range(2))
    products = block_kernels.token_products(left, right, n, b)
    expected = blocks.as_blocks(left.double(), n, b).mT @ blocks.as_blocks(right.double(), n, b)
    assert products.dtype == torch.float32
    assert relative_error(products, expected) < 1e-6


@on_a_gpu_or_interpreted
@pytest.mark.parametrize(("rows", "b", "n"), [(64, 8, 3), (200, 96, 2), (300, 148, 1), (12, 20, 2)])
def test_kernel_spectral_update_and_its_gradients(rows, b, n):
    """Blocks wider than high (rank below b) and a direction without a pretrained column are among them."""
    weight = randn(rows, n * b)
    weight[:, 0] = weight[:, 1]
    frame = frames.svd_frame(weight, b)
    assert frame.dropped == (rows > b)
    right, values = frame.right.contiguous(), frame.singular_values.contiguous()
    delta_r, delta_s = 0.1 * randn(*right.mT.shape), 0.1 * randn(*values.shape)
    exact = [t.double().requires_grad_() for t in (delta_r, delta_s)]
    change = blocks.core_change(right.double(), values.double(), *exact, "train")
    expected = blocks.block_update(change, right.double(), values.double())
    assert relative_error(block_kernels.spectral_update(delta_r, delta_s, right, values), expected) < 1e-5
    grad = randn(n, b, b)
    expected.backward(grad.double())
    for actual, reference in zip(
        block_kernels.spectral_update_backward(grad, delta_r, delta_s, right, values), exact, strict=True
    ):
        assert relative_error(actual, reference.grad) < 1e-5


def test_spectral_update_is_the_general_formula_and_its_gradients():
    frame = frames.svd_frame(randn(50, 36), 12)
    values, right = frame.singular_values.clone(), frame.right
    values[1, -1] = 0  # a direction that must stay still
    deltas = [0.1 * torch.randn_like(t) for t in (right.mT.contiguous(), values)]
    ours, plain = ([t.clone().requires_grad_() for t in deltas] for _ in range(2))
    update = blocks.spectral_update(*ours, right, values)
    expected = blocks.block_update(blocks.core_change(right, values, *plain, "train"), right, values)
    assert relative_error(update, expected) < 1e-5
    grad = torch.randn_like(update)
    update.backward(grad)
    expected.backward(grad)
    for actual, reference in zip(ours, plain, strict=True):
        assert relative_error(actual.grad, reference.grad) < 1e-5
    assert not ours[1].grad[1, -1]
