"""The optimum from a block Krylov space: total ranks above 512, with and without Grams."""

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import group as group_module
from fedgram.flora_na import svd

CLIENTS = 130


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def sharing_clients(own, dtype, m=240, n=280, together=0.0):
    """Three directions that all clients have, exactly but for ``together``, and one of each client's own."""
    g = torch.Generator().manual_seed(0)
    X, Y = orthonormal(m, CLIENTS + 3, g), orthonormal(n, CLIENTS + 3, g).T
    sizes = own * CLIENTS * torch.logspace(0, -1, CLIENTS, dtype=torch.float64)
    B = [torch.cat([X[:, :3], sizes[u] * X[:, 3 + u : 4 + u]], 1) for u in range(CLIENTS)]
    A = [torch.cat([Y[:3], Y[3 + u : 4 + u]]) for u in range(CLIENTS)]
    B = [b + together * torch.randn(b.shape, generator=g, dtype=torch.float64) for b in B]
    return [b.to(dtype) for b in B], [a.to(dtype) for a in A]


def optimum(B, A, rank):
    s = torch.linalg.svdvals(sum(b.double() @ a.double() for b, a in zip(B, A, strict=True)))
    return float(s[rank:].norm() / s.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("together", [0.0, 1e-8])
@pytest.mark.parametrize("formed", [True, False])
def test_rows_that_depend_on_each_other(dtype, together, formed, monkeypatch):
    """Three of every client's rows are all clients' rows: what is left of them is rounding, not a direction."""
    if not formed:
        monkeypatch.setattr(group_module, "forms_grams", lambda *_: False)
    for own in (0.03, 0.01):
        B, A = sharing_clients(own, dtype, together=together)
        e = flora_na.estimate(B, A, method="svd")
        assert e.rho == pytest.approx(optimum(B, A, 4), rel=1e-5)
        assert e.rho_optimal == pytest.approx(e.rho, rel=1e-5)
        assert e.status == "converged"
        assert e.sweeps < 20


@pytest.mark.parametrize("rank", [8, 16])
def test_small_singular_values_beside_large_ones(rank):
    """Clients near a common start: what a block adds is lost beside the images of what it holds already."""
    g = torch.Generator().manual_seed(1)

    def near(*shape):
        common = torch.randn(*shape, generator=g, dtype=torch.float64)
        return [common + 0.01 * torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(CLIENTS)]

    B, A = near(200, 4), near(4, 220)
    e, true = flora_na.estimate(B, A, method="svd", rank=rank), optimum(B, A, rank)
    assert 1e-6 < true < 1e-3
    assert e.rho == pytest.approx(true, rel=1e-3)
    assert e.sweeps < 15  # else the sweeps that a pair is given to have done the work


def test_a_space_that_promised_more_than_its_pair_has_is_not_believed(monkeypatch):
    B, A = sharing_clients(0.03, torch.float64)
    true = optimum(B, A, 4)
    monkeypatch.setattr("fedgram.flora_na.krylov._Space._added", lambda self, Y: (Y, self.group.apply("A", Y)))
    assert svd.SPECTRUM_RANK < 4 * CLIENTS
    assert flora_na.estimate(B, A, method="svd").rho == pytest.approx(true, rel=1e-2)
