import pytest
import torch

from fedgram.kernels import factor_traces
from fedgram_testing.factor_ops import LAYOUTS, TYPES, draw

EPS64 = 2.0**-52


def psd(r, rank, seed=0):
    C = torch.randn(r, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return C @ C.T


def expected(clients, S, transposed):
    """tr(X_i^T X_k S) of zero-padded factors, and the size of what is summed."""
    r = max(t.shape[int(not transposed)] for t in clients)
    tall = [t.double().T if transposed else t.double() for t in clients]
    X = torch.stack([torch.nn.functional.pad(t, (0, r - t.shape[1])) for t in tall])
    return torch.einsum("imr,kms,rs->ik", X, X, S), X


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("ranks", [[4], [4, 4, 4], [1, 3, 5], [8] * 20], ids=str)
@pytest.mark.parametrize("rank", [1, 8])
def test_traces_are_those_of_the_stored_values(dtype, ranks, rank):
    B, A = draw(ranks, [(70, 33), (9, 600)], dtype)
    S_B, S_A = [psd(max(ranks), rank)] * 2, [psd(max(ranks), rank, 1)] * 2
    left, right = factor_traces(B, A, S_B, S_A)
    for factors, S, got, transposed in ((B, S_B, left, False), (A, S_A, right, True)):
        for clients, s, H in zip(factors, S, got, strict=True):
            exact, X = expected(clients, s, transposed)
            assert H.dtype is torch.float64
            assert torch.equal(H, H.T)
            # norms in the metric bound every entry; sums of some thousand float64 terms
            size = X.square().sum((1, 2)).sqrt() * float(torch.linalg.matrix_norm(s, 2)) ** 0.5
            assert bool(((H - exact).abs() <= 1000 * EPS64 * size[:, None] * size).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_a_skipped_side(layout):
    B, A = draw([4, 8], [(40, 50)], torch.float32, layout=layout)
    S = [psd(8, 8)]
    left, right = factor_traces(B, A, S, S)
    assert torch.allclose(left[0], expected(B[0], S[0], False)[0], rtol=1e-12)
    only, nothing = factor_traces(B, None, S, None)
    assert nothing is None
    assert torch.equal(only[0], left[0])
    nothing, only = factor_traces(None, A, None, S)
    assert nothing is None
    assert torch.equal(only[0], right[0])


def test_bad_input_is_named():
    B, A = draw([4, 8], [(40, 50)], torch.float32)
    with pytest.raises(ValueError, match=r"S_B: expected float64 \(8, 8\), got \(4, 4\)"):
        factor_traces(B, None, [psd(4, 4)], None)
    with pytest.raises(ValueError, match="S_A: expected one matrix for every module of A"):
        factor_traces(None, A, None, [])
    with pytest.raises(ValueError, match="both None"):
        factor_traces(None, None, None, None)
