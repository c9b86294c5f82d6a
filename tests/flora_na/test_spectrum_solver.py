"""The compiled spectrum against dense singular values, and what it leaves to the general path."""

import weakref

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import svd
from fedgram.flora_na._compiled import SOLVER
from fedgram.flora_na._spectrum_solver import MOST_RANKS, compiled_spectrum
from fedgram.flora_na.grouping import make_groups
from fedgram.flora_na.svd import solve_svd, squared_singular_values
from fedgram.flora_na.target import make_target

pytestmark = pytest.mark.skipif(SOLVER.missing is not None, reason=str(SOLVER.missing))
CASES = {
    "even ranks": [8] * 5,
    "odd ranks": [3] * 5,
    "ragged ranks": [1, 5, 8, 2],
    "one": [1],
    "two": [1, 1],
    "as many as it takes": [16] * (MOST_RANKS // 16),
}


def target(ranks, seed=0, m=70, n=90, scale=1.0, anchored=False):
    g = torch.Generator().manual_seed(seed)
    m, n = m + sum(ranks), n + sum(ranks)
    B = [torch.randn(m, r, generator=g, dtype=torch.float64) * scale for r in ranks]
    A = [torch.randn(r, n, generator=g, dtype=torch.float64) for r in ranks]
    w = torch.rand(len(ranks), generator=g, dtype=torch.float64) + 0.1
    return make_target(B, A, w / w.sum(), anchor=(B[0].flip(0), A[0].flip(1)) if anchored else None)


def group_of(*targets):
    [(group, _)] = make_groups(list(targets))
    return group


def whole_spectrum(group):
    """Where none is left out."""
    found = compiled_spectrum(group, group.total_rank)
    assert found.left == []
    return found.values


def dense(t):
    return sum(c * b @ a for c, b, a in zip(t.coefficients.tolist(), t.B, t.A, strict=True))


def expected(t, R):
    found = torch.linalg.svdvals(dense(t)).square()[:R]
    return torch.cat([found, found.new_zeros(R - len(found))])


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e60])
@pytest.mark.parametrize("case", CASES)
def test_it_has_the_squared_singular_values(case, scale):
    targets = [target(CASES[case], seed, scale=scale) for seed in range(3)]
    group = group_of(*targets)
    values = whole_spectrum(group)
    assert torch.equal(values, squared_singular_values(group))
    for l, t in enumerate(targets):
        true = expected(t, group.total_rank)
        # the Grams' own rounding, by their condition
        assert torch.allclose(values[l], true, rtol=1e-10, atol=1e-12 * float(true[0]))
        assert values[l].tolist() == sorted(values[l].tolist(), reverse=True)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 17, 23])
def test_the_largest_and_what_the_others_add_up_to(count):
    targets = [target([5, 8, 10], seed) for seed in range(2)]
    group = group_of(*targets)
    found, values = compiled_spectrum(group, count), whole_spectrum(group)
    assert torch.equal(found.values, values[:, :count])
    assert torch.allclose(found.tail, values[:, count:].sum(-1), rtol=1e-12, atol=1e-14 * float(values[0, 0]))
    for l, t in enumerate(targets):
        left = expected(t, 23)[count:].sum()
        assert float(found.tail[l]) == pytest.approx(float(left), rel=1e-10, abs=1e-14 * float(values[l, 0]))


def test_what_many_small_ones_add_up_to_beside_a_large_one():
    """1 and 249 of 1e-12 are taken away from a sum that leaves 2e-12: float64 would lose a hundredth of it."""
    g = torch.Generator().manual_seed(0)
    q, p = (torch.linalg.qr(torch.randn(330, 300, generator=g, dtype=torch.float64)).Q for _ in range(2))
    sizes = torch.full((300,), 1e-6, dtype=torch.float64)
    sizes[0], sizes[250:] = 1, 2e-7
    t = make_target([q * sizes.sqrt()], [(p * sizes.sqrt()).T], torch.ones(1, dtype=torch.float64))
    found = compiled_spectrum(group_of(t), 250)
    assert float(found.tail) == pytest.approx(float(sizes[250:].square().sum()), rel=1e-3, abs=0)


@pytest.mark.parametrize("R", range(1, 14))
def test_every_small_total_rank(R):
    """Vectors of four, and what is left of them."""
    t = target([R])
    true = expected(t, R)
    assert torch.allclose(whole_spectrum(group_of(t))[0], true, rtol=1e-10, atol=1e-13 * float(true[0]))


def test_equal_values_zeros_and_a_diagonal():
    """Orthonormal factors: every value is that of a weight; the anchor adds zeros."""
    q = torch.linalg.qr(torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    B, A = [q[:, :4], q[:, 4:8], q[:, 8:]], [q[:, :4].T, q[:, 4:8].T, q[:, 8:].T]
    w = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    values = whole_spectrum(group_of(make_target(B, A, w)))
    assert torch.allclose(values[0], torch.tensor([0.25] * 4 + [0.0625] * 8, dtype=torch.float64), rtol=1e-13)
    anchored = target([3, 4], anchored=True)
    values = whole_spectrum(group_of(anchored))
    true = expected(anchored, 10)
    assert torch.allclose(values[0], true, rtol=1e-10, atol=1e-12 * float(true[0]))
    assert bool((values[0, 7:] <= 1e-14 * values[0, 0]).all())


def test_products_of_lower_rank():
    """Parallel columns in B only: zeros at the end, to the rounding of the Grams."""
    t = target([4] * 3)
    same = make_target([t.B[0]] * 3, t.A, t.weights)
    values = whole_spectrum(group_of(same))
    true = expected(same, 12)
    assert torch.allclose(values[0], true, rtol=1e-10, atol=1e-13 * float(true[0]))


@pytest.mark.parametrize("kind", ["parallel", "zero"])
def test_what_has_no_safe_square_root_goes_to_the_general_path(kind):
    t = target([4] * 3)
    A = [t.A[0]] * 3 if kind == "parallel" else [torch.zeros_like(t.A[0]), *t.A[1:]]
    group = group_of(make_target(t.B, A, t.weights))
    assert compiled_spectrum(group, 4).left == [0]
    true = expected(group.targets[0], 12)
    assert torch.allclose(squared_singular_values(group)[0], true, rtol=1e-8, atol=1e-12 * float(true[0]))


def test_what_is_left_out_costs_the_others_nothing():
    t = target([4] * 3)
    doubtful = make_target(t.B, [t.A[0]] * 3, t.weights)
    group = group_of(t, doubtful, target([4] * 3, seed=1))
    values, _, _, left = compiled_spectrum(group, 12)
    assert left == [1]
    found = squared_singular_values(group)
    assert torch.equal(found[[0, 2]], values[[0, 2]])
    true = expected(doubtful, 12)
    assert torch.allclose(found[1], true, rtol=1e-8, atol=1e-12 * float(true[0]))


def test_more_ranks_than_it_is_for():
    assert compiled_spectrum(group_of(target([MOST_RANKS + 1])), 1) is None


def test_a_spectrum_of_many_sizes(monkeypatch):
    """Values over twelve orders of magnitude, each to its own precision as far as Grams have it."""
    g = torch.Generator().manual_seed(4)
    q, p = (torch.linalg.qr(torch.randn(60, 24, generator=g, dtype=torch.float64)).Q for _ in range(2))
    sizes = torch.logspace(0, -6, 24, dtype=torch.float64)
    t = make_target([q * sizes], [p.T], torch.ones(1, dtype=torch.float64))
    group = group_of(t)
    values = whole_spectrum(group)
    assert torch.allclose(values[0], sizes.square(), rtol=1e-9, atol=1e-15)
    monkeypatch.setattr(svd, "compiled_spectrum", lambda *_: None)
    assert torch.allclose(squared_singular_values(group), values, rtol=1e-9, atol=1e-15)


def error_of(pair, t, l=0):
    """``||dW - BA||^2`` of a pair, densely."""
    B = torch.cat(list(t.B), 1) @ pair.P[l]
    A = pair.Q[l].mT @ torch.cat(list(t.A))
    return (dense(t) - B @ A).square().sum()


def orthonormal(ranks, seed=0, n=60):
    """Factors whose products have singular values that are the clients' weights."""
    g = torch.Generator().manual_seed(seed)
    q, p = (torch.linalg.qr(torch.randn(n, sum(ranks), generator=g, dtype=torch.float64)).Q for _ in range(2))
    return list(q.split(ranks, 1)), list(p.T.split(ranks))


@pytest.fixture
def no_general_optimum(monkeypatch):
    def refuse(*_):
        raise AssertionError("left to the general path")

    monkeypatch.setattr(svd, "_general_optimum", refuse)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e60])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(
    ("ranks", "rank"),
    [([8] * 5, 8), ([3] * 5, 3), ([1, 5, 8, 2], 11), ([2, 2], 1), ([16] * (MOST_RANKS // 16 - 1), 16)],
)
def test_the_optimum_is_that_of_the_dense_decomposition(ranks, rank, anchored, scale, no_general_optimum):
    targets = [target(ranks, seed, scale=scale, anchored=anchored) for seed in range(3)]
    group = group_of(*targets)
    pair = solve_svd(group, rank)
    assert (pair.status, pair.sweeps) == ("closed-form", 0)
    for l, t in enumerate(targets):
        left = torch.linalg.svdvals(dense(t)).square()[rank:].sum()
        assert float(error_of(pair, t, l)) == pytest.approx(float(left), rel=1e-9)
        assert float(pair.evidence.error[l]) == pytest.approx(float(left), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_equal_singular_values(rank, no_general_optimum):
    """Any of their vectors will do; the rank may cut through them."""
    ranks, weights = [4, 4, 4], torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    t = make_target(*orthonormal(ranks), weights)
    pair = solve_svd(group_of(t), rank)
    left = sum(sorted([0.16] * 8 + [0.04] * 4, reverse=True)[rank:])
    assert float(error_of(pair, t)) == pytest.approx(left, rel=1e-12)


def test_singular_values_that_nearly_agree(no_general_optimum):
    g = torch.Generator().manual_seed(1)
    B, A = orthonormal([24])
    for gap in (1e-4, 1e-8, 1e-12, 1e-16):
        sizes = (1 + gap * torch.rand(24, generator=g, dtype=torch.float64)).sort(descending=True).values
        t = make_target([B[0] * sizes], A, torch.ones(1, dtype=torch.float64))
        assert float(error_of(solve_svd(group_of(t), 8), t)) == pytest.approx(
            float(sizes[8:].square().sum()), rel=1e-12
        )


def test_other_rows_than_the_best_are_seen(monkeypatch):
    """A pair from the wrong vectors is no optimum, and its error says so: the general path decides."""
    t, true = target([6] * 4), compiled_spectrum

    def wrong(*given):
        found = true(*given)
        return found._replace(rows=found.rows.flip(1).contiguous())

    monkeypatch.setattr(svd, "compiled_spectrum", wrong)
    pair = solve_svd(group_of(t), 6)
    left = torch.linalg.svdvals(dense(t)).square()[6:].sum()
    assert float(error_of(pair, t)) == pytest.approx(float(left), rel=1e-9)


def test_rows_that_are_not_numbers_are_seen(monkeypatch):
    t, true = target([6] * 4), compiled_spectrum
    monkeypatch.setattr(
        svd,
        "compiled_spectrum",
        lambda *given: true(*given)._replace(rows=torch.full((1, 24, 6), torch.nan, dtype=torch.float64)),
    )
    left = torch.linalg.svdvals(dense(t)).square()[6:].sum()
    assert float(error_of(solve_svd(group_of(t), 6), t)) == pytest.approx(float(left), rel=1e-9)


def test_what_its_grams_do_not_resolve_is_left_out():
    """A product of the rank asked for: what is left is rounding, and comes from QR factors."""
    t = target([5] * 3)
    exact = make_target([t.B[0]] * 3, [t.A[0] + 1e-9 * a for a in t.A], t.weights)
    assert svd.doubtful_optima(group_of(t, exact, target([5] * 3, seed=1)), 5) == [1]


def test_the_optimum_and_its_yardstick_take_one_spectrum(monkeypatch):
    calls, true = [], compiled_spectrum
    monkeypatch.setattr(svd, "compiled_spectrum", lambda *given: calls.append(given) or true(*given))
    t = target([4] * 4)
    found = flora_na.estimate(list(t.B), list(t.A), t.weights, method="svd")
    assert found.rho_optimal == pytest.approx(found.rho, rel=1e-9)
    assert len(calls) == 1


def test_the_spectrum_is_not_kept_while_triangles_are_taken(monkeypatch):
    """Where ranks exceed a side: its vectors and roots are as large as what the triangles take."""
    g = torch.Generator().manual_seed(0)
    B, A = [torch.randn(4, 8, generator=g) for _ in range(3)], [torch.randn(8, 30, generator=g) for _ in range(3)]
    made, alive, triangles = [], [], svd._triangles

    def spectrum(group):
        made.append(weakref.ref(found := of(group)))
        return found

    def watched(group, i):
        alive.extend(ref() is not None for ref in made)
        return triangles(group, i)

    of = svd.spectrum
    monkeypatch.setattr(svd, "spectrum", spectrum)
    monkeypatch.setattr(svd, "_triangles", watched)
    flora_na.estimate(B, A, method="svd")
    assert alive
    assert not any(alive)
