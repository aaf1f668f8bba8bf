"""The block algebra against closed forms and float64."""

import pytest
import torch

from fura_rl.adapters import blocks


@pytest.mark.parametrize(
    ("in_features", "out_features", "expected"),
    [(2048, 2048, 64), (6144, 2048, 96), (2560, 2560, 64), (20, 2, 2), (10, 20, 5), (127, 300, 127), (7, 2, 1)],
)
def test_default_block_size_is_the_factor_pair_nearest_a_square_that_fits_the_rows(in_features, out_features, expected):
    pairs = [(in_features // b, b) for b in range(1, in_features + 1) if in_features % b == 0]
    fitting = [(n, b) for n, b in pairs if b <= out_features]
    square = min((b for n, b in pairs if n <= b), key=lambda b: b)
    nearest = square if square <= out_features else max(b for _, b in fitting)
    assert blocks.default_block_size(in_features, out_features) == nearest == expected


@pytest.mark.parametrize(("out_features", "block_size"), [(24, 8), (6, 12), (12, 12)])
def test_basis_agrees_with_a_float64_svd(out_features, block_size):
    weight = torch.randn(out_features, 24, dtype=torch.float64)
    basis = blocks.spectral_basis(weight, block_size)
    for i, block in enumerate(weight.split(block_size, dim=1)):
        _, singular_values, right = torch.linalg.svd(block, full_matrices=False)
        assert torch.allclose(basis.singular_values[i], singular_values, rtol=1e-6)
        overlap = (right @ basis.right_vectors[i]).abs()
        assert torch.allclose(overlap, torch.eye(len(right), dtype=torch.float64), atol=1e-6)


def test_signs_are_fixed_so_that_two_conversions_agree():
    basis = blocks.spectral_basis(torch.randn(16, 12), 4)
    flipped = blocks.fix_signs(-basis.right_vectors)
    assert torch.equal(flipped, basis.right_vectors)


def test_rank_deficient_directions_are_counted_and_stay_still():
    weight = torch.randn(16, 8, dtype=torch.float64)
    weight[:, 3] = weight[:, 2]  # one direction of block 0 has no column
    basis = blocks.spectral_basis(weight, 4)
    assert basis.dropped == 1
    update = blocks.block_update(
        torch.randn(2, 4, 4).double(), torch.randn(2, 4).double(), basis.right_vectors, basis.singular_values
    )
    assert torch.isfinite(update).all()
    missing = torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=torch.float64) / 2**0.5  # the direction x with W_0 x = 0
    assert (missing @ update[0]).abs().max() < 1e-6


def test_update_is_exactly_zero_at_the_start():
    basis = blocks.spectral_basis(torch.randn(16, 12), 4)
    update = blocks.block_update(torch.zeros(3, 4, 4), torch.zeros(3, 4), basis.right_vectors, basis.singular_values)
    assert torch.equal(update, torch.zeros(3, 4, 4))


@pytest.mark.parametrize("block_size", [3, 4, 12])
def test_base_form_is_the_papers_formula(block_size):
    """W_i (I + D_i) = U_i diag(S_i) R_i, the right side written from an SVD."""
    weight = torch.randn(16, 12, dtype=torch.float64)
    basis = blocks.spectral_basis(weight, block_size)
    n = 12 // block_size
    delta_r = 0.1 * torch.randn(n, block_size, block_size, dtype=torch.float64)
    delta_s = 0.1 * torch.randn(n, block_size, dtype=torch.float64)
    update = blocks.block_update(delta_r, delta_s, basis.right_vectors, basis.singular_values)
    folded = weight + blocks.fold_delta(weight, update)
    for i, block in enumerate(weight.split(block_size, dim=1)):
        left = block @ basis.right_vectors[i] / basis.singular_values[i]  # U_i
        small_core = basis.right_vectors[i].T + delta_r[i]
        expected = left @ torch.diag(basis.singular_values[i] + delta_s[i]) @ small_core
        assert torch.allclose(folded[:, i * block_size : (i + 1) * block_size], expected, atol=1e-8)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(blocks.apply_update(x, update, onto=x) @ weight.T, x @ folded.T, atol=1e-10)
