"""The Triton kernel against the block algebra that it replaces: on a GPU, and in Triton's interpreter without one.

The interpreter must be chosen before triton is imported, so the tests of the kernel run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

from fura_rl.adapters import block_kernels, blocks

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(8, 3), (16, 4), (96, 2), (128, 2)]  # (b, n): smaller than a tile, filling one, padded to one
# Triton's interpreter multiplies the bits of bfloat16 numbers as integers
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
TOKENS = 300  # no multiple of a tile

on_a_gpu_or_interpreted = pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="run by test_in_tritons_interpreter")


@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="the kernel itself runs")
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
    product = blocks.as_blocks(x.double(), n, b) @ matrices.to(dtype).double()
    expected = onto.double() + product.transpose(0, 1).reshape(x.shape)
    for given in (matrices, matrices.to(dtype)):
        moved = block_kernels.move(x, given, onto)
        assert moved.dtype == dtype
        assert moved.shape == x.shape
        assert relative_error(moved, expected) < torch.finfo(dtype).eps


@on_a_gpu_or_interpreted
@pytest.mark.parametrize(("b", "n"), SHAPES)
def test_kernel_move_by_nothing_keeps_every_bit(b, n):
    x = randn(TOKENS, n * b, dtype=torch.float16)
    assert torch.equal(block_kernels.move(x, torch.zeros(n, b, b, device=x.device), x), x)


@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="Triton runs here")
def test_where_triton_cannot_run_a_warning_says_so_and_the_composition_serves(caplog):
    block_kernels.works.cache_clear()
    assert not block_kernels.works(torch.device("cpu"))
    assert not block_kernels.works(torch.device("cpu"))
    [record] = caplog.records
    assert "Triton does not run on cpu" in record.getMessage()
