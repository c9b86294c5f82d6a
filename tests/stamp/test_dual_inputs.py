"""Bad input to the dual: one clear error each."""

import numpy as np
import pytest
import torch

from fedgram.stamp import Gramian, solve_dual

EYE = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize("c", [-0.1, 1.0, 2, float("nan"), "strong", None])
def test_c_out_of_range(c):
    with pytest.raises(ValueError, match=r"^c: expected"):
        solve_dual(EYE, c)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(0, 0), "K is 0"),
        (torch.zeros(0, 2, 2), "the batch has no matrix"),
        (torch.zeros(2, 3), r"expected \(K, K\) or \(batch, K, K\), got \(2, 3\)"),
        (torch.zeros(3), r"got \(3,\)"),
        (torch.zeros(2, 2, 2, 2), "expected"),
        (torch.zeros(2, 2, dtype=torch.complex64), "real"),
        ("abc", "expected a matrix"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), r"not symmetric: entries \(0, 1\) and \(1, 0\) are 0.5 and 0.4"),
        (torch.tensor([[1.0, 1.2], [1.2, 1.0]]), "indefinite: its smallest eigenvalue.* is -0.2"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), r"entry \(1, 1\) is -1"),
        (torch.tensor([[1.0, 0.0], [0.0, float("nan")]]), "squared norm of gradient 1 is nan"),
        (torch.tensor([[1.0, float("inf")], [float("inf"), float("inf")]]), "squared norm of gradient 1 is inf"),
    ],
)
def test_bad_matrices(matrix, message):
    with pytest.raises(ValueError, match=message):
        solve_dual(matrix, 0.5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"weights: expected 3 numbers, one per gradient, got shape \(2,\)"),
        ([1, -2, 3], "weights: entry 1 is -2"),
        ([1, float("inf"), 3], "weights: entry 1 is inf"),
        ([0, 0, 0], "weights: all are zero"),
        (["a", "b", "c"], "weights: expected 3 numbers"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        solve_dual(EYE, 0.5, weights)


def test_bad_options():
    with pytest.raises(ValueError, match="rescale: expected"):
        solve_dual(EYE, 0.5, rescale="yes")
    with pytest.raises(ValueError, match="method: expected"):
        solve_dual(EYE, 0.5, method="fast")


@pytest.mark.parametrize(
    "weights", [[1.0, 1, 1], [1.5, -0.5, 0], [float("nan"), 1, 0], torch.zeros(3), "abc", [1j, 1, 0], [[0.5, 0.5]]]
)
def test_weights_of_a_gramian_are_shares(weights):
    with pytest.raises(ValueError, match="gramian: weights"):
        Gramian(torch.tensor(1.0), torch.zeros(3), EYE, weights)
    listed = Gramian(torch.tensor(1.0), torch.zeros(3), EYE, [0.5, 0.25, 0.25])
    assert torch.equal(listed.weights, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    assert solve_dual(listed, 0.5).status == "optimal"


@pytest.mark.parametrize("weights", [torch.tensor([1j, 1, 1]), [1j, 1, 1], [[1, 2], [1]], "ab"])
@pytest.mark.parametrize("batch", [False, True])
def test_weights_that_are_no_numbers(weights, batch):
    with pytest.raises(ValueError, match="weights: expected"):
        solve_dual(EYE.expand(2, 3, 3) if batch else EYE, 0.5, weights)


def test_a_bad_matrix_of_a_batch():
    batch = torch.stack([EYE, -EYE])
    with pytest.raises(ValueError, match="a squared norm is not negative"):
        solve_dual(batch, 0.5)
    with pytest.raises(ValueError, match="one row for each of 2"):
        solve_dual(EYE.expand(2, 3, 3), 0.5, np.ones((3, 3)))


def test_gramian_parts_that_do_not_belong_together():
    with pytest.raises(ValueError, match="do not belong together"):
        Gramian(torch.tensor(1.0), torch.zeros(3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"expected \(K, K\)"):
        Gramian.from_dense(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"gramian: weights \(2,\) do not belong to 3 gradients"):
        Gramian(torch.tensor(1.0), torch.zeros(3), EYE, torch.ones(2))
    with pytest.raises(ValueError, match=r"gramian: centre \(2,\) do not belong to 3 gradients"):
        Gramian(torch.tensor(1.0), torch.zeros(3), EYE, None, torch.ones(2))
    batch = Gramian(torch.ones(2), torch.zeros(2, 3), EYE.expand(2, 3, 3), torch.full((3,), 1 / 3))
    assert solve_dual(batch, 0.5).weights.shape == (2, 3)


@pytest.mark.parametrize(
    ("n0", "h", "H", "message"),
    [
        (-1.0, [0.0, 0.0], [1.0, 1.0], "n0 is -1; a squared norm is not negative"),
        (1.0, [3.0, 3.0], [0.01, 0.01], "n0, h and H together are indefinite"),  # against Cauchy and Schwarz
        (1.0, [0.9, 0.9], [1.0, 1.0], "n0, h and H together are indefinite"),  # each alone is possible
        (0.0, [0.1, 0.1], [1.0, 1.0], "n0, h and H together are indefinite"),
    ],
)
def test_a_centre_that_no_vectors_have(n0, h, H, message):
    gramian = Gramian(torch.tensor(n0), torch.tensor(h), torch.diag(torch.tensor(H)))
    with pytest.raises(ValueError, match=message):
        solve_dual(gramian, 0.5)
    with pytest.raises(ValueError, match=message):
        solve_dual(gramian, 0.5, method="batched")


def test_centres_of_rounded_sums_are_welcome():
    # Float32 sums beside a large mean: h is off by 1e-7 of n0, far more than the e_k are long.
    h = torch.tensor([2e-7, -1e-7, -1e-7])
    assert solve_dual(Gramian(torch.tensor(1.0), h, 1e-18 * EYE), 0.5).status == "optimal"


def test_weights_of_every_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.int32):
        assert solve_dual(EYE, 0.0, torch.tensor([1, 2, 1], dtype=dtype)).coefficients.tolist() == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("method", ["exact", "batched"])
@pytest.mark.parametrize("factor", [1e-305, 1e-200, 1e-90, 1e90, 1e200, 1e305])
def test_huge_and_tiny_gram_matrices_are_solved_as_others_are(factor, method):
    X = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    G = X @ X.T
    plain, found = (solve_dual(matrix, 0.4, method=method) for matrix in (G, factor * G))
    torch.testing.assert_close(found.coefficients, plain.coefficients, rtol=1e-9, atol=1e-9)
    assert found.objective == pytest.approx(factor * plain.objective, rel=1e-12)
    assert found.status == "optimal"
    assert found.gap <= 1e-9 * found.scale
    centred = Gramian.from_dense(G)
    scaled = Gramian(factor * centred.n0, factor * centred.h, factor * centred.H)
    torch.testing.assert_close(
        solve_dual(scaled, 0.4, method=method).coefficients, plain.coefficients, rtol=1e-9, atol=1e-9
    )


def test_the_largest_numbers_overflow_nothing():
    assert solve_dual(1e308 * torch.eye(2, dtype=torch.float64), 0.5).coefficients.tolist() == [0.75, 0.75]


@pytest.mark.parametrize("method", ["exact", "batched"])
def test_a_matrix_on_the_cpu_is_solved_there_whatever_the_default_device(method):
    X = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X = torch.stack([*X, -X[0], -X[1]])  # opposed gradients: the projection on the cone is asked for too
    for G in (X[:4] @ X[:4].T, X @ X.T):
        expected = solve_dual(G, 0.5, [4, 3, 2, 1, 1, 1][: len(G)], method=method)
        with torch.device("meta"):
            found = solve_dual(G, 0.5, [4, 3, 2, 1, 1, 1][: len(G)], method=method)
        assert torch.equal(found.coefficients, expected.coefficients)
        assert found.status == expected.status


def test_huge_and_tiny_weights_are_normalised():
    for factor in (1e-300, 1.0, 1e300):
        dual = solve_dual(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 0.0, [factor, 2 * factor, factor])
        assert dual.coefficients.tolist() == [0.25, 0.5, 0.25]


def test_gramian_goes_to_dense_and_back():
    X = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    G = X @ X.T
    gramian = Gramian.from_dense(G, [1, 2, 3, 4])
    assert torch.allclose(gramian.dense(), G, atol=1e-12)
    g0 = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64) / 10 @ X
    assert torch.allclose(gramian.n0, g0 @ g0)
    assert torch.allclose(gramian.h, (X - g0) @ g0)
    # Without weights of its own, the dual is solved for those the Gramian is centred at.
    assert torch.allclose(solve_dual(gramian, 0.3).weights, solve_dual(G, 0.3, [1, 2, 3, 4]).weights, atol=1e-9)


def test_a_gramian_may_be_solved_for_other_weights_than_its_centre():
    X = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = [5, 1, 1, 2, 1]
    moved = solve_dual(Gramian.from_dense(X @ X.T), 0.4, u)
    plain = solve_dual(X @ X.T, 0.4, u)
    assert torch.allclose(moved.coefficients, plain.coefficients, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_gram_matrices_are_welcome(dtype):
    X = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    dual = solve_dual((X @ X.T).to(dtype), 0.3)
    assert dual.weights.dtype == torch.float64
    assert dual.status == "optimal"
