"""A Triton kernel of the block algebra for GPUs: x + blockdiag(D) x in one pass over x.

Shapes and names as in blocks.py.  The composition there, a copy and a batched product onto it, reads and writes x
twice; it is the reference and the fallback.  On an H100 this takes half its time from 8M numbers on (2048 wide: 66
against 134 us at 16k tokens), below that launches cost more than passes.  The sum of token products and D itself were
tried as kernels too: cuBLAS is as fast or faster.  tests/test_block_kernels.py compares the two, in Triton's
interpreter where there is no GPU.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = None

logger = logging.getLogger(__name__)

FEWEST_NUMBERS = 2**23  # of x
LARGEST_BLOCK = 128  # beyond it a block takes several tiles, each with a pass over x of its own
TOKENS = 64  # of a tile


def takes(x: torch.Tensor, b: int) -> bool:
    """Whether x in blocks of b is worth it: a large one of 16 bits on a GPU."""
    return (
        triton is not None
        and x.is_cuda
        and x.dtype.itemsize == 2
        and x.numel() >= FEWEST_NUMBERS
        and b <= LARGEST_BLOCK
        and not torch.compiler.is_compiling()
        and works(x.device)
    )


@functools.cache
def works(device: torch.device) -> bool:
    """Whether Triton can compile and run there; where it cannot (it needs a C compiler) a warning says so, once."""
    x = torch.ones(1, 16, dtype=torch.float16, device=device)
    try:
        return bool((move(x, torch.ones(1, 16, 16, device=device), x) == 17).all())
    except Exception as error:
        logger.warning(
            "Triton does not run on %s (%s): FuRA's products take two passes over the activations instead of one",
            device,
            str(error).splitlines()[0],
        )
        return False


def jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@jit
def _move_kernel(
    x, matrices, onto, result,
    tokens, n, b, stride_block, stride_row, stride_column,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """result_i = onto_i + x_i M_i for T tokens of one block, which fills a tile of B columns or a part of it."""
    block, columns = tl.program_id(0), tl.arange(0, B)
    rows = tl.program_id(1) * T + tl.arange(0, T)
    mask = (rows < tokens)[:, None] & (columns < b)[None, :]
    places = rows.to(tl.int64)[:, None] * (n * b) + block * b + columns[None, :]
    x_tile = tl.load(x + places, mask=mask, other=0.0)
    inner = tl.arange(0, B)
    entries = block * stride_block + inner[:, None] * stride_row + columns[None, :] * stride_column
    matrix = tl.load(matrices + entries, mask=(inner < b)[:, None] & (columns < b)[None, :], other=0.0)
    total = tl.load(onto + places, mask=mask, other=0.0).to(tl.float32)
    total = tl.dot(x_tile, matrix.to(x_tile.dtype), total)
    tl.store(result + places, total.to(result.dtype.element_ty), mask=mask)


def move(x: torch.Tensor, matrices: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """onto_i + x_i @ matrices_i for every block: x, onto (..., n * b) in 16 bits, matrices (n, b, b) of any stride."""
    n, b, _ = matrices.shape
    x, onto = x.contiguous(), onto.contiguous()
    result, tokens = torch.empty_like(x), x.numel() // (n * b)
    side = max(16, triton.next_power_of_2(b))
    with torch.cuda.device_of(x):  # Triton launches on the current device, where a model is spread over several
        _move_kernel[n, triton.cdiv(tokens, TOKENS)](
            x, matrices, onto, result, tokens, n, b, *matrices.stride(), T=TOKENS, B=side, num_warps=4, num_stages=1
        )
    return result
