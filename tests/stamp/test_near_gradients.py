"""Gradients that all but agree: the rounding of their plain Gram matrix may be all that it says of their distances."""

import numpy as np
import pytest
import torch
from torch import nn

from fedgram import stamp
from fedgram_testing.gradient_families import duality, size


def drawn(K, d, seed):
    return torch.randn(K, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("spread", [1e-7, 1e-9, 1e-12])
@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("form", ["plain", "centred", "batched"])
def test_plain_matrices(spread, K, form):
    u = np.full(K, 1 / K)
    for seed in range(10):
        X = drawn(1, 3, seed) + spread * drawn(K, 3, seed + 100)
        given = stamp.Gramian.from_dense(X @ X.T) if form == "centred" else X @ X.T
        found = stamp.solve_dual(given, 0.5, method="batched" if form == "batched" else "exact")
        w, v = found.weights.numpy(), found.coefficients.numpy()
        upper, lower, outside = duality(X.numpy(), u, 0.5, w, v)
        assert found.status == "optimal"
        assert upper - lower <= 1e-9 * size(X.numpy(), u, 0.5, w > 0)
        assert abs(outside) <= 1e-9


@pytest.mark.parametrize("array", [False, True])
def test_a_plain_matrix_of_less_than_float64_stays_plain(array):
    for seed in range(20):
        X = drawn(1, 30, seed) + 5e-4 * drawn(20, 30, seed + 100)
        G = (X @ X.T).float()
        found = stamp.solve_dual(stamp.Gramian.from_dense(G.numpy() if array else G), 0.5)
        assert found.status == "optimal"


def test_a_gramian_that_knows_no_distance():
    found = stamp.solve_dual(stamp.Gramian(1.0, [1e-9, -1e-9], torch.zeros(2, 2)), 0.5)
    assert found.status == "optimal"
    assert found.weights.tolist() == [0, 1]


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-9])
@pytest.mark.parametrize("K", [2, 3])
def test_without_gradients_in_memory(spread, K):
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Linear(30, 20, bias=False).double()
        x, y = drawn(5, 30, seed), drawn(5, 20, seed + 100)
        found = stamp.ghost_match(model, loss, [(x + spread * drawn(5, 30, k), y) for k in range(K)], c=0.5)
        assert found.dual.status == "optimal"
        (mean,) = torch.autograd.grad(loss(model, (x, y)), model.weight)
        assert torch.allclose(model.weight.grad, 1.5 * mean, atol=1e-5 * float(mean.norm()))


class MostlyMaterialised(nn.Module):
    """A parameter of its own carries nearly all of the gradient, a linear layer a millionth of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 20, bias=False).double()
        self.shift = nn.Parameter(torch.zeros(50, dtype=torch.float64))

    def forward(self, batch):
        x, y = batch
        return 1e-6 * self.layer(x).square().mean() + (y * self.shift).sum()


@pytest.mark.filterwarnings("ignore:ghost_gramian. gradients are materialised")
def test_what_is_centred_before_it_is_multiplied_keeps_its_digits():
    torch.manual_seed(0)
    model, spread = MostlyMaterialised(), 1e-7
    x, y = torch.randn(2, 20, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    tasks = [(x + spread * torch.randn_like(x), y + spread * torch.randn_like(y)) for _ in range(3)]
    found = stamp.ghost_gramian(model, lambda model, batch: model(batch), tasks)
    rows = [torch.autograd.grad(model(batch), list(model.parameters())) for batch in tasks]
    X = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    H = (X - X.mean(0)) @ (X - X.mean(0)).T
    assert torch.allclose(found.H, H, rtol=0, atol=1e-6 * float(H.norm()))
