"""Conversion: from a pretrained weight to the frozen frame of its blocks, in float64, a cache-full at a time.

Shapes and names as in blocks.py; everything is stated for column blocks W (out, in).  Source: FuRA, arXiv 2605.22869.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

# A singular value below this fraction of its block's largest is numerically zero: W_i has no column to move along in
# that direction, and dividing by it would amplify rounding noise.  1e-6 is ten float32 roundings.
RANK_TOLERANCE = 1e-6
# Float64 copies made at once.  On a CPU as much as stays in cache and is reused by the allocator: the fresh pages of a
# larger copy cost more than the product made of them.
WORKSPACE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
PANEL_BYTES = 2**20  # of that, what one CPU thread multiplies at a time: half of its second-level cache
LARGEST_ON_HOST = 256  # side of a Gram matrix from a GPU that the host decomposes
THREADED_WORK = 2**24  # out * in * b from which starting threads for a layer pays: a millisecond of one core
MOST_BLOCKS = 8  # in such a panel: with more, each would have too few rows for an efficient product


@dataclass(frozen=True)
class Frame:
    """The frozen frame of one layer's blocks, in float32 or wider.

    `right` is V0 (n, b, r) of an SVD, each column's largest entry positive.  A frame without singular values keeps
    what its form needs of the starting core C0: C0^T in core form, its pseudo-inverse in base form.
    `dropped` counts the directions without a pretrained column; their entry of `singular_values` and their column of
    `right` are exactly 0, so that they stay still.
    """

    right: torch.Tensor  # (n, b, r)
    singular_values: torch.Tensor | None  # S0, (n, r), descending within a block
    dropped: int = 0

    def to(self, device: torch.device) -> Frame:
        values = self.singular_values
        return Frame(self.right.to(device), None if values is None else values.to(device), self.dropped)


@torch.no_grad()
def svd_frame(weight: torch.Tensor, block_size: int) -> Frame:
    """The spectral frame (V0, S0) of every column block of `weight` (out, in).

    A tall block needs only the eigendecomposition of its b x b Gram matrix in float64 (U is never formed); a wide one
    the thin SVD.  Works in float64 and returns float32, or float64 for a float64 weight.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if block_size > weight.shape[0]:
        frames = [_wide_frame(blocks, dtype) for blocks in _block_batches(weight, block_size)]
    elif weight.device.type == "cpu":
        frames = _tall_frames_on_cpu(weight, block_size, dtype)
    else:
        gram = torch.cat([blocks.mT @ blocks for blocks in _block_batches(weight, block_size)])
        frames = [_tall_frame(gram, dtype)]
    return Frame(
        right=torch.cat([frame.right for frame in frames]),
        singular_values=torch.cat([frame.singular_values for frame in frames]),
        dropped=sum(frame.dropped for frame in frames),
    )


def _tall_frame(gram: torch.Tensor, dtype: torch.dtype) -> Frame:
    """From the Gram matrices (n, b, b)."""
    eigenvalues, eigenvectors = _eigh(gram)
    return _frame(eigenvalues.flip(-1).clamp_min(0).sqrt(), eigenvectors.flip(-1), dtype)


def _eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.linalg.eigh`; of many small matrices on a GPU by the host's cores, the GPU takes one after another.

    32 of 64 x 64: 24 ms on an H100, 6 on 16 cores of its host, copies included.
    """
    n, b, _ = gram.shape
    if gram.device.type == "cpu" or n == 1 or b > LARGEST_ON_HOST:
        return torch.linalg.eigh(gram)
    threads = torch.get_num_threads()
    parts = in_threads(torch.linalg.eigh, gram.cpu().split(max(1, n // (2 * threads))), threads)
    return tuple(torch.cat(part).to(gram.device) for part in zip(*parts, strict=True))


def _wide_frame(blocks: torch.Tensor, dtype: torch.dtype) -> Frame:
    _, singular_values, right = torch.linalg.svd(blocks, full_matrices=False)
    return _frame(singular_values, right.mT, dtype)


def _frame(singular_values: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> Frame:
    zero = singular_values <= RANK_TOLERANCE * singular_values[:, :1]
    right = fix_signs(right).masked_fill(zero.unsqueeze(-2), 0)
    return Frame(right.to(dtype), singular_values.masked_fill(zero, 0).to(dtype), int(zero.sum()))


def fix_signs(right: torch.Tensor) -> torch.Tensor:
    """Flip each column of (n, b, r) so that its entry of largest magnitude is positive: an SVD leaves signs free."""
    index = right.abs().argmax(dim=1, keepdim=True)
    return right * right.gather(1, index).sign()


def _tall_frames_on_cpu(weight: torch.Tensor, block_size: int, dtype: torch.dtype) -> list[Frame]:
    """The frames of all blocks, some blocks to a thread: LAPACK takes one small matrix after another on one core."""
    n, threads = weight.shape[1] // block_size, torch.get_num_threads()
    group = max(1, min(MOST_BLOCKS, n // (4 * threads)))
    groups = weight.split(group * block_size, dim=1)
    frame_of = partial(_tall_frame_on_cpu, block_size=block_size, dtype=dtype)
    few = n < 2 * threads  # large blocks: the threads are better used inside each
    if few or weight.numel() * block_size < THREADED_WORK:
        return [frame_of(columns) for columns in groups]
    return in_threads(frame_of, groups, threads)


@torch.no_grad()
def _tall_frame_on_cpu(columns: torch.Tensor, block_size: int, dtype: torch.dtype) -> Frame:
    """The frame of the few blocks in `columns` (out, k * b).

    The panels' rows are converted into one buffer that stays in cache, in the storage order of the weight.
    """
    rows, k = columns.shape[0], columns.shape[1] // block_size
    height = min(rows, max(block_size, PANEL_BYTES // (8 * MOST_BLOCKS * block_size)))
    by_rows = columns.stride(-1) == 1
    options = {"dtype": torch.float64, "device": columns.device}
    shape = (k, height, block_size) if by_rows else (k, block_size, height)
    buffer = torch.empty(shape, **options)
    buffer = buffer if by_rows else buffer.mT
    gram = torch.zeros(k, block_size, block_size, **options)
    blocks = columns.detach().unflatten(1, (k, block_size)).transpose(0, 1)  # (k, out, b)
    for panel in blocks.split(height, dim=1):
        converted = buffer[:, : panel.shape[1]].copy_(panel)
        gram.baddbmm_(converted.mT, converted)
    return _tall_frame(gram, dtype)


def in_threads(function: Callable[[Any], Any], items: tuple[Any, ...], threads: int) -> list[Any]:
    """`function` of every item, in order, on `threads` Python threads that have one torch thread each.

    Torch's kernels release the interpreter.  Its thread count is the caller's own again afterwards (a new thread would
    otherwise start with the workers').
    """
    if threads == 1:
        return [function(item) for item in items]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(before)


def _block_batches(weight: torch.Tensor, block_size: int) -> Iterator[torch.Tensor]:
    """The blocks of `weight` in float64, (some, out, b), a bounded number of bytes at a time."""
    out_features, in_features = weight.shape
    blocks = weight.detach().reshape(out_features, in_features // block_size, block_size).transpose(0, 1)
    workspace = WORKSPACE_BYTES["cpu" if weight.device.type == "cpu" else "cuda"]
    for batch in blocks.split(max(1, workspace // (8 * out_features * block_size))):
        yield batch.double()


@torch.no_grad()
def qr_cores(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Thin QR of every block, L = [Q_1 ... Q_n] (out, n * r) and C0 (n, r, b) with a non-negative diagonal."""
    large, small = [], []
    for blocks in _block_batches(weight, block_size):
        q, r = torch.linalg.qr(blocks)
        signs = torch.diagonal(r, dim1=-2, dim2=-1).sign()
        signs = torch.where(signs == 0, 1.0, signs)
        large.append(q * signs.unsqueeze(-2))
        small.append(signs.unsqueeze(-1) * r)
    return _in_working_dtype(weight, large, small)


@torch.no_grad()
def random_cores(weight: torch.Tensor, block_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random orthonormal L_i (out, r) with C0_i = L_i^T W_i fitted by least squares: the paper's control.

    L_i C0_i is the projection of W_i on r random directions, so it is W_i only where r = out.
    """
    generator = torch.Generator().manual_seed(seed)
    large, small = [], []
    for blocks in _block_batches(weight, block_size):
        shape = (*blocks.shape[:-1], min(blocks.shape[-2:]))
        # block by block: randn of a batch depends on how many are drawn at once, which depends on the device
        drawn = [torch.randn(shape[1:], generator=generator, dtype=torch.float64) for _ in blocks]
        q, _ = torch.linalg.qr(torch.stack(drawn))
        large.append(q.to(blocks.device))
        small.append(large[-1].mT @ blocks)
    return _in_working_dtype(weight, large, small)


def _in_working_dtype(
    weight: torch.Tensor, large: list[torch.Tensor], small: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat(large).transpose(0, 1).reshape(weight.shape[0], -1).to(dtype), torch.cat(small).to(dtype)
