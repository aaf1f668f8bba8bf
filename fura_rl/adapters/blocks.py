"""Block algebra of FuRA on plain tensors: block shapes, the spectral basis, the update matrix and the fold.

Knows nothing of PEFT, layers or training.  Source: FuRA, arXiv 2605.22869, in base form: the frozen matrix is the
pretrained weight itself, and everything trained enters through one small matrix per block.

Notation, used in every shape comment below:
    W   (out, in)    pretrained weight, cut into n column blocks W_i of shape (out, b), n * b = in
    U_i, S0_i, V0_i  thin SVD of W_i, of rank r = min(out, b)
    D   (n, b, b)    block update; the adapted map is y = sum_i W_i (I + D_i) x_i
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# A singular value below this fraction of its block's largest is numerically zero: W_i has no column to move along in
# that direction, and dividing by it would amplify rounding noise.  1e-6 is ten float32 roundings.
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class SpectralBasis:
    """The frozen frame of one layer's column blocks, in float32 or wider.

    `dropped` counts the directions without a pretrained column; their `singular_values` entry is exactly 0.
    """

    right_vectors: torch.Tensor  # V0, (n, b, r); each column's largest entry is positive
    singular_values: torch.Tensor  # S0, (n, r), descending within a block
    dropped: int


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


def fix_signs(right_vectors: torch.Tensor) -> torch.Tensor:
    """Flip each column of (n, b, r) so that its entry of largest magnitude is positive: an SVD leaves signs free."""
    index = right_vectors.abs().argmax(dim=1, keepdim=True)
    return right_vectors * right_vectors.gather(1, index).sign()


@torch.no_grad()
def spectral_basis(weight: torch.Tensor, block_size: int) -> SpectralBasis:
    """The basis (V0, S0) of every column block of `weight` (out, in), all blocks in one batch.

    A tall block needs only the eigendecomposition of its b x b Gram matrix in float64 (U is never formed); a wide one
    the thin SVD.  Works in float64 and returns float32, or float64 for a float64 weight.
    """
    out_features, in_features = weight.shape
    n = in_features // block_size
    blocks = weight.detach().double().reshape(out_features, n, block_size).transpose(0, 1)  # (n, out, b)
    if block_size <= out_features:
        eigenvalues, vectors = torch.linalg.eigh(blocks.mT @ blocks)
        singular_values = eigenvalues.flip(-1).clamp_min(0).sqrt()
        vectors = vectors.flip(-1)
    else:
        _, singular_values, transposed = torch.linalg.svd(blocks, full_matrices=False)
        vectors = transposed.mT
    zero = singular_values <= RANK_TOLERANCE * singular_values[:, :1]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return SpectralBasis(
        right_vectors=fix_signs(vectors).to(dtype),
        singular_values=singular_values.masked_fill(zero, 0).to(dtype),
        dropped=int(zero.sum()),
    )


def block_update(
    delta_r: torch.Tensor,  # dR, (n, r, b), trained
    delta_s: torch.Tensor,  # dS, (n, r), trained
    right_vectors: torch.Tensor,  # V0, (n, b, r)
    singular_values: torch.Tensor,  # S0, (n, r)
) -> torch.Tensor:  # D, (n, b, b)
    """D_i = V0_i diag(1/S0_i) (diag(S_i) R_i - diag(S0_i) V0_i^T) with S = S0 + dS, R = V0^T + dR.

    Expanded so that nothing cancels: the bracket is diag(dS) V0^T + diag(S) dR, exactly 0 at the start.  Directions
    with S0 = 0 stay still (pseudo-inverse).  Computed in float32 or wider, whatever the adapter is stored in.
    """
    dtype = torch.promote_types(torch.promote_types(delta_r.dtype, right_vectors.dtype), torch.float32)
    delta_r, delta_s = delta_r.to(dtype), delta_s.to(dtype)
    right_vectors, singular_values = right_vectors.to(dtype), singular_values.to(dtype)
    inverse = torch.where(singular_values > 0, 1 / singular_values, 0)
    core = delta_s.unsqueeze(-1) * right_vectors.mT + (singular_values + delta_s).unsqueeze(-1) * delta_r
    return right_vectors @ (inverse.unsqueeze(-1) * core)


def apply_update(x: torch.Tensor, update: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """onto_i + D_i x_i for every block: x, onto (..., n * b) and D (n, b, b) to (..., n * b), in the dtype of x.

    With onto = x this is (I + D) x.  Adding to x instead of multiplying by I + D keeps the small entries of D in 16-bit
    types, and x itself bit for bit where D is 0.
    """
    n, b, _ = update.shape
    x_blocks, onto_blocks = (t.reshape(-1, n, b).transpose(0, 1) for t in (x, onto))  # (n, tokens, b)
    return torch.baddbmm(onto_blocks, x_blocks, update.to(x.dtype).mT).transpose(0, 1).reshape(x.shape)


@torch.no_grad()
def fold_delta(weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """W_i D_i for every block, (out, in), out of place, in float32 or wider: what the adapter adds to the weight."""
    n, b, _ = update.shape
    dtype = torch.promote_types(torch.promote_types(weight.dtype, update.dtype), torch.float32)
    blocks = weight.detach().to(dtype).reshape(weight.shape[0], n, b).transpose(0, 1)  # (n, out, b)
    return (blocks @ update.to(dtype)).transpose(0, 1).reshape(weight.shape)
