"""Block algebra of FuRA on plain tensors: block shapes, the trained small core, the product with x and the fold.

Knows nothing of PEFT, layers or training; the frozen frames come from frames.py.  Source: FuRA, arXiv 2605.22869.
Everything is stated for column blocks; row blocks are the column blocks of the transposed weight, so a caller hands in
that instead.

Notation, used in every shape comment below:
    W   (out, in)     pretrained weight, cut into n column blocks W_i of shape (out, b), n * b = in
    U_i, S0_i, V0_i   thin SVD of W_i, of rank r = min(out, b)
    T   (n, r)        the part of S0 that stands with the small core (`core_scale`)
    L   (out, n * r)  large core, L_i = W_i V0_i diag(1/T_i)
    C   (n, r, b)     small core, C_i = diag(T_i) V0_i^T at the start; the adapted block is L_i C_i
    D   (n, b, b)     block update of the base form, W_i (I + D_i) = L_i C_i
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fura_rl.adapters import block_kernels

SMALL_CPU_BATCH = 768  # tokens below which a copy costs less than one kernel launch per block (measured, 2 cores)
TOKENS_IN_CACHE = 256  # tokens whose activations a CPU keeps in cache between two products
# Tokens summed over at once by a CPU in 32 bits and more.  Where a token fills a page, those of one block lie in pages
# of their own, and with many the processor looks up addresses half of the time (measured, 1,024 to 18,944 wide; 256
# take up to 1.8 times as long).  Narrower ones are summed a cache-full at a time: 128 wide, 48 take four times as long.
PAGE_BYTES, TOKENS_IN_A_SUM, SUM_BYTES = 2**12, 48, 2**19


def without_autocast(device_type: str) -> AbstractContextManager:
    """No autocast inside; torch's own context costs as much as a small kernel, also where it changes nothing."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def default_block_size(in_features: int, out_features: int) -> int:
    """The block size b of the factor pair (n, b) of `in_features` closest to a square with n <= b.

    Where that b exceeds `out_features` (a block could not be spanned by its own columns), the closest pair with
    b <= out_features is taken instead.  2048 -> 64 (n=32), 6144 -> 96 (n=64); a prime gives one block.
    """
    candidates = divisors(in_features)
    square = next(b for b in candidates if b * b >= in_features)
    return square if square <= out_features else max(b for b in candidates if b <= out_features)


def pseudo_inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / values, and 0 where a value is 0: directions without a pretrained column stay still."""
    return torch.where(values > 0, 1 / values, 0)


def core_scale(singular_values: torch.Tensor, treatment: str, train_core: str) -> torch.Tensor:
    """T (n, r): what of S0 stands with the small core; the rest, S0 / T, is inside the large core.

    Merged "into the frozen core" means the large one where the small one is trained, and the other way round.
    """
    merged_into_large = "merge_trained" if train_core == "large" else "merge_frozen"
    if treatment == merged_into_large:
        return (singular_values > 0).to(singular_values.dtype)
    return singular_values.sqrt() if treatment == "split" else singular_values


def core_change(
    right: torch.Tensor,  # V0, (n, b, r)
    singular_values: torch.Tensor | None,  # S0, (n, r)
    delta_r: torch.Tensor | None,  # (n, r, b), trained; None where the small core is frozen
    delta_s: torch.Tensor | None,  # dS, (n, r), trained; None where S is not
    treatment: str,
) -> torch.Tensor:  # C - C0, (n, r, b)
    """The change of the small core that the trained tensors make; exactly 0 at the start.

    With S kept apart ("train", "freeze") C = diag(S) R, so the change is diag(dS) V0^T + diag(S) dR, expanded so that
    nothing cancels.  With S merged somewhere `delta_r` is the change of C itself.
    """
    kept = treatment in ("train", "freeze")
    change = torch.zeros_like(right.mT) if delta_r is None else delta_r
    if kept and delta_r is not None:
        scale = singular_values if delta_s is None else singular_values + delta_s
        change = scale.unsqueeze(-1) * delta_r
    return change if delta_s is None else torch.addcmul(change, delta_s.unsqueeze(-1), right.mT)


def block_update(change: torch.Tensor, right: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """D_i = V0_i diag(1/T_i) (C_i - C0_i), (n, b, b); `scale` None where `right` is the pseudo-inverse of C0."""
    return right @ (change if scale is None else pseudo_inverse(scale).unsqueeze(-1) * change)


def spectral_update(
    delta_r: torch.Tensor,  # (n, r, b)
    delta_s: torch.Tensor,  # (n, r)
    right: torch.Tensor,  # V0, (n, b, r); 0 in the columns where S0 is
    inverse: torch.Tensor,  # `pseudo_inverse` of S0, (n, r)
) -> torch.Tensor:  # D, (n, b, b)
    """`block_update` of `core_change` where S0 is kept and both dS and dR are trained, the paper's setting.

    D_i = V0_i (dR_i + diag(dS_i / S0_i) (dR_i + V0_i^T)).  A layer of few tokens spends much of its time on D, so its
    gradients are written out: few and small steps, and nothing saved but dS / S0 and what is kept anyway (of a dR that
    is stored in 16 bits, its float32 form).
    """
    if torch.compiler.is_compiling():  # it writes the gradients itself
        return spectral_update_forward(delta_r, delta_s, right, inverse)[0]
    return _SpectralUpdate.apply(delta_r, delta_s, right, inverse)


def spectral_update_forward(
    delta_r: torch.Tensor, delta_s: torch.Tensor, right: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """D (n, b, b), contiguous, and what its backward takes: dS / S0, (n, r, 1)."""
    moved = (delta_s * inverse).unsqueeze(-1)
    return torch.bmm(right, torch.addcmul(delta_r, moved, delta_r + right.mT)), moved


def spectral_update_backward(
    grad: torch.Tensor, delta_r: torch.Tensor, moved: torch.Tensor, right: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of dR and dS from that of D, (n, b, b)."""
    rows = right.mT
    grad_rows = torch.bmm(rows, grad)
    grad_s = (delta_r + rows).mul_(grad_rows).sum(-1).mul_(inverse)
    return grad_rows.addcmul_(moved, grad_rows), grad_s


class _SpectralUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, delta_r: torch.Tensor, delta_s: torch.Tensor, right: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        update, moved = spectral_update_forward(delta_r, delta_s, right, inverse)
        ctx.save_for_backward(delta_r, moved, right, inverse)
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with without_autocast(grad.device.type):
            return *spectral_update_backward(grad, *ctx.saved_tensors), None, None


def starting_core(right: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """C0 (n, r, b) of a core form: diag(T) V0^T."""
    return right.mT if scale is None else scale.unsqueeze(-1) * right.mT


@torch.no_grad()
def large_core(weight: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """L (out, n * r) of an SVD frame: L_i = W_i V0_i diag(1/T_i), in float32 or wider; U is never decomposed."""
    return fold(weight, right * pseudo_inverse(scale).unsqueeze(-2))


class _AddUpdate(torch.autograd.Function):
    """onto + blockdiag(D) x in one strided batched product each way; saves x and D's `as_factors`, nothing else.

    The plain composition needs a copy of the blocks into a batch and back, and in the backward one more pass over an
    activation to add the two gradients of x.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, update: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        factors = as_factors(update, x) if onto is None else update.to(x.dtype)
        ctx.save_for_backward(x, factors)
        ctx.onto_is_x, ctx.update_dtype = onto is None, update.dtype
        return move(x, factors.mT) if onto is None else _product(x, factors.mT, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, factors = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_update = None
        with without_autocast(grad.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = move(grad, factors) if ctx.onto_is_x else _product(grad, factors)
            if ctx.needs_input_grad[1]:
                n, b, _ = factors.shape
                grad_update = token_products(as_blocks(grad, n, b), as_blocks(x, n, b)).to(ctx.update_dtype)
        return grad_x, grad_update, None if ctx.onto_is_x else grad


def as_blocks(x: torch.Tensor, n: int, b: int) -> torch.Tensor:
    """(..., n * b) as a strided view (n, tokens, b)."""
    return x.reshape(-1, n, b).transpose(0, 1)


def token_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of left_i right_i^T, (n, tokens, b) each, to (n, b, b): D's gradient from that of x + D x.

    In float32 or wider.  On a CPU some tokens at a time; in 16 bits from contiguous copies, since its kernels take
    strided blocks at a fifth of the rate.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    if left.device.type != "cpu":
        narrow = left.is_cuda and left.dtype != dtype
        return torch.bmm(left.mT, right, out_dtype=dtype) if narrow else torch.bmm(left.mT, right).to(dtype)
    total = None
    size = tokens_in_a_sum(left) if left.dtype == dtype else TOKENS_IN_CACHE
    for left_part, right_part in zip(token_parts(left, size), token_parts(right, size), strict=True):
        if left.dtype != dtype:
            product = torch.bmm(left_part.contiguous().mT, right_part.contiguous())
            total = product.to(dtype) if total is None else total.add_(product)
        elif total is None:
            total = torch.bmm(left_part.mT, right_part)
        else:
            total.baddbmm_(left_part.mT, right_part)
    return total


def tokens_in_a_sum(blocks: torch.Tensor) -> int:
    """How many tokens of (n, tokens, b) a CPU sums over at once."""
    n, _, b = blocks.shape
    token_bytes = n * b * blocks.element_size()
    return TOKENS_IN_A_SUM if token_bytes >= PAGE_BYTES else SUM_BYTES // token_bytes


def token_parts(blocks: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """(n, tokens, b) in parts of so many tokens."""
    return blocks.split(size, dim=1) if blocks.shape[1] > size else (blocks,)


def adds_identity(x: torch.Tensor) -> bool:
    """Whether `move` multiplies x by I + D: on a CPU in 32 bits and more, where it saves a pass over x.

    It is exact for D = 0 and loses nothing that the rounding of the result would have kept.  In 16 bits, and in a GPU's
    TF32, it would swallow the diagonal of a small D.
    """
    return x.device.type == "cpu" and x.dtype.itemsize >= 4


def as_factors(update: torch.Tensor, x: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """What `move` multiplies tensors like x by: D in their dtype, or I + D, which may be formed in D's place."""
    factors = update if update.dtype == x.dtype else update.to(x.dtype)
    if not adds_identity(x):
        return factors
    identity = torch.eye(factors.shape[-1], dtype=x.dtype, device=x.device)
    return factors.add_(identity) if in_place or factors is not update else factors + identity


def move(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """x_i + x_i @ D_i for every block, in the dtype of x, from D's `as_factors` for x, or from their transposes."""
    if adds_identity(x):
        return _product(x, factors)
    if x.device.type != "cpu":
        return _product(x, factors, onto=x)
    n, b, _ = factors.shape
    moved = torch.empty_like(x, memory_format=torch.contiguous_format)
    move_blocks(as_blocks(x, n, b), factors, result=as_blocks(moved, n, b))
    return moved


def move_blocks(x: torch.Tensor, factors: torch.Tensor, result: torch.Tensor) -> None:
    """`move` of x (n, tokens, b) into `result`, which may be x itself; on a CPU, a cache-full of tokens at a time."""
    wide = adds_identity(x)
    if not wide:
        factors = factors.contiguous()
    parts = (token_parts(blocks, TOKENS_IN_CACHE) for blocks in (x, result))
    for part, target in zip(*parts, strict=True):
        blocks = part if wide else part.contiguous()
        target.copy_(torch.bmm(blocks, factors) if wide else torch.baddbmm(blocks, blocks, factors))


def _product(x: torch.Tensor, matrices: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """onto + x_i @ matrices_i for every block, in the layout and dtype of x; `onto` None adds nothing."""
    n, b, _ = matrices.shape
    if onto is not None and block_kernels.takes(x, b):
        return block_kernels.move(x, matrices, onto)
    x_blocks = as_blocks(x, n, b)
    if x.device.type == "cpu" and x.numel() < SMALL_CPU_BATCH * n * b:
        blocks = (
            torch.bmm(x_blocks, matrices) if onto is None else torch.baddbmm(as_blocks(onto, n, b), x_blocks, matrices)
        )
        return blocks.transpose(0, 1).reshape(x.shape)
    result = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if onto is None
        else onto.clone(memory_format=torch.contiguous_format)
    )
    as_blocks(result, n, b).baddbmm_(x_blocks, matrices, beta=0 if onto is None else 1)
    return result


def add_update(x: torch.Tensor, update: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """onto_i + D_i x_i for every block: x, onto (..., n * b) and D (n, b, b) to (..., n * b), in the dtype of x.

    `onto` None means x itself: (I + D) x.  Adding to x instead of multiplying by I + D keeps the small entries of D in
    16-bit types, and x itself bit for bit where D is 0.
    """
    if torch.compiler.is_compiling():  # the compiler chooses layouts itself and takes no in-place product on a view
        n, b, _ = update.shape
        start, x_blocks = (as_blocks(t, n, b) for t in (x if onto is None else onto, x))
        return torch.baddbmm(start, x_blocks, update.to(x.dtype).mT).transpose(0, 1).reshape(x.shape)
    return _AddUpdate.apply(x, update, onto)


def apply_core(x: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """C_i x_i for every block: x (..., n * b) and C (n, r, b) to (..., n * r), in the dtype of x."""
    n, r, b = core.shape
    blocks = torch.bmm(x.reshape(-1, n, b).transpose(0, 1), core.to(x.dtype).mT)
    return blocks.transpose(0, 1).reshape(*x.shape[:-1], n * r)


@torch.no_grad()
def fold(large: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """A_i M_i for every block: A (out, n * k) and M (n, k, b) to (out, n * b), out of place, in float32 or wider."""
    n, k, b = small.shape
    dtype = torch.promote_types(torch.promote_types(large.dtype, small.dtype), torch.float32)
    blocks = large.detach().to(dtype).reshape(large.shape[0], n, k).transpose(0, 1)  # (n, out, k)
    return (blocks @ small.to(dtype)).transpose(0, 1).reshape(large.shape[0], n * b)
