"""One pass that tells whether tensors hold NaN or Inf."""

import pytest
import torch

from fedgram.flora_na.finite import is_finite

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [float("-inf")], [float("inf"), float("-inf")]])
def test_one_number_that_is_not_finite_is_found(dtype, bad):
    x = torch.ones(30, 40, dtype=dtype)
    assert is_finite(x)
    x.view(-1)[17 : 17 + len(bad)] = torch.tensor(bad, dtype=dtype)
    assert not is_finite(x)
    assert not is_finite(x.T)


@pytest.mark.parametrize("dtype", TYPES)
def test_finite_numbers_whose_sum_is_not(dtype):
    x = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(x.sum())
    assert is_finite(x)


def test_no_numbers():
    assert is_finite(torch.empty(0, 3))
