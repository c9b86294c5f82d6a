"""R-only QR of the stacked factors: the Gram's square root, without its loss of half the digits."""

import pytest
import torch

from fedgram import kernels
from fedgram.kernels import _factor_inputs


@pytest.mark.parametrize("cache", [1 << 20, 1 << 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_triangles_square_to_the_grams(monkeypatch, cache, dtype):
    monkeypatch.setattr(_factor_inputs, "CACHE_BYTES", cache)
    B = [[torch.randn(300, r).to(dtype) for r in (3, 1, 4)], [torch.randn(5, r).to(dtype) for r in (4, 4)]]
    A = [[torch.randn(r, 200).to(dtype) for r in (3, 1, 4)], [torch.randn(r, 500).to(dtype) for r in (4, 4)]]
    R_B, R_A = kernels.factor_triangle(B, A)
    assert [tuple(r.shape) for r in (*R_B, *R_A)] == [(8, 8), (5, 8), (8, 8), (8, 8)]
    for l in range(2):
        left, right = torch.cat(B[l], 1).double(), torch.cat(A[l], 0).double()
        assert torch.allclose(R_B[l].T @ R_B[l], left.T @ left, rtol=1e-12, atol=1e-12 * float(left.norm()) ** 2)
        assert torch.allclose(R_A[l].T @ R_A[l], right @ right.T, rtol=1e-12, atol=1e-12 * float(right.norm()) ** 2)


def test_small_singular_values_survive():
    u = torch.linalg.qr(torch.randn(50, 4, dtype=torch.float64))[0]
    sigma = torch.tensor([1.0, 1e-4, 1e-9, 1e-13], dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    [R_B], _ = kernels.factor_triangle([[(u * sigma) @ mix]], [[torch.ones(4, 3)]])
    # backward stable: every singular value is right to 1e-15 of the largest
    assert torch.linalg.svdvals(R_B).tolist() == pytest.approx(sigma.tolist(), rel=1e-2)


def test_bad_input_names_the_tensor():
    with pytest.raises(ValueError, match=r"B\[0\]\[1\]"):
        kernels.factor_triangle([[torch.ones(3, 2), torch.ones(4, 2)]], [[torch.ones(2, 3), torch.ones(2, 3)]])
