"""Clients that iterations, gauges and narrow dtypes stumble over."""

import math

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import als, fedavg, scalar, svd
from fedgram.flora_na._compiled import SOLVER


def random_clients(count, seed, m=32, n=24, r=4):
    g = torch.Generator().manual_seed(seed)
    B = [torch.randn(m, r, generator=g) for _ in range(count)]
    return B, [torch.randn(r, n, generator=g) for _ in range(count)]


def regauged(B, A, c):
    """The same updates: one client splits his otherwise over the two factors, and from three on one the other way."""
    B, A = list(B), list(A)
    B[0], A[0] = B[0] * c, A[0] / c
    if len(B) > 2:
        B[1], A[1] = B[1] / c, A[1] * c
    return B, A


@pytest.fixture(params=["compiled", "general"])
def either_path(request, monkeypatch):
    if request.param == "general":
        compiled = [(fedavg, "certified_pair"), (scalar, "certified_pair"), (als, "certified_blocks")]
        for module, name in [*compiled, (svd, "certified_blocks"), (svd, "compiled_spectrum")]:
            monkeypatch.setattr(module, name, lambda *_, **__: None)


@pytest.mark.parametrize(("count", "seed"), [(3, 48), (8, 17), (2, 44), (2, 36)])
def test_flora_na_ends_in_one_place_however_a_client_splits_its_update(count, seed, either_path):
    """The first sweep gains ten thousand times ``||dW||^2``, beside which what the next one gains is nothing."""
    B, A = random_clients(count, seed)
    expected = flora_na.estimate(B, A, method="flora-na")
    for c in (1e2, 1e4, 1e5):
        found = flora_na.estimate(*regauged(B, A, c), method="flora-na")
        assert (found.status, found.rho) == ("converged", pytest.approx(expected.rho, rel=1e-6)), c


def test_flora_na_never_ends_above_the_zero_pair(either_path):
    """Newton's step is taken on trust: the last one must have been found good."""
    for count, c in ((2, 1e4), (3, 1e3), (8, 1e3)):
        rhos = [
            flora_na.estimate(*regauged(*random_clients(count, seed), c), method="flora-na").rho for seed in range(15)
        ]
        assert max(rhos) <= 1.0, (count, c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_client_comes_back_as_itself(dtype):
    for seed in range(20):
        B, A = random_clients(1, seed, r=8)
        B, A = [(7 * B[0]).to(dtype)], [(A[0] / 11).to(dtype)]
        e = flora_na.estimate(B, A, method="flora-na")
        assert e.rho <= 1e-15
        assert 0.5 <= float(e.B.double().norm() / e.A.double().norm()) <= 2


def test_als_leaves_the_span_of_one_client(either_path):
    """Clients that share no direction: the span of any one's rows is invariant."""
    eye, sizes = torch.eye(8), torch.tensor([1.0, 0.1])
    B, A = [eye[:, [0, 1]] * sizes, eye[:, [2, 3]] * sizes], [eye[[0, 1]], eye[[2, 3]]]
    for weights in ([1, 1], [3, 2]):
        e = flora_na.estimate(B, A, weights)
        assert e.rho == pytest.approx(e.rho_optimal, rel=1e-4)
        assert e.rho < 0.1
        modules = flora_na.estimate_modules([B], [A], weights)
        assert float(modules.rho) == pytest.approx(e.rho_optimal, rel=1e-4)


def test_als_is_balanced_where_the_product_has_lower_rank(either_path):
    """What is rounding of a singular value must not be divided by its root: float16 overflowed."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        left, right = torch.randn(24, 2, generator=g), torch.randn(2, 16, generator=g)
        mixes = [(torch.randn(2, 8, generator=g), torch.randn(8, 2, generator=g)) for _ in range(3)]
        B = [(3 * left @ a).half() for a, _ in mixes]
        A = [(b @ right).half() for _, b in mixes]
        e = flora_na.estimate(B, A)
        columns, rows = e.B.double().norm(dim=0), e.A.double().norm(dim=1)
        assert torch.allclose(columns, rows, rtol=2e-3, atol=1e-2), seed
        assert e.rho <= 2 * flora_na.estimate(B, A, method="svd").rho + 1e-4


@pytest.mark.skipif(SOLVER.missing is not None, reason="sweeps stop within their tolerance, from rows by position")
def test_als_above_the_clients_rank_does_not_see_their_order():
    B, A = random_clients(6, 0, 40, 30)
    found, other = (flora_na.estimate(b, a, rank=12) for b, a in ((B, A), (B[::-1], A[::-1])))
    assert float((found.B @ found.A - other.B @ other.A).norm()) <= 1e-5 * found.norm


def test_align_to_factors_beyond_the_clients_dtype():
    B, A = ([x.half() for x in side] for side in random_clients(3, 0))
    e = flora_na.estimate(B, A, align_to=(1e6 * B[0].float(), 1e6 * A[0].float()))
    assert bool(e.B.isfinite().all())
    assert float((e.B * B[0]).sum() + (e.A * A[0]).sum()) > 0


def test_a_residual_that_float32_has_not():
    """Half of the scaling to each factor is too much for B; the product is nothing special."""
    B, A = [torch.full((4, 1), 1e37)], [torch.full((1, 4), 1e-37)]
    e = flora_na.estimate(B, A, scalings=[2048.0])
    rest_B, rest_A = e.residual()
    assert rest_B.dtype == torch.float64
    assert float((rest_B @ rest_A).norm()) <= 1e-6 * e.norm


def test_yardsticks_of_a_zero_target_are_undefined():
    B, A = random_clients(1, 0)
    e = flora_na.estimate([B[0], -B[0]], [A[0], A[0]])
    assert e.status == "zero-target"
    assert all(math.isnan(rho) for rho in (e.rho, e.rho_fedavg, e.rho_optimal))


def test_weights_whose_sum_overflows():
    B, A = random_clients(2, 0)
    huge, even = (flora_na.estimate(B, A, w, method="fedavg") for w in ([1e308, 1e308], None))
    assert torch.equal(huge.B, even.B)


def test_inner_products_where_the_first_client_has_nothing():
    B, A = random_clients(1, 0)
    found = flora_na.client_gramian([{}, {"a": flora_na.LoraLayer(A=A[0], B=B[0])}], missing="zero")
    assert found[0].tolist() == [0.0, 0.0]
    assert float(found[1, 1]) == pytest.approx(float((B[0].double() @ A[0].double()).square().sum()))


@pytest.mark.parametrize(("rank", "total"), [(64, 128), (256, 320)])
@pytest.mark.parametrize("method", ["svd", "als"])
def test_many_singular_values_just_above_the_rounding_of_grams(rank, total, method, either_path):
    g = torch.Generator().manual_seed(0)
    n = total + 30
    left, right = (torch.linalg.qr(torch.randn(n, total, generator=g, dtype=torch.float64)).Q for _ in range(2))
    sizes = torch.full((total,), 1e-7, dtype=torch.float64)
    sizes[0], sizes[rank:] = 1, 1.5e-6 * torch.ones(total - rank, dtype=torch.float64) / math.sqrt(total - rank)
    sizes[1:rank] = sizes[1:rank].clamp_min(1.01 * float(sizes[rank]))
    e = flora_na.estimate([left * sizes.sqrt()], [(right * sizes.sqrt()).T], method=method, rank=rank)
    true = float(sizes[rank:].norm() / sizes.norm())
    assert e.rho == pytest.approx(true, rel=1e-3)
    assert e.rho_optimal == pytest.approx(true, rel=1e-3)


@pytest.mark.skipif(SOLVER.missing is not None, reason="the sweeps of all modules end together")
def test_a_module_in_doubt_leaves_the_others_bits_whatever_the_rank():
    modules = {f"m{seed}": random_clients(4, seed) for seed in range(4)}
    adapters = [
        {n: flora_na.LoraLayer(A=A[u], B=0 * B[u] if n == "m1" else B[u]) for n, (B, A) in modules.items()}
        for u in range(4)
    ]
    for method in ("als", "svd"):
        for rank in (None, 3, 4, 6):
            both = flora_na.aggregate(adapters, method=method, rank=rank).adapter.modules
            for name in ("m0", "m2", "m3"):
                [alone] = flora_na.aggregate(
                    [{name: a[name]} for a in adapters], method=method, rank=rank
                ).adapter.modules.values()
                assert torch.equal(both[name].B, alone.B), (method, rank, name)
                assert torch.equal(both[name].A, alone.A), (method, rank, name)


@pytest.mark.parametrize("method", ["als", "svd"])
def test_a_module_in_doubt_leaves_the_others_bits_at_ranks_of_their_own(method):
    modules = {f"m{seed}": random_clients(4, seed) for seed in range(6)}
    modules["m1"][1][1] = modules["m1"][1][0]  # two clients with one A: their Gram is singular
    adapters = [{n: flora_na.LoraLayer(A=A[u], B=B[u]) for n, (B, A) in modules.items()} for u in range(4)]
    both = flora_na.aggregate(adapters, method=method, rank="auto:0.6").adapter.modules
    beside = [name for name in modules if name != "m1" and both[name].rank == both["m1"].rank]
    assert beside
    for name in beside:
        of_one = [{name: a[name]} for a in adapters]
        [alone] = flora_na.aggregate(of_one, method=method, rank="auto:0.6").adapter.modules.values()
        assert torch.equal(both[name].B, alone.B)
        assert torch.equal(both[name].A, alone.A)


@pytest.mark.parametrize("clients", [6, 12, 20])
@pytest.mark.parametrize("shared", [False, True])
def test_flora_na_of_alike_updates_split_unevenly_is_no_worse_than_a_half_step(clients, shared):
    """Normal equations are singular to rounding there, and what is left of the error is rounding."""
    g = torch.Generator().manual_seed(0)
    C, D = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((30, 4), (4, 40)))
    split = [2.0 ** (8 * (2 * ((7 * u) % clients) / (clients - 1) - 1)) for u in range(clients)]
    B = [(C + 1e-6 * torch.randn(C.shape, generator=g, dtype=torch.float64)) * c for c in split]
    A = [(D + 1e-6 * torch.randn(D.shape, generator=g, dtype=torch.float64)) / c for c in split]
    layers = [
        {"a": flora_na.LoraLayer(A=a, B=b), "b": flora_na.LoraLayer(A=2 * a[:3], B=b[:, :3])}
        for a, b in zip(A, B, strict=True)
    ]
    found = flora_na.aggregate(layers, method="flora-na", shared=shared)
    for name, layer in found.adapter.modules.items():
        update = sum(own[name].delta() for own in layers) / clients
        truth = float((update - layer.B @ layer.A).norm() / update.norm())
        assert found.report.modules[name].rho == pytest.approx(truth, rel=1e-3, abs=1e-12)
        assert truth < 1e-6
        assert found.report.modules[name].status == "converged"


def test_flora_na_says_where_the_grams_hold_nothing_to_go_by():
    """What is left of clients that cancel is below the rounding of their Grams."""
    g = torch.Generator().manual_seed(0)
    C, A = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((30, 4), (4, 40)))
    B = [C, *(-C / 3 + 1e-9 * torch.randn(C.shape, generator=g, dtype=torch.float64) for _ in range(3))]
    near = [A + 1e-9 * torch.randn(A.shape, generator=g, dtype=torch.float64) for _ in B]
    e = flora_na.estimate(B, near, method="flora-na")
    assert e.status == "unresolved"
    assert e.rho <= e.rho_fedavg
    assert flora_na.estimate(B[:1], near[:1], method="flora-na").status == "converged"


@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als"])
@pytest.mark.parametrize("e", [1e-6, 1e-8, 1e-10])
def test_clients_that_cancel_are_cut_to_the_best_pair_of_a_smaller_rank(method, e):
    """Their Grams hold the average's singular values squared, below the rounding of what cancels."""
    g = torch.Generator().manual_seed(0)
    C, A = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((30, 6), (6, 40)))
    B = [(1 + e) * C, -C]
    found = flora_na.estimate(B, [A, A.clone()], method=method, rank=3)
    sigma = torch.linalg.svdvals((B[0] + B[1]) @ A)
    best = float(sigma[3:].norm() / sigma.norm())
    assert found.rho == pytest.approx(best, rel=1e-5)
    assert found.rho_fedavg == pytest.approx(best, rel=1e-5)
