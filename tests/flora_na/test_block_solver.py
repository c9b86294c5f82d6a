"""The compiled alternating least squares against the general path and dense products, and what it leaves to that."""

import pytest
import torch

from fedgram.flora_na import AlternatingLeastSquares
from fedgram.flora_na import als as als_module
from fedgram.flora_na._block_solver import certified_blocks
from fedgram.flora_na._compiled import SOLVER
from fedgram.flora_na.coefficients import Pair
from fedgram.flora_na.divergence import pair_errors
from fedgram.flora_na.estimation import estimate_targets
from fedgram.flora_na.fedavg import solve_fedavg
from fedgram.flora_na.grouping import make_groups
from fedgram.flora_na.target import make_target

pytestmark = pytest.mark.skipif(SOLVER.missing is not None, reason=str(SOLVER.missing))
CASES = {
    "even ranks": ([8] * 5, 8),
    "a rank of no multiple of four": ([3] * 6, 3),
    "ragged ranks": ([1, 5, 8, 2], 8),
    "a smaller rank": ([8] * 4, 5),
    "a larger rank": ([4] * 6, 13),
    "rank one": ([1] * 7, 1),
    "many ranks": ([16] * 16, 16),
}
m, n = 40, 50


def targets(ranks, modules=3, seed=0, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((m + sum(ranks), 8), (8, n + sum(ranks)))
    out = []
    for _ in range(modules):
        wide = torch.randn(8, max(ranks), generator=g, dtype=torch.float64)
        B0, A0 = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
        B, A = [], []
        for r in ranks:
            B.append((B0 @ wide[:, :r] + torch.randn(shapes[0][0], r, generator=g, dtype=torch.float64)) * scale)
            A.append((wide[:, :r].T @ A0 + torch.randn(r, shapes[1][1], generator=g, dtype=torch.float64)) / scale)
        w = torch.rand(len(ranks), generator=g, dtype=torch.float64) + 0.1
        out.append(make_target([b.to(dtype) for b in B], [a.to(dtype) for a in A], w / w.sum()))
    return out


def group_of(*args, **kwargs):
    [(group, _)] = make_groups(targets(*args, **kwargs))
    return group


def both(group, rank, monkeypatch):
    """The compiled answer and the general path's, from the same start."""
    start = solve_fedavg(group)
    found = AlternatingLeastSquares().solve(group, start, rank)
    monkeypatch.setattr(als_module, "certified_blocks", lambda *_, **__: None)
    return found, AlternatingLeastSquares().solve(group, start, rank)


def dense(t):
    return sum(c * b.double() @ a.double() for c, b, a in zip(t.coefficients.tolist(), t.B, t.A, strict=True))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e5])
@pytest.mark.parametrize("case", CASES)
def test_it_ends_where_the_general_path_ends(case, scale, monkeypatch):
    ranks, rank = CASES[case]
    group = group_of(ranks, scale=scale)
    found, general = both(group, rank, monkeypatch)
    assert found.evidence is not None
    assert general.evidence is None
    assert found.status == general.status == "converged"
    errors = pair_errors(group, general).error
    # each module stops where a sweep gains less than 1e-6 of what is left; the general path, where all of them do
    assert torch.allclose(found.evidence.error, errors, rtol=1e-4)
    for l, t in enumerate(group.targets):
        dW, stack_B, stack_A = dense(t), torch.cat(t.B, 1), torch.cat(t.A, 0)
        B, A = stack_B @ found.P[l], found.Q[l].T @ stack_A
        assert B.shape[1] == rank
        assert torch.allclose((dW - B @ A).square().sum(), found.evidence.error[l], rtol=1e-8)
        assert torch.allclose(group.memo.energies[l], dW.square().sum(), rtol=1e-12)
        assert torch.allclose(torch.stack([B.norm(), A.norm()]), found.evidence.norms[l], rtol=1e-8)
        squares = B.T @ B
        assert torch.allclose(squares, A @ A.T, atol=1e-9 * float(squares.max()))  # balanced,
        assert torch.allclose(squares, squares.diag().diag(), atol=1e-9 * float(squares.max()))
        assert squares.diag().tolist() == sorted(squares.diag().tolist(), reverse=True)  # largest first
        optimum = torch.linalg.svdvals(dW)[rank:].square().sum()
        assert optimum * (1 - 1e-9) <= found.evidence.error[l] <= optimum * (1 + 1e-3)


def test_modules_do_not_depend_on_their_company():
    every = targets([4] * 5, modules=4)
    [(group, _)] = make_groups(every)
    whole = AlternatingLeastSquares().solve(group, solve_fedavg(group))
    for l, target in enumerate(every):
        [(alone, _)] = make_groups([target])
        pair = AlternatingLeastSquares().solve(alone, solve_fedavg(alone))
        assert torch.equal(pair.P[0], whole.P[l])
        assert torch.equal(pair.Q[0], whole.Q[l])


def test_the_bits_do_not_depend_on_threads():
    group = group_of([8] * 8, modules=6)
    pairs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            pairs.append(AlternatingLeastSquares().solve(group, solve_fedavg(group)))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(pairs[0].P, pairs[1].P)
    assert torch.equal(pairs[0].Q, pairs[1].Q)


@pytest.mark.parametrize("kind", ["identical clients", "zero", "cancelling", "parallel", "zero start"])
def test_what_grams_do_not_resolve_goes_to_the_general_path(kind):
    """Products of lower rank than asked for, no product, and starts that span too little."""
    [t] = targets([4, 4], modules=1)
    B, A, weights = list(t.B), list(t.A), [0.5, 0.5]
    scalings = [1.0, -1.0] if kind == "cancelling" else None
    if kind in ("identical clients", "cancelling"):
        B, A = [B[0]] * 2, [A[0]] * 2
    if kind == "zero":
        B = [torch.zeros_like(b) for b in B]
    target = make_target(B, A, torch.tensor(weights).double(), scalings)
    [(group, _)] = make_groups([target])
    start = solve_fedavg(group).Q.clone()
    if kind == "parallel":
        start[..., 1] = start[..., 0] * (1 + 1e-9)
    if kind == "zero start":
        start[..., 1] = 0
    limits = {"tolerance": 1e-6, "max_sweeps": 200, "cancelled": als_module.CANCELLED}
    assert certified_blocks(group, start, **limits) is None
    general = AlternatingLeastSquares().solve(group, Pair(start, start, ""))
    assert (general.evidence is None) == (kind != "parallel")  # a little of a sketch sets these apart
    [e] = estimate_targets([target], method="als")
    assert e.status in ("zero-target", "converged")
    if kind in ("parallel", "zero start"):
        optimum = torch.linalg.svdvals(dense(target))[4:].norm() / dense(target).norm()
        assert e.rho == pytest.approx(float(optimum), rel=1e-3)


def test_a_start_that_cancels_to_rounding_is_in_doubt():
    """Of nearly the same A twice, one minus the other: its norm is what float64 makes of zero."""
    [t] = targets([4, 4], modules=1)
    factor = 1 + 1e-9
    [(group, _)] = make_groups([make_target(t.B, [t.A[0], t.A[0] * factor], t.weights)])
    start = solve_fedavg(group).Q.clone()
    start[0, :, 1] = 0
    start[0, 1, 1], start[0, 5, 1] = factor, -1
    limits = {"tolerance": 1e-6, "max_sweeps": 200}
    assert certified_blocks(group, start, cancelled=als_module.CANCELLED, **limits) is None


def test_more_columns_or_ranks_than_it_is_for(monkeypatch):
    limits = {"tolerance": 1e-6, "max_sweeps": 200, "cancelled": als_module.CANCELLED}
    group = group_of([8] * 40, modules=1)
    assert certified_blocks(group, solve_fedavg(group).Q, **limits) is not None
    monkeypatch.setattr("fedgram.flora_na._block_solver.MOST_RANKS", 319)
    assert certified_blocks(group, solve_fedavg(group).Q, **limits) is None
    group = group_of([4] * 2, modules=1)
    assert certified_blocks(group, torch.randn(1, 8, 9, dtype=torch.float64), **limits) is None


def test_one_sweep_and_no_more():
    group = group_of([4] * 5)
    pair = AlternatingLeastSquares(max_sweeps=1).solve(group, solve_fedavg(group))
    assert (pair.status, pair.sweeps) == ("max-sweeps", 1)


@pytest.mark.parametrize("method", ["als", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rho_is_that_of_the_factors_as_returned(method, dtype):
    [t] = targets([8] * 5, modules=1, dtype=dtype)
    [e] = estimate_targets([t], method=method)
    dW = dense(t)
    assert e.rho == pytest.approx(float((dW - e.B.double() @ e.A.double()).norm() / dW.norm()), rel=5e-4)
