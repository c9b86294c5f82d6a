"""A gradient far shorter than the others: its length is not lost in that of the mean, and nothing is claimed of it."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

from fedgram import stamp
from fedgram_testing.gradient_families import duality
from fedgram_testing.memories import OneTask

RATIOS = (1e2, 3e2, 1e3, 1e4, 1e6, 3e7, 1e9, 1e12)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def drawn(K, d, seed):
    return torch.randn(K, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def certified(X, c, dual, within=1e-9):
    """Whether the coefficients are as good as they say, judged from the gradients in extended precision."""
    X, u = X.double().numpy(), np.full(len(X), 1 / len(X))
    w, v = dual.weights.numpy(), dual.coefficients.numpy()
    upper, lower, outside = duality(X, u, c, w, v)
    assert dual.status == "optimal"
    assert upper - lower <= 1e-9 * size_of_active(X, u, c, w)
    assert abs(outside) <= within


def size_of_active(X, u, c, w):
    """As ``Dual.scale`` is documented: of the active tasks alone."""
    g0 = u @ X
    return float((np.abs(X @ g0) + c * np.linalg.norm(g0) * np.linalg.norm(X, axis=1))[w > 0].max())


@pytest.fixture
def reads(monkeypatch):
    """The number of reads of the gradients for a Gram matrix."""
    count = []
    module = importlib.import_module("fedgram.stamp.match")  # the package has a function of that name
    original = module.grad_gram
    monkeypatch.setattr(module, "grad_gram", lambda *a, **k: count.append(1) or original(*a, **k))
    return count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("K", [2, 3, 8, 64])
def test_one_short_gradient(K, ratio, dtype):
    X = drawn(K, 2 * K + 20, K)
    X[K // 2] /= ratio
    X = X.to(dtype)
    found = stamp.match(list(X), c=0.5)
    certified(X, 0.5, found.dual)
    assert torch.allclose(found.gramian.dense(), X.double() @ X.double().T, rtol=1e-9, atol=0)
    again = stamp.solve_dual(found.gramian, 0.5)
    assert torch.equal(again.coefficients, found.coefficients)
    best = stamp.solve_dual(X.double() @ X.double().T, 0.5)
    assert torch.allclose(found.coefficients, best.coefficients, rtol=1e-6)
    batched = stamp.solve_dual(found.gramian, 0.5, method="batched")
    certified(X, 0.5, batched)


@pytest.mark.parametrize("K", [5, 20, 64])
def test_norms_over_eight_decades(K):
    for seed in range(4):
        X = drawn(K, 300, seed) * 10 ** (8 * torch.rand(K, 1, generator=torch.Generator().manual_seed(seed)) - 4)
        certified(X, 0.25, stamp.match(list(X)).dual)


def test_norms_over_sixteen_decades_in_a_plane():
    for seed in range(40):  # the shortest, around which the Gram matrix is held, has no rounding: no warning of that
        X = drawn(4, 2, seed) * 10 ** (16 * torch.rand(4, 1, generator=torch.Generator().manual_seed(seed)) - 8)
        certified(X, 0.25, stamp.match(list(X)).dual)


def test_several_short_ones_of_different_lengths(reads):
    X = drawn(6, 50, 1) / torch.tensor([1, 1e12, 1, 1e6, 1e9, 1])[:, None]
    found = stamp.match(list(X), c=0.5)
    certified(X, 0.5, found.dual)
    assert torch.allclose(found.gramian.dense(), X @ X.T, rtol=1e-9, atol=0)
    assert len(reads) <= 4


def test_short_ones_with_a_common_part_keep_their_differences():
    """Around the shortest one, where a plain Gram matrix would drown them in what the short ones share."""
    common, noise = drawn(1, 40, 2), drawn(3, 40, 3)
    noise -= (noise @ common.T) / (common @ common.T) * common
    X = torch.cat([drawn(2, 40, 4), 1e-7 * (common + 1e-6 * noise)])
    H = noise @ noise.T
    found = stamp.gramian(list(X))
    D = found.H[2:, 2:]
    differences = D.diagonal()[:, None] + D.diagonal() - 2 * D
    expected = 1e-26 * (H.diagonal()[:, None] + H.diagonal() - 2 * H)
    assert torch.allclose(differences, expected, rtol=1e-6, atol=0)


def test_ordinary_gradients_are_read_once(reads):
    X = drawn(5, 100, 0)
    X[1] /= 100
    found = stamp.match(list(X))
    assert len(reads) == 1
    assert found.gramian.centre is None
    assert torch.allclose(found.gramian.n0, (X.mean(0) ** 2).sum())
    close = drawn(1, 100, 1) + 1e-4 * X
    stamp.match(list(close))
    assert len(reads) == 2


@pytest.mark.parametrize("precise", [True, False])
def test_a_zero_gradient_gives_the_plain_matrix(reads, precise):
    X = drawn(4, 30, 0).float()
    X[2] = 0
    found = stamp.gramian(list(X), [1, 2, 3, 4], precise=precise)
    assert len(reads) == 2
    assert found.centre.tolist() == [0, 0, 1, 0]
    assert found.weights.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert float(found.n0) == 0
    assert torch.allclose(found.dense(), X.double() @ X.double().T, rtol=1e-12)
    moved = found.to("cpu")
    assert torch.equal(moved.centre, found.centre)


@pytest.mark.parametrize("method", ["exact", "batched"])
@pytest.mark.parametrize("ratio", [2e3, 1e5, 1e7, 1e10, np.inf])
def test_around_the_mean_nothing_is_claimed_of_it(ratio, method):
    """As within a graph, where nobody can look and read once more."""
    X = drawn(3, 50, 0)
    X[2] /= ratio
    g0 = X.mean(0)
    gramian = stamp.Gramian(g0 @ g0, (X - g0) @ g0, (X - g0) @ (X - g0).T)
    assert stamp.solve_dual(gramian, 0.5, method=method).status == "inexact"
    assert stamp.solve_dual(gramian, 0.5, method=method).refine().status == "inexact"
    if method == "batched":
        batch = stamp.Gramian(*(part.expand(3, *part.shape) for part in (gramian.n0, gramian.h, gramian.H)))
        assert stamp.solve_dual(batch, 0.5, method=method).status == ("inexact",) * 3


@pytest.mark.parametrize("ratio", [1e2, 1e5, 1e9])
def test_what_is_called_degenerate_is(ratio):
    X = drawn(4, 50, 0)
    X[:2] /= ratio
    X[1] = -2 * X[0]
    opposing = stamp.match(list(X), c=0.5)
    assert opposing.status == "degenerate"
    assert float((X @ opposing.direction).min()) >= -1e-9 * float((X.mean(0) ** 2).sum())
    X[1] += 0.1 * drawn(1, 50, 1)[0] / ratio  # nearly: their sum is short and no zero
    certified(X, 0.5, stamp.match(list(X), c=0.5).dual, within=1e-7)


def test_written_into_parameters():
    X = drawn(3, 40, 0)
    X[2] /= 1e7
    p = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    stamp.match_(p, list(X), c=0.5)
    best = stamp.solve_dual(X @ X.T, 0.5).coefficients @ X
    assert torch.allclose(p.grad, best, rtol=1e-9)


def test_a_dense_matrix_is_centred_only_where_that_costs_no_digits():
    X = drawn(3, 40, 0)
    X[2] /= 1e7
    G = X @ X.T
    assert torch.equal(stamp.Gramian.from_dense(G).dense(), G)
    pair = stamp.Gramian.from_dense(torch.stack([G, torch.eye(3, dtype=torch.float64)]))
    assert pair.centre.tolist() == [[0, 0, 0], pytest.approx([1 / 3] * 3)]
    assert torch.equal(pair.dense()[0], G)
    assert float(pair.n0[1]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("ratio", [1e5, 1e7, 1e10])
def test_on_the_server(ratio):
    X = drawn(3, 50, 0)
    X[1] /= ratio
    u = np.array([0.2, 0.5, 0.3])
    old = drawn(1, 50, 1)[0] * 0
    by_states = stamp.SpatialMatcher({"w": old}, c=0.5).step([{"w": old + x} for x in X], u)
    by_deltas = stamp.SpatialMatcher({"w": old}, c=0.5).step_deltas([{"w": x} for x in X], u)
    best = stamp.solve_dual(X @ X.T, 0.5, u, rescale="mean").coefficients @ X
    for step in (by_states, by_deltas):
        assert step.dual.status == "optimal"
        assert torch.allclose(step.state["w"], best, rtol=1e-9)
        assert torch.allclose(step.gramian.dense(), X @ X.T, rtol=1e-9, atol=0)
        assert torch.equal(stamp.solve_dual(step.gramian, 0.5).weights, step.dual.weights)


def scaled_loss(model, batch):
    return batch[2] * nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("ratio", [1e6, 1e9])
def test_a_memorised_old_task(ratio):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).double()
    now, old = ((torch.randn(4, 6).double(), torch.randn(4, 2).double(), s) for s in (1.0, 1 / ratio))
    found = stamp.TemporalMatcher(model, scaled_loss, OneTask(old), c=0.5).step(now).match
    X = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(scaled_loss(model, b), tuple(model.parameters()))])
            for b in (now, old)
        ]
    )
    certified(X, 0.5, found.dual)


@pytest.mark.parametrize("ratio", [1e4, 1e7, 1e10])
@pytest.mark.parametrize("bias", [False, True])
def test_without_gradients_in_memory(ratio, bias):
    torch.manual_seed(0)
    model = nn.Linear(30, 20, bias=bias).double()  # a bias is materialised, the weight is not
    tasks = [(torch.randn(5, 30).double(), torch.randn(5, 20).double(), s) for s in (1.0, 1.0, 1 / ratio)]
    X = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(scaled_loss(model, b), tuple(model.parameters()))])
            for b in tasks
        ]
    )
    found = stamp.ghost_match(model, scaled_loss, tasks, c=0.5)
    certified(X, 0.5, found.dual)
    assert torch.allclose(found.gramian.dense(), X @ X.T, rtol=1e-8, atol=0)
