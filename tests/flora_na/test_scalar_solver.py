"""The compiled solver of FLoRA-NA's scalars against the general path, and what it leaves to that."""

import pytest
import torch

from fedgram.flora_na import ScalarLeastSquares
from fedgram.flora_na._scalar_solver import SOLVER, can_solve, certified_pair
from fedgram.flora_na.divergence import pair_errors
from fedgram.flora_na.estimation import _active, estimate_targets
from fedgram.flora_na.grouping import make_groups
from fedgram.flora_na.target import make_target
from fedgram.flora_na.weights import normalise_weights

pytestmark = pytest.mark.skipif(SOLVER.missing is not None, reason=str(SOLVER.missing))
CASES = {
    "even ranks": [8] * 5,
    "ranks of no multiple of four": [3] * 6,
    "ragged ranks": [1, 5, 8, 2],
    "many clients": [2] * 70,
}


def targets(ranks, modules=3, seed=0, dtype=torch.float64, scalings=None):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(modules):
        shared_B, shared_A = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((40, 8), (8, 50)))
        B = [(shared_B[:, :r] + torch.randn(40, r, generator=g, dtype=torch.float64)).to(dtype) for r in ranks]
        A = [(shared_A[:r] + torch.randn(r, 50, generator=g, dtype=torch.float64)).to(dtype) for r in ranks]
        w = normalise_weights(torch.rand(len(ranks), generator=g) + 0.1, len(ranks))
        out.append(make_target(*_active(B, A, w, scalings)))
    return out


def group_of(*args, **kwargs):
    [(group, _)] = make_groups(targets(*args, **kwargs))
    return group


def fitted(group):
    return ScalarLeastSquares().certified(group)


@pytest.mark.parametrize("case", CASES)
def test_it_ends_where_the_general_path_ends(case):
    group = group_of(CASES[case])
    found = fitted(group)
    [general] = ScalarLeastSquares().solve([group])
    errors = pair_errors(group, found)
    assert torch.allclose(found.evidence.error, errors.error, rtol=1e-9)
    # both stop where a sweep gains less than 1e-10 of what is left, this one module by module
    assert torch.allclose(found.evidence.error, general.left, rtol=1e-8)
    assert found.status == general.status == "converged"
    assert torch.allclose(group.memo.energies, group.gram_energy, rtol=1e-12)
    assert torch.allclose(group.memo.average_errors, pair_errors(group, certified_pair(group)).error, rtol=1e-9)
    dense = [sum(c * b @ a for c, b, a in zip(t.coefficients, t.B, t.A, strict=True)) for t in group.targets]
    for l, (dW, t) in enumerate(zip(dense, group.targets, strict=True)):
        B, A = (
            sum(x * torch.nn.functional.pad(f, pad(f)) for x, f in zip(scalars[l], factors, strict=True))
            for scalars, factors, pad in (
                (found.p, t.B, lambda f: (0, group.rank - f.shape[1])),
                (found.q, t.A, lambda f: (0, 0, 0, group.rank - f.shape[0])),
            )
        )
        assert torch.allclose((dW - B @ A).square().sum(), found.evidence.error[l], rtol=1e-9)
        assert torch.allclose(torch.stack([B.norm(), A.norm()]), found.evidence.norms[l], rtol=1e-9)
        assert 0.5 <= float(B.norm() / A.norm()) <= 2


def test_it_never_ends_above_the_average():
    for seed in range(20):
        group = group_of([4] * 6, seed=seed)
        assert bool((fitted(group).evidence.error <= certified_pair(group).evidence.error).all())


def test_normal_equations_without_a_definite_answer_go_to_the_general_path():
    [target] = targets([4, 4], modules=1)
    twins = make_target(
        [target.B[0]] * 2 + [target.B[1]], [target.A[0]] * 2 + [target.A[1]], torch.ones(3).double() / 3
    )
    [(group, _)] = make_groups([twins])
    assert fitted(group) is None
    [e] = estimate_targets([twins], method="flora-na")
    assert e.status == "converged"
    assert 0 < e.rho <= e.rho_fedavg


@pytest.mark.parametrize("ranks", [[4], [0, 4, 4]])
def test_one_client_and_one_without_a_rank(ranks):
    """An error that is zero, and normal equations with an empty row, are for the general path."""
    group = group_of(ranks)
    assert fitted(group) is None
    for e in estimate_targets(list(group.targets), method="flora-na"):
        assert e.rho < 1e-12 if len(ranks) == 1 else 0 < e.rho <= e.rho_fedavg


@pytest.mark.parametrize("kind", ["zero", "cancelling", "identical clients"])
def test_what_grams_do_not_resolve_goes_to_the_general_path(kind):
    [t] = targets([4], modules=1)
    B, A, scalings = [t.B[0]] * 2, [t.A[0]] * 2, {"cancelling": [1.0, -1.0]}.get(kind)
    if kind == "zero":
        B = [torch.zeros_like(b) for b in B]
    target = make_target(B, A, torch.full((2,), 0.5, dtype=torch.float64), scalings)
    [(group, _)] = make_groups([target])
    assert certified_pair(group) is None
    assert fitted(group) is None
    [e] = estimate_targets([target], method="flora-na")
    assert e.status == "zero-target" if kind != "identical clients" else e.rho < 1e-12


def test_who_is_not_for_it():
    group = group_of([4, 4])
    assert can_solve(group)
    [t] = targets([4, 4], modules=1)
    anchored = make_target(t.B, t.A, t.weights, anchor=(t.B[0], t.A[0]))
    assert not can_solve(make_groups([anchored])[0][0])
    assert not can_solve(group_of([1] * 200))


def test_rho_is_measured_where_rounding_of_the_factors_shows():
    """float32 factors: from the Grams while rho is large beside 1e-7; bfloat16 ones are always measured."""
    for dtype, from_grams in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False)):
        group = group_of([4] * 5, modules=1, dtype=dtype)
        [e] = estimate_targets(list(group.targets), method="flora-na")
        dW = sum(c * b.double() @ a.double() for c, b, a in zip(*coefficients(group.targets[0]), strict=True))
        true = float((dW - e.B.double() @ e.A.double()).norm() / dW.norm())
        assert e.rho == pytest.approx(true, rel=5e-4)
        exact = float((fitted(group).evidence.error / fitted(group).group.memo.energies).sqrt()[0])
        assert (e.rho == pytest.approx(exact, rel=1e-12)) == from_grams


def coefficients(target):
    return target.coefficients.tolist(), target.B, target.A


def test_small_differences_are_measured_on_the_rounded_factors():
    """Nearly identical clients in float32: rho of 1e-6 is what rounding makes of it, and is told so."""
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(60, 4, generator=g), torch.randn(4, 60, generator=g)
    B = [b * (1 + 1e-6 * u) for u in range(3)]
    A = [a * (1 - 2e-6 * u) for u in range(3)]
    target = make_target(B, A, torch.full((3,), 1 / 3, dtype=torch.float64))
    [e] = estimate_targets([target], method="fedavg")
    dW = sum(x.double() @ y.double() for x, y in zip(B, A, strict=True)) / 3
    true = float((dW - e.B.double() @ e.A.double()).norm() / dW.norm())
    assert 0 < true < 1e-6
    assert e.rho == pytest.approx(true, rel=1e-3)
