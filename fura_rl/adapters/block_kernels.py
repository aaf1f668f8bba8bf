"""Triton kernels of the block algebra, for GPUs: one launch and one pass each for what blocks.py composes of several.

Shapes and names as in blocks.py.  The composition there is the reference and the fallback; tests/test_block_kernels.py
compares the two, in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = None

MOVE_NUMBERS = 2**20  # of x, from which a kernel's launch costs less than the passes over x that it saves
PROGRAMS = 256  # to fill a GPU with: about two for each multiprocessor


def take(tensor: torch.Tensor) -> bool:
    """Whether these kernels can run where `tensor` is."""
    return triton is not None and tensor.is_cuda and not torch.compiler.is_compiling()


def take_large(x: torch.Tensor) -> bool:
    """Whether x (tokens, n * b) is worth them: 16 bits (in 32, cuBLAS is the faster), and not small."""
    return x.dtype.itemsize == 2 and x.numel() >= MOVE_NUMBERS and take(x)


def tile(b: int) -> int:
    """The side of a square tile over a block: the block itself where it fits, else 64."""
    return max(16, triton.next_power_of_2(b)) if b <= 128 else 64


def jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@jit
def _move_kernel(
    x, matrices, onto, result,
    tokens, n, b, stride_block, stride_row, stride_column,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """result_i = onto_i + x_i M_i for T tokens and B columns of one block."""
    tiles = tl.cdiv(b, B)
    block, column_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows = tl.program_id(1) * T + tl.arange(0, T)
    columns = column_tile * B + tl.arange(0, B)
    inside = (rows < tokens)[:, None] & (columns < b)[None, :]
    start = rows.to(tl.int64)[:, None] * (n * b) + block * b
    total = tl.load(onto + start + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    for first in range(0, b, B):
        inner = first + tl.arange(0, B)
        x_tile = tl.load(x + start + inner[None, :], mask=(rows < tokens)[:, None] & (inner < b)[None, :], other=0.0)
        places = block * stride_block + inner[:, None] * stride_row + columns[None, :] * stride_column
        m_tile = tl.load(matrices + places, mask=(inner < b)[:, None] & (columns < b)[None, :], other=0.0)
        total = tl.dot(x_tile, m_tile.to(x_tile.dtype), total)
    tl.store(result + start + columns[None, :], total.to(result.dtype.element_ty), mask=inside)


def move(x: torch.Tensor, matrices: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """onto_i + x_i @ matrices_i for every block: x, onto (..., n * b) in 16 bits, matrices (n, b, b) of any stride."""
    n, b, _ = matrices.shape
    x, onto = x.contiguous(), onto.contiguous()
    result = torch.empty_like(x)
    tokens, side, height = x.numel() // (n * b), tile(b), 128
    grid = (n * triton.cdiv(b, side), triton.cdiv(tokens, height))
    strides = matrices.stride()
    _move_kernel[grid](x, matrices, onto, result, tokens, n, b, *strides, T=height, B=side, num_warps=8, num_stages=1)
    return result


@jit
def _token_products_kernel(left, right, result, tokens, n, b, share, T: tl.constexpr, B: tl.constexpr):
    """Columns x columns of one block's products, summed over `share` tokens."""
    tiles = tl.cdiv(b, B)
    block, split = tl.program_id(0), tl.program_id(2)
    rows = (tl.program_id(1) // tiles) * B + tl.arange(0, B)
    columns = (tl.program_id(1) % tiles) * B + tl.arange(0, B)
    total = tl.zeros((B, B), dtype=tl.float32)
    last = tl.minimum((split + 1) * share, tokens)
    for first in range(split * share, last, T):
        t = first + tl.arange(0, T)
        start = t.to(tl.int64)[:, None] * (n * b) + block * b
        left_tile = tl.load(left + start + rows[None, :], mask=(t < last)[:, None] & (rows < b)[None, :], other=0.0)
        right_places = right + start + columns[None, :]
        right_tile = tl.load(right_places, mask=(t < last)[:, None] & (columns < b)[None, :], other=0.0)
        total = tl.dot(tl.trans(left_tile), right_tile, total)
    places = result + ((split * n + block) * b + rows[:, None]) * b + columns[None, :]
    tl.store(places, total, mask=(rows < b)[:, None] & (columns < b)[None, :])


def token_products(left: torch.Tensor, right: torch.Tensor, n: int, b: int) -> torch.Tensor:
    """The sum over tokens of left_i right_i^T for every block, (n, b, b) in float32; left, right (..., n * b).

    A batched product gives each block to one multiprocessor or few; here its tokens are shared out as well.
    """
    left, right = left.contiguous(), right.contiguous()
    tokens, side, height = left.numel() // (n * b), tile(b), 64
    squares = triton.cdiv(b, side) ** 2
    splits = max(1, min(triton.cdiv(tokens, 4 * height), triton.cdiv(PROGRAMS, n * squares)))
    share = height * triton.cdiv(triton.cdiv(tokens, splits), height)
    splits = triton.cdiv(tokens, share)
    parts = torch.empty(splits, n, b, b, dtype=torch.float32, device=left.device)
    _token_products_kernel[(n, squares, splits)](left, right, parts, tokens, n, b, share, T=height, B=side, num_warps=4)
    return parts[0] if splits == 1 else parts.sum(0)


@jit
def _scales(values, delta_s, places, mask):
    """a = (S0 + dS) / S0, e = dS / S0 and 1 / S0, all 0 where S0 is."""
    value = tl.load(values + places, mask=mask, other=0.0)
    step = tl.load(delta_s + places, mask=mask, other=0.0)
    inverse = tl.where(value > 0, 1.0 / tl.where(value > 0, value, 1.0), 0.0)
    return inverse * (value + step), inverse * step, inverse


@jit
def _update_kernel(delta_r, delta_s, right, values, result, b, r, B: tl.constexpr):
    """A tile of D_i = V (a dR + e V^T)."""
    tiles = tl.cdiv(b, B)
    block = tl.program_id(0)
    rows = (tl.program_id(1) // tiles) * B + tl.arange(0, B)
    columns = (tl.program_id(1) % tiles) * B + tl.arange(0, B)
    total = tl.zeros((B, B), dtype=tl.float32)
    for first in range(0, r, B):
        inner = first + tl.arange(0, B)
        a, e, _ = _scales(values, delta_s, block * r + inner, inner < r)
        mask = (inner < r)[:, None] & (columns < b)[None, :]
        step = tl.load(delta_r + (block * r + inner[:, None]) * b + columns[None, :], mask=mask, other=0.0)
        basis = tl.load(right + (block * b + columns[None, :]) * r + inner[:, None], mask=mask, other=0.0)
        left_mask = (rows < b)[:, None] & (inner < r)[None, :]
        left = tl.load(right + (block * b + rows[:, None]) * r + inner[None, :], mask=left_mask, other=0.0)
        total = tl.dot(left, a[:, None] * step + e[:, None] * basis, total, input_precision="ieee")
    places = result + (block * b + rows[:, None]) * b + columns[None, :]
    tl.store(places, total, mask=(rows < b)[:, None] & (columns < b)[None, :])


def spectral_update(
    delta_r: torch.Tensor, delta_s: torch.Tensor, right: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """See `blocks.spectral_update`; all in float32."""
    n, b, r = right.shape
    delta_r, delta_s, right, values = (t.contiguous() for t in (delta_r, delta_s, right, values))
    result = torch.empty(n, b, b, dtype=torch.float32, device=right.device)
    side = min(64, tile(b))
    grid = (n, triton.cdiv(b, side) ** 2)
    _update_kernel[grid](delta_r, delta_s, right, values, result, b, r, B=side, num_warps=4, num_stages=1)
    return result


@jit
def _update_backward_kernel(grad, delta_r, delta_s, right, values, grad_r, grad_s, b, r, B: tl.constexpr):
    """B rows of H = V^T G: grad_dR = a H, grad_dS = 1/S0 sum of H (dR + V^T)."""
    block = tl.program_id(0)
    rows = tl.program_id(1) * B + tl.arange(0, B)
    a, _, inverse = _scales(values, delta_s, block * r + rows, rows < r)
    sums = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, b, B):
        columns = start + tl.arange(0, B)
        h = tl.zeros((B, B), dtype=tl.float32)
        for first in range(0, b, B):
            inner = first + tl.arange(0, B)
            left_mask = (inner < b)[None, :] & (rows < r)[:, None]
            left = tl.load(right + (block * b + inner[None, :]) * r + rows[:, None], mask=left_mask, other=0.0)
            g_mask = (inner < b)[:, None] & (columns < b)[None, :]
            g = tl.load(grad + (block * b + inner[:, None]) * b + columns[None, :], mask=g_mask, other=0.0)
            h = tl.dot(left, g.to(tl.float32), h, input_precision="ieee")
        mask = (rows < r)[:, None] & (columns < b)[None, :]
        places = (block * r + rows[:, None]) * b + columns[None, :]
        step = tl.load(delta_r + places, mask=mask, other=0.0)
        basis = tl.load(right + (block * b + columns[None, :]) * r + rows[:, None], mask=mask, other=0.0)
        sums += tl.sum(h * (step + basis), axis=1)
        tl.store(grad_r + places, a[:, None] * h, mask=mask)
    tl.store(grad_s + block * r + rows, inverse * sums, mask=rows < r)


def spectral_update_backward(
    grad: torch.Tensor, delta_r: torch.Tensor, delta_s: torch.Tensor, right: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of dR and dS from that of D, (n, b, b)."""
    n, b, r = right.shape
    grad, delta_r, delta_s, right, values = (t.contiguous() for t in (grad, delta_r, delta_s, right, values))
    grad_r, grad_s = torch.empty_like(delta_r), torch.empty_like(delta_s)
    side = min(64, tile(max(b, r)))
    grid = (n, triton.cdiv(r, side))
    _update_backward_kernel[grid](grad, delta_r, delta_s, right, values, grad_r, grad_s, b, r, B=side, num_warps=4)
    return grad_r, grad_s
