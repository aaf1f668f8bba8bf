"""Whether numbers are finite, by their norm: where that overflows, and where it cannot hide one that is not."""

import pytest
import torch

from fura_rl.finite import all_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_are_finite_also_where_their_norm_is_not(dtype):
    largest = torch.full((8, 8), torch.finfo(dtype).max, dtype=dtype)
    assert torch.linalg.vector_norm(largest).isinf() or dtype == torch.float64
    assert all_finite([torch.ones(3, dtype=dtype), largest])
    assert all_finite([])
    assert all_finite([torch.empty(0, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_wherever_it_lies(dtype, value):
    tensors = [torch.randn(5, 40).to(dtype), torch.randn(64, 33).to(dtype).mT]
    assert all_finite(tensors)
    tensors[1][-1, -1] = value
    assert not all_finite(tensors)
