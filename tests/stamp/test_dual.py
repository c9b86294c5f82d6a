"""The dual on hard families, judged from the gradients in extended precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls

from fedgram.stamp import Gramian, solve_dual
from fedgram.stamp.gramian import normalised_weights
from fedgram_testing.gradient_families import FAMILIES, duality, gradients, size

# A Gram matrix in float64 knows <g_k, g_l> to eps ||g_k|| ||g_l||, and sums of K of them: 1e-9 leaves five digits.
TOLERANCE = 1e-9
STRENGTHS = (0.05, 0.25, 0.5, 0.9)


def weights_of(K, seed):
    return np.full(K, 1 / K) if seed % 2 == 0 else np.random.default_rng(seed).dirichlet(np.ones(K) * 2)


def centred(X, u):
    g0 = u @ X
    E = X - g0
    return Gramian(torch.tensor(g0 @ g0), torch.from_numpy(E @ g0), torch.from_numpy(E @ E.T))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_gramian_comes_over_in_one_piece(batch):
    whole = Gramian(torch.rand(batch), torch.rand(*batch, 4), torch.rand(*batch, 4, 4), torch.full((4,), 0.25))
    moved = whole.cpu()
    for name in ("n0", "h", "H", "weights"):
        assert torch.equal(getattr(moved, name), getattr(whole, name))
        assert getattr(moved, name).shape == getattr(whole, name).shape


def judge(X, u, c, dual):
    """Feasible on both sides, and the sides meet."""
    w, v = dual.weights.numpy(), dual.coefficients.numpy()
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1, abs=1e-12)
    upper, lower, outside = duality(X, u, c, w, v)
    scale = size(X, u, c, (w > 0) | (v != u))
    assert outside <= 1e-7
    if dual.status == "degenerate":
        # g_w = 0 is known to sqrt(eps) of the lengths it is made of; then the value is 0 and d must reach it.
        reach = w @ np.linalg.norm(X, axis=1)
        assert np.linalg.norm(w @ X) <= 1.1e-7 * max(reach, np.linalg.norm(u @ X))
        assert dual.objective == 0
        upper = 0.0
    assert upper - lower <= TOLERANCE * scale
    assert dual.objective == pytest.approx(upper, abs=TOLERANCE * scale)
    assert 0 <= dual.gap <= TOLERANCE * dual.scale
    assert dual.scale <= scale * (1 + 1e-6)


@pytest.mark.parametrize("K", [1, 2, 3, 8, 32, 128, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_solved_to_rounding(family, K):
    for seed in range(8 if K <= 32 else 1):
        X, u, c = gradients(family, K, seed), weights_of(K, seed), STRENGTHS[seed % 4]
        G = X @ X.T
        dual = solve_dual(G, c, u)
        if dual.status == "stationary":
            assert np.linalg.norm(u @ X) <= 1e-7 * (u @ np.linalg.norm(X, axis=1))
            assert torch.allclose(dual.coefficients, torch.from_numpy(u), rtol=1e-15)
            continue
        judge(X, u, c, dual)


@pytest.mark.parametrize("K", [2, 3, 8, 32, 128])
@pytest.mark.parametrize("family", ["random", "common part", "common part, small spread", "opposing pair", "a zero"])
def test_a_centred_gramian_gives_the_same(family, K):
    for seed in range(4):
        X, u, c = gradients(family, K, seed), weights_of(K, seed), STRENGTHS[seed % 4]
        judge(X, u, c, solve_dual(centred(X, u), c, u))


def test_k_1024():
    X, u = gradients("random", 1024, 0), np.full(1024, 1 / 1024)
    judge(X, u, 0.4, solve_dual(X @ X.T, 0.4))


def test_a_centred_gramian_keeps_the_digits_of_a_small_spread():
    # In a plain matrix a spread of 1e-9 leaves 1e-18 of G, below its rounding; centred, the weights are right to what
    # float64 differences of the gradients carry: eps / 1e-9 = 2e-7, times the condition of the noise (about 10).
    K, rng = 8, np.random.default_rng(0)
    common, E = rng.standard_normal(500), rng.standard_normal((8, 500)) * rng.uniform(0.5, 2, (8, 1))
    E -= np.outer(E @ common, common) / (common @ common)
    E -= E.mean(0)
    n, H = common @ common, E @ E.T

    def weights(spread):
        gramian = Gramian(torch.tensor(n), torch.zeros(K), torch.from_numpy(spread**2 * H))
        return solve_dual(gramian, 0.5).weights

    # To first order in the spread the objective is s w'Hw / (2 sqrt(n)): the limit is the least-norm point of the hull.
    best = weights(1e-3)
    assert torch.allclose(weights(1e-9), best, atol=1e-5)
    assert torch.allclose(weights(1e-6), best, atol=1e-5)
    assert best.max() < 0.6
    H_w = torch.from_numpy(H) @ weights(1e-9)
    support = weights(1e-9) > 0
    assert float((H_w[support] - H_w.min()).abs().max()) <= 1e-8 * float(H_w.abs().max() + torch.from_numpy(H).max())


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_general_solver(K, seed):
    X, u, c = gradients("random", K, seed + 100), weights_of(K, seed), STRENGTHS[seed]
    g0 = u @ X
    s = c * np.linalg.norm(g0)

    def f(w):
        return (w @ X) @ g0 + s * np.linalg.norm(w @ X)

    def slope(w):
        return X @ g0 + s * (X @ (w @ X)) / np.linalg.norm(w @ X)

    found = minimize(
        f, np.full(K, 1 / K), jac=slope, bounds=[(0, 1)] * K, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(K)},
    )  # fmt: skip
    dual = solve_dual(X @ X.T, c, u)
    assert dual.objective <= found.fun + 1e-12 * size(X, u, c, u >= 0)
    assert dual.objective == pytest.approx(found.fun, abs=1e-7 * size(X, u, c, u >= 0))
    rng = np.random.default_rng(seed)
    assert all(f(w) >= dual.objective - 1e-12 * abs(dual.objective) for w in rng.dirichlet(np.ones(K), 200))


@pytest.mark.parametrize("family", ["opposing pair", "a zero", "many zeros"])
@pytest.mark.parametrize("K", [3, 8, 32, 128])
def test_degenerate_directions_are_projections_on_the_cone(family, K):
    seen = 0
    for seed in range(12 if K < 128 else 2):
        X, u, c = gradients(family, K, seed), weights_of(K, seed), 0.9
        dual = solve_dual(X @ X.T, c, u)
        if dual.status != "degenerate":
            continue
        seen += 1
        g0 = u @ X
        x, _ = nnls(X.T, -g0, maxiter=50 * K)  # Moreau: g0 + X'x with the best x >= 0 is the projection
        expected = g0 + x @ X
        d = dual.coefficients.numpy() @ X
        assert np.linalg.norm(d - expected) <= 1e-7 * np.linalg.norm(g0)
        assert np.linalg.norm(d) >= (1 - c) * np.linalg.norm(g0) * (1 - 1e-9)  # never a silent zero
        assert (X @ d).min() >= -1e-9 * np.linalg.norm(X, axis=1).max() * np.linalg.norm(g0)
    assert seen


def test_one_gradient_is_lengthened_by_c():
    dual = solve_dual(torch.tensor([[4.0]]), 0.25)
    assert dual.weights.tolist() == [1.0]
    assert dual.coefficients.tolist() == [1.25]
    assert dual.objective == pytest.approx(5.0)
    assert (dual.gap, dual.status) == (0.0, "optimal")


def test_two_gradients_by_hand():
    # Orthogonal, lengths 1 and 2, c = 0.6: g0 = (1/2, 1); minimise w1/2 + 2 w2 + s sqrt(w1^2 + 4 w2^2) on a fine grid.
    s = 0.6 * np.sqrt(0.25 + 1)
    w1 = np.linspace(0, 1, 2_000_001)
    f = 0.5 * w1 + 2 * (1 - w1) + s * np.sqrt(w1**2 + 4 * (1 - w1) ** 2)
    dual = solve_dual(np.diag([1.0, 4.0]), 0.6)
    assert dual.objective == pytest.approx(f.min(), abs=1e-12)
    assert float(dual.weights[0]) == pytest.approx(w1[f.argmin()], abs=1e-5)


@pytest.mark.parametrize("K", [1, 3, 8])
def test_zero_mean_is_stationary(K):
    X = np.zeros((K, 5)) if K != 8 else np.concatenate([np.eye(4, 5), -np.eye(4, 5)])
    dual = solve_dual(X @ X.T, 0.5)
    assert dual.status == "stationary"
    assert dual.coefficients.tolist() == [1 / K] * K
    assert (dual.objective, dual.gap, dual.relative_gap) == (0.0, 0.0, 0.0)


def test_no_strength_is_the_mean():
    X, u = gradients("random", 6, 3), weights_of(6, 1)
    dual = solve_dual(X @ X.T, 0.0, u)
    assert dual.status == "mean"
    assert torch.equal(dual.coefficients, torch.from_numpy(normalised_weights(u, 6)))
    assert dual.objective == pytest.approx((X @ (u @ X)).min())
    assert dual.gap == 0


@pytest.mark.parametrize("K", [1, 2, 7, 40])
@pytest.mark.parametrize("method", ["exact", "batched"])
def test_gradients_that_agree_give_their_mean_to_the_last_bit(K, method):
    u = weights_of(K, 1)
    G = np.full((K, K), 3.7)
    dual = solve_dual(G, 0.3, u, rescale="mean", method=method)
    assert torch.equal(dual.coefficients, torch.from_numpy(normalised_weights(u, K)))
    assert dual.status == "optimal"


def test_rescaling():
    X = gradients("random", 5, 0)
    plain = solve_dual(X @ X.T, 0.5).coefficients
    assert torch.allclose(solve_dual(X @ X.T, 0.5, rescale=True).coefficients, plain / 1.25, rtol=1e-15)
    assert torch.allclose(solve_dual(X @ X.T, 0.5, rescale="authors").coefficients, plain / 1.25, rtol=1e-15)
    assert torch.allclose(solve_dual(X @ X.T, 0.5, rescale="mean").coefficients, plain / 1.5, rtol=1e-14)


@settings(max_examples=40, deadline=None)
@given(K=st.integers(2, 12), seed=st.integers(0, 10**6), c=st.floats(0.01, 0.99), power=st.integers(-15, 15))
def test_order_and_units_do_not_matter(K, seed, c, power):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((K, 7))
    u, order = rng.dirichlet(np.ones(K)), rng.permutation(K)
    one = solve_dual(X @ X.T, c, u)
    other = solve_dual((X[order] @ X[order].T) * 100.0**power, c, u[order])
    # The objective is unique; with K > 7 gradients in 7 dimensions the weights are not. sqrt of a gap of 1e-15 in d.
    assert other.objective / 100.0**power == pytest.approx(one.objective, abs=1e-10 * one.scale)
    d, e = one.coefficients.numpy() @ X, other.coefficients.numpy() @ X[order]
    if one.status == other.status == "optimal":
        assert np.linalg.norm(d - e) <= 1e-5 * np.linalg.norm(d)


def test_the_same_bits_on_every_run():
    X = gradients("random", 40, 5)
    first, second = (solve_dual(X @ X.T, 0.4) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.coefficients, second.coefficients)


@pytest.mark.parametrize("method", ["exact", "batched"])
def test_the_mean_rescaling_divides_by_what_was_added(method):
    """A degenerate answer may stay within the ball around the mean gradient; the ordinary one lies on its border."""
    X = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    g0 = X.mean(0)
    for c in (0.9, 0.2):
        plain, mean = (solve_dual(X @ X.T, c, rescale=how, method=method) for how in (False, "mean"))
        added = float((plain.coefficients @ X - g0).norm() / g0.norm())
        assert plain.status == ("degenerate" if c == 0.9 else plain.status)
        assert added < 0.89 if c == 0.9 else added == pytest.approx(c)
        assert torch.allclose(mean.coefficients, plain.coefficients / (1 + added), rtol=1e-9)
