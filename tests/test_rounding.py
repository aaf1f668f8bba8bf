"""Rounding of folded weights to a 16-bit engine."""

import pytest
import torch

from fura_rl.sync.rounding import round_weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_takes_neighbours_only(dtype):
    exact = torch.cat([torch.randn(200), 1e-8 * torch.randn(20), torch.tensor([0.0, -0.0, 1.0, -2.5])])
    draws = torch.stack(
        [round_weight(exact, dtype, torch.Generator().manual_seed(seed)).float() for seed in range(2000)]
    )
    nearest = exact.to(dtype)
    spacing = (2 * (exact - nearest.float()).abs()).amax() + (nearest.abs().float() * torch.finfo(dtype).eps)
    assert ((draws - exact).abs() <= spacing).all()
    assert (draws.unique(dim=0).shape[0]) > 1
    for column, value in zip(draws.T, exact, strict=True):
        assert len(column.unique()) <= 2
        assert (column.mean() - value).abs() <= 5 * column.std() / 2000**0.5 + 1e-12


def test_values_the_dtype_holds_and_values_beyond_its_range_do_not_move():
    exact = torch.tensor([0.0, 0.5, -3.0, 65504.0, 1e6, -1e6, float("inf")])
    rounded = round_weight(exact, torch.float16, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, exact.to(torch.float16))


def test_nearest_rounding_is_the_default_and_32_bit_engines_take_no_other():
    exact = torch.randn(100)
    assert torch.equal(round_weight(exact, torch.bfloat16), exact.to(torch.bfloat16))
    assert torch.equal(round_weight(exact, torch.float32, torch.Generator()), exact)
    with pytest.raises(ValueError, match="stochastic rounding is for 16-bit engines"):
        round_weight(exact.double(), torch.float32, torch.Generator())
