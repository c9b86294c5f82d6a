"""``estimate_modules``: what ``estimate`` finds, with nothing looked at on the way."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedgram import flora_na, kernels
from fedgram.flora_na import _batched_group, _batched_solvers, batched
from fedgram.flora_na.batched import estimate_modules
from fedgram_testing.factor_ops import BACKENDS

METHODS = ("fedavg", "flora-na", "als")


def factors(ranks, shapes, *, noise=1.0, dtype=torch.float32, seed=0):
    """Clients around a common adapter."""
    g = torch.Generator().manual_seed(seed)

    def clients(*full, dim):
        common = torch.randn(*full, generator=g, dtype=torch.float64)
        return [
            (common + noise * torch.randn(*full, generator=g, dtype=torch.float64))
            .narrow(dim, 0, r)
            .contiguous()
            .to(dtype)
            for r in ranks
        ]

    top = max(ranks)
    return [clients(m, top, dim=1) for m, _ in shapes], [clients(top, n, dim=0) for _, n in shapes]


@pytest.fixture(params=["formed", "implicit"])
def regime(request, monkeypatch):
    if request.param == "implicit":
        monkeypatch.setattr(batched, "GRAM_RANK_LIMIT", 0)
        monkeypatch.setattr(_batched_group, "PORTION_BYTES", 1)  # one module at a time
    return request.param


SHAPES = [(40, 30), (25, 50), (33, 33)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 3, 1)])
def test_the_estimates_are_those_of_estimate(method, ranks, regime):
    """Two ways to the same minimum: rho agrees to what the stopping rules leave open (1e-6 of the squared error)."""
    B, A = factors(ranks, SHAPES, dtype=torch.float64)
    weights = torch.tensor([8.0, 1, 1, 2][: len(ranks)], dtype=torch.float64)
    scalings = torch.tensor([2.0, -1, 0.5, 1][: len(ranks)], dtype=torch.float64)
    found = estimate_modules(B, A, weights, scalings, method=method, sweeps=60)
    for l, (b, a) in enumerate(zip(B, A, strict=True)):
        truth = flora_na.estimate(b, a, weights, scalings, method=method)
        dense = sum(w * s * y @ x for w, s, y, x in zip(weights / weights.sum(), scalings, b, a, strict=True))
        rho = torch.linalg.norm(dense - found.B[l] @ found.A[l]) / torch.linalg.norm(dense)
        # conjugate gradients stop short of the exact half-step
        slack = 1e-3 if regime == "implicit" and method != "fedavg" else 1e-5
        assert float(rho) <= truth.rho * (1 + slack)
        torch.testing.assert_close(found.rho[l], rho, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.norm[l], torch.linalg.norm(dense), rtol=1e-12, atol=0)
    assert bool(found.certain.all())
    assert bool(found.converged.all())


def test_without_float64_products_the_cpu_gives_the_same(regime):
    """On a CPU all products are float64: ``precise`` only says what a GPU multiplies in."""
    B, A = factors((3, 4, 2), SHAPES)
    for one, other in zip(estimate_modules(B, A), estimate_modules(B, A, precise=False), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_ladder_holds_module_by_module(regime):
    B, A = factors((3, 4, 2), SHAPES)
    w = torch.tensor([5.0, 1, 1])
    fedavg, scalar, als = (estimate_modules(B, A, w, method=m).rho for m in METHODS)
    assert bool((scalar <= fedavg * (1 + 1e-6)).all())
    assert bool((als <= scalar * (1 + 1e-6)).all())
    few, more = (estimate_modules(B, A, w, sweeps=n).rho for n in (1, 6))
    assert bool((more <= few * (1 + 1e-6)).all())


def test_a_module_does_not_feel_its_neighbours():
    """Each stops by itself: alone or among modules that take longer, the same bits up to the batched products'."""
    B, A = factors((4, 4, 4), SHAPES, noise=0.2)
    hard_B, hard_A = factors((4, 4, 4), SHAPES, noise=5.0, seed=1)
    alone = estimate_modules(B, A)
    among = estimate_modules(B + hard_B, A + hard_A)
    assert int(alone.sweeps.max()) < int(among.sweeps[3:].max())
    assert torch.equal(alone.sweeps, among.sweeps[:3])
    for x, y in zip(alone.B + alone.A, among.B[:3] + among.A[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_too_few_sweeps_are_told():
    B, A = factors((4, 4, 4), SHAPES, noise=5.0)
    found = estimate_modules(B, A, sweeps=1)
    assert found.sweeps.tolist() == [1, 1, 1]
    assert not bool(found.converged.any())


def test_a_zero_target_keeps_the_averaged_factors():
    B, A = factors((3, 3), SHAPES[:2])
    for b in B[1]:
        b.zero_()
    for method in METHODS:
        found = estimate_modules(B, A, method=method)
        torch.testing.assert_close(found.A[1], sum(A[1]) / 2)
        assert not bool(found.B[1].any())
        assert bool(found.rho[1].isnan())
        assert float(found.norm[1]) == 0
        assert not bool(found.certain[1])
        assert bool(found.rho[0].isfinite())


@pytest.mark.parametrize("method", METHODS)
def test_identical_clients_come_back_and_are_not_certain(method):
    """rho is rounding then: its square lies far below that of the Grams, and that is said."""
    B, A = factors((4, 4, 4), SHAPES, noise=0.0)
    found = estimate_modules(B, A, method=method)
    assert not bool(found.certain.any())
    for l in range(3):
        torch.testing.assert_close(found.B[l] @ found.A[l], B[l][0] @ A[l][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["flora-na", "als"])
def test_clients_that_are_multiples_of_one_leave_no_error(method, regime):
    """One direction of p says all, the others nothing but rounding."""
    [[b]], [[a]] = factors((4,), [(40, 30)], dtype=torch.float64)
    B, A = [b * (1 + u / 20) for u in range(20)], [a * (3 - u / 10) for u in range(20)]
    found = estimate_modules([B], [A], torch.arange(1, 21), method=method)
    dense = sum((1 + u) / 210 * y @ x for u, (y, x) in enumerate(zip(B, A, strict=True)))
    torch.testing.assert_close(found.B[0] @ found.A[0], dense, rtol=1e-9, atol=1e-9)
    assert bool(found.converged.all())


@settings(max_examples=25, deadline=None)
@example([0, 2, 4], 8, [0.0, 1.0, 1.0, 0.0], 1.0)  # more columns than dimensions: some are rounding
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    st.integers(1, 9),
    st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=4, max_size=4),
    st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_any_ranks_weights_and_noise_give_finite_factors_no_worse_than_the_average(ranks, rank, weights, noise):
    w = torch.tensor(weights[: len(ranks)])
    w[0] += 1
    B, A = factors(ranks, [(6, 5), (1, 7)], noise=noise)
    found = estimate_modules(B, A, w, rank=rank, sweeps=8)
    average = estimate_modules(B, A, w, method="fedavg")
    for l, (m, n) in enumerate([(6, 5), (1, 7)]):
        assert found.B[l].shape == (m, rank)
        assert found.A[l].shape == (rank, n)
        dense = sum(x * y.double() @ z.double() for x, y, z in zip((w / w.sum()).double(), B[l], A[l], strict=True))
        errors = [float(torch.linalg.norm(dense - e.B[l].double() @ e.A[l].double())) for e in (found, average)]
        assert errors[0] <= float(torch.linalg.norm(dense)) * (1 + 1e-5)
        if rank >= max(ranks):
            assert errors[0] <= errors[1] + 1e-5 * float(torch.linalg.norm(dense))


def test_prepared_factors_and_a_slab_give_the_same():
    B, A = factors((3, 3, 3), SHAPES)
    f = kernels.prepare(B, A)
    slab = kernels.FactorSlab(SHAPES, [3] * 3)
    for u in range(3):
        slab.put(u, [b[u] for b in B], [a[u] for a in A])
    plain = estimate_modules(B, A)
    for other in (estimate_modules(f.B, f.A), estimate_modules(slab.factors.B, slab.factors.A)):
        for x, y in zip(plain.B + plain.A + [plain.rho], other.B + other.A + [other.rho], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


class NoLooking(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a number read, a size that follows from numbers."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "equal",
        "item",
        "_linalg_eigh",
        "_linalg_svd",
        "masked_select",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.WAITS:
            raise AssertionError(f"{function} makes the host wait")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_looked_at(method, regime):
    B, A = factors((2, 3), SHAPES[:2])
    w = torch.tensor([1.0, 3.0])
    estimate_modules(B, A, w, w, method=method, sweeps=3)  # what is made once, is
    with NoLooking():
        estimate_modules(B, A, w, w, method=method, sweeps=3)
    with pytest.raises(AssertionError, match="makes the host wait"), NoLooking():
        flora_na.estimate(B[0], A[0], method="als", backend="torch")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what torch.compile warns about depends on its version
@pytest.mark.parametrize(
    ("method", "limit", "backend", "compiler"),
    [
        ("fedavg", 0, BACKENDS[-1], "aot_eager"),
        ("flora-na", 1024, "auto", "eager"),
        ("als", 1024, "auto", "aot_eager"),
        ("als", 0, "auto", "eager"),
    ],
)
def test_a_whole_aggregation_is_traced_in_one_graph(method, limit, backend, compiler, monkeypatch):
    """Every sweep is unrolled, so few are traced; the implicit regime with few steps of conjugate gradients."""
    torch.compiler.reset()
    monkeypatch.setattr(batched, "GRAM_RANK_LIMIT", limit)
    monkeypatch.setattr(_batched_solvers, "CG_STEPS", 1)
    B, A = factors((2, 3), SHAPES[:2])
    w = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def run(B, A, w):
        return estimate_modules(B, A, w, method=method, sweeps=2 if limit else 1, backend=backend)

    plain = run(B, A, w)
    traced = torch.compile(run, fullgraph=True, backend=compiler)(B, A, w)
    for x, y in zip(plain.B + plain.A + [plain.rho], traced.B + traced.A + [traced.rho], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert torch.equal(plain.sweeps, traced.sweeps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "svd"}, "method: expected one of fedavg, flora-na, als"),
        ({"method": "fedavg", "rank": 3}, "rank: from 1 to 16384, of 'als', not 3 of 'fedavg'"),
        ({"rank": 0}, "rank: from 1 to 16384"),
        ({"rank": 2.5}, "rank: from 1 to 16384"),
        ({"rank": True}, "rank: from 1 to 16384"),
        ({"B": [[torch.ones(4)] * 2]}, r"B\[0\]\[0\]: expected a float matrix"),
        ({"B": [[]], "A": [[]]}, r"B\[0\]: expected at least one client"),
        ({"weights": [1, 2, 3]}, r"weights: expected shape \(2,\), got \(3,\)"),
        ({"sweeps": 0}, "sweeps: expected an integer of at least 1"),
        ({"sweeps": 1.5}, "sweeps: expected an integer of at least 1, got 1.5"),
        ({"weights": torch.ones(3)}, r"weights: expected shape \(2,\), got \(3,\)"),
        ({"scalings": torch.ones(2, 1)}, r"scalings: expected shape \(2,\)"),
        ({"A": []}, "same positive number of modules"),
        ({"B": [[torch.ones(4, 2)] * 2, [torch.ones(4, 2)]], "A": [[torch.ones(2, 4)] * 2] * 2}, r"B\[1\] and A\[1\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    B, A = factors((2, 2), SHAPES[:1])
    with pytest.raises(ValueError, match=message):
        estimate_modules(**({"B": B, "A": A} | arguments))
