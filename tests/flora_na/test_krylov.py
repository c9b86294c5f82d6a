"""The optimum from a block Krylov space: total ranks above 512, with and without Grams."""

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import LoraLayer, svd
from fedgram.flora_na import group as group_module
from fedgram.flora_na.als import starting_rows
from fedgram.flora_na.energies import energies
from fedgram.flora_na.fedavg import solve_fedavg
from fedgram.flora_na.grouping import make_groups
from fedgram.flora_na.krylov import OVERSAMPLING, _Space
from fedgram.flora_na.target import make_target

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


def near_a_common_start(seed):
    g = torch.Generator().manual_seed(seed)

    def near(*shape):
        common = torch.randn(*shape, generator=g, dtype=torch.float64)
        return [common + 0.01 * torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(CLIENTS)]

    return near(200, 4), near(4, 220)


@pytest.mark.parametrize("seed", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [8, 16])
def test_small_singular_values_beside_large_ones(rank, seed):
    """Some are left out of the space as dependent ones: a space that has nothing to add is not all there is."""
    B, A = near_a_common_start(seed)
    e, true = flora_na.estimate(B, A, method="svd", rank=rank), optimum(B, A, rank)
    assert 1e-6 < true < 1e-3
    assert e.rho == pytest.approx(true, rel=1e-3)
    assert e.rho_optimal == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("seed", [2, 3])
def test_small_singular_values_in_a_module_beside_others(seed):
    """Whether a space has nothing to add is seen of all modules together: the others may have."""
    g = torch.Generator().manual_seed(seed)
    (B, A), other = near_a_common_start(seed), torch.randn(CLIENTS, 4, 420, generator=g, dtype=torch.float64)
    clients = [
        {"near": LoraLayer(A=a, B=b), "apart": LoraLayer(A=x[:, :220], B=x[:, 220:].T)}
        for b, a, x in zip(B, A, other, strict=True)
    ]
    true = optimum(B, A, 8)
    report = flora_na.aggregate(clients, method="svd", rank=8).report.modules["near"]
    assert report.rho == pytest.approx(true, rel=1e-3)
    assert report.rho_optimal == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("rows", [8, 40])
def test_a_space_of_all_rows_that_there_are_has_the_optimum(rows):
    """Of clients with one A, say: sweeps from there would end within their tolerance of it."""
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(rows, 220, generator=g, dtype=torch.float64)
    A = [torch.randn(8, rows, generator=g, dtype=torch.float64) @ basis for _ in range(CLIENTS)]
    A = [basis] * CLIENTS if rows == 8 else A
    B = [torch.randn(200, 8, generator=g, dtype=torch.float64) for _ in range(CLIENTS)]
    e, true = flora_na.estimate(B, A, method="svd", rank=4), optimum(B, A, 4)
    assert e.rho == pytest.approx(true, rel=1e-12)
    assert e.rho_optimal == pytest.approx(true, rel=1e-12)


@pytest.mark.parametrize(("rank", "bound"), [(8, 1.06), (16, 1.14)])
def test_the_space_finds_small_singular_values_beside_large_ones(rank, bound):
    """Unless what a block adds is lost beside the images of what it holds already: 1.09 and 1.23 are left then."""
    B, A = near_a_common_start(1)
    [(group, _)] = make_groups([make_target(B, A, torch.full((CLIENTS,), 1 / CLIENTS, dtype=torch.float64))])
    space, Y = _Space(group), starting_rows(group, solve_fedavg(group), rank + OVERSAMPLING)
    while Y.shape[-1]:
        Y = space.extend(Y)
    left = 1 - torch.linalg.eigvalsh(space.H)[:, -rank:].sum() / energies(group).sum()
    assert float(left) < bound * optimum(B, A, rank) ** 2


def test_a_space_that_promised_more_than_its_pair_has_is_not_believed(monkeypatch):
    B, A = sharing_clients(0.03, torch.float64)
    true = optimum(B, A, 4)
    monkeypatch.setattr("fedgram.flora_na.krylov._Space._added", lambda self, Y: (Y, self.group.apply("A", Y)))
    assert svd.SPECTRUM_RANK < 4 * CLIENTS
    assert flora_na.estimate(B, A, method="svd").rho == pytest.approx(true, rel=1e-2)
