"""Newton's step for the scalars: its derivatives against autograd, and where alternating steps alone would crawl."""

import pytest
import torch

from fedgram.flora_na import ScalarLeastSquares
from fedgram.flora_na._compiled import SOLVER
from fedgram.flora_na._scalar_newton import DAMPING, newton_step
from fedgram.flora_na._scalar_problem import Problem
from fedgram.flora_na.divergence import pair_errors
from fedgram.flora_na.estimation import estimate_targets
from fedgram.flora_na.grouping import make_groups
from fedgram.flora_na.target import make_target

CASES = {"even ranks": [4] * 5, "ragged ranks": [1, 3, 5, 2]}


def unrelated(ranks, modules=2, seed=0, anchored=False, m=30, n=40):
    """Clients that share nothing: near the averages the error has a saddle, and its valleys are flat."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(modules):
        B = [torch.randn(m, r, generator=g, dtype=torch.float64) for r in ranks]
        A = [torch.randn(r, n, generator=g, dtype=torch.float64) for r in ranks]
        w = torch.rand(len(ranks), generator=g, dtype=torch.float64) + 0.5
        last = (
            torch.randn(m, max(ranks), generator=g, dtype=torch.float64),
            torch.randn(max(ranks), n, generator=g, dtype=torch.float64),
        )
        out.append(make_target(B, A, w / w.sum(), anchor=last if anchored else None))
    return out


def group_of(*args, **kwargs):
    [(group, _)] = make_groups(unrelated(*args, **kwargs))
    return group


def dense(group, l):
    """The padded factors of a module as (members, m, r) and (members, r, n), and dW."""
    t = group.targets[l]
    pad = torch.nn.functional.pad
    B = torch.stack([pad(b, (0, group.rank - b.shape[1])) for b in t.B])
    A = torch.stack([pad(a, (0, 0, 0, group.rank - a.shape[0])) for a in t.A])
    dW = sum(c * b @ a for c, b, a in zip(t.coefficients, t.B, t.A, strict=True))
    return B, A, dW


def lift(x, anchored):
    return torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) if anchored else x


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_those_of_the_error(case, anchored):
    group = group_of(CASES[case], anchored=anchored)
    problem = Problem([group], shared=False, cg_steps=12)
    g = torch.Generator().manual_seed(3)
    U = len(CASES[case])
    free_p, free_q = (torch.rand(2, U, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = lift(free_p, anchored), lift(free_q, anchored)
    of_p, of_q = problem.half_step("B", p, q), problem.half_step("A", q, p)
    C = problem.products.cross(p, q)
    if anchored:
        C = C[..., :-1] - C[..., -1:]
        C = C[:, :-1] - C[:, -1:]
    for l in range(2):
        B, A, dW = dense(group, l)

        def error(x, y, B=B, A=A, dW=dW):
            x, y = lift(x, anchored), lift(y, anchored)
            return (dW - torch.einsum("u,umr->mr", x, B) @ torch.einsum("u,urn->rn", y, A)).square().sum()

        (pp, pq), (_, qq) = torch.autograd.functional.hessian(error, (free_p[l], free_q[l]))
        gradient = torch.autograd.functional.jacobian(error, (free_p[l], free_q[l]))
        for half, whole in ((of_p.H[l], pp), (C[l], pq), (of_q.H[l], qq)):
            assert torch.allclose(2 * half, whole, rtol=1e-9, atol=1e-9 * float(qq.abs().max()))
        assert torch.allclose(-2 * of_p.rest[l], gradient[0], atol=1e-9 * float(qq.abs().max()))
        assert torch.allclose(-2 * of_q.rest[l], gradient[1], atol=1e-9 * float(qq.abs().max()))


def test_the_step_ends_at_the_minimum_of_a_quadratic():
    """With K = H_q - C^T H_p^-1 C definite the step is K^-1 g; else the least damped that is convex, or none."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(1, 6, 6, generator=g, dtype=torch.float64)
    H_p = H_q = X @ X.mT + torch.eye(6)
    C, rest = 0.1 * H_p, torch.randn(1, 6, generator=g, dtype=torch.float64)
    step, promised = newton_step(H_p, C, H_q, rest, None)
    K = H_q - C.mT @ torch.linalg.solve(H_p, C)
    assert torch.allclose(step, torch.linalg.solve(K, rest.unsqueeze(-1)).squeeze(-1), rtol=1e-10)
    assert torch.allclose(promised, (rest * step).sum(-1))
    for size, expected in ((1.02, 1 - DAMPING[2]), (1.35, 1 - DAMPING[5])):
        step, promised = newton_step(H_p, size * H_p, H_q, rest, None)  # W = size^2 H
        assert promised.tolist() == [float("inf")]
        K = (1 - expected * size**2) * H_q
        assert torch.allclose(step, torch.linalg.solve(K, rest.unsqueeze(-1)).squeeze(-1), rtol=1e-9)
    assert newton_step(H_p, 3 * H_p, H_q, rest, None)[1].tolist() == [-1.0]
    assert newton_step(torch.zeros_like(H_p), C, H_q, rest, None)[1].tolist() == [-1.0]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_few_sweeps_to_a_stationary_point(anchored, shared):
    """Where two hundred alternating sweeps have not come to rest."""
    group = group_of([4] * 6, seed=1, anchored=anchored)
    found = ScalarLeastSquares().solve([group], shared=shared)[0]
    assert found.status == "converged"
    assert found.sweeps <= 20
    problem = Problem([group], shared=shared, cg_steps=12)
    p, q = (x[:1] if shared else x for x in (found.p, found.q))
    for side, x, y in (("B", p, q), ("A", q, p)):
        assert float(problem.half_step(side, x, y).gain.max()) <= 1e-9 * float(found.left.min())


@pytest.mark.skipif(SOLVER.missing is not None, reason=str(SOLVER.missing))
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_solver_ends_there_too(case):
    for seed in range(5):
        group = group_of(CASES[case], seed=seed)
        compiled, general = ScalarLeastSquares().certified(group), ScalarLeastSquares().solve([group])[0]
        assert compiled.status == general.status == "converged"
        assert compiled.sweeps <= 25
        assert torch.allclose(compiled.evidence.error, general.left, rtol=1e-8)


@pytest.mark.parametrize("sweeps", [1, 2, 4, 8])
def test_cut_short_the_error_is_that_of_the_pair(sweeps):
    """p and q end in one gauge, whatever the last sweep was."""
    for seed in range(3):
        group = group_of([1, 3, 5, 2], seed=seed)
        found = ScalarLeastSquares(max_sweeps=sweeps).solve([group])[0]
        for l in range(2):
            B, A, dW = dense(group, l)
            pair = torch.einsum("u,umr->mr", found.p[l], B) @ torch.einsum("u,urn->rn", found.q[l], A)
            assert torch.allclose((dW - pair).square().sum(), found.left[l], rtol=1e-9)
        if SOLVER.missing is None:
            compiled = ScalarLeastSquares(max_sweeps=sweeps).certified(group)
            assert torch.allclose(pair_errors(group, compiled).error, compiled.evidence.error, rtol=1e-9)
            assert torch.allclose(compiled.evidence.error, found.left, rtol=1e-6)


def test_a_gauge_that_is_held_in_the_last_sweep_is_that_of_both(monkeypatch):
    monkeypatch.setattr(Problem, "newton", lambda self, p, q, *_: (torch.zeros_like(q), torch.full_like(q[:, 0], -1.0)))
    monkeypatch.setattr(Problem, "hold_gauge", lambda self, p, q: (8 * p, q / 8))
    monkeypatch.setattr(Problem, "normalise_gauge", lambda self, p, q: (p, q))
    group = group_of([3] * 4)
    found = ScalarLeastSquares(max_sweeps=4).solve([group])[0]
    for l in range(2):
        B, A, dW = dense(group, l)
        pair = torch.einsum("u,umr->mr", found.p[l], B) @ torch.einsum("u,urn->rn", found.q[l], A)
        assert torch.allclose((dW - pair).square().sum(), found.left[l], rtol=1e-9)


def test_it_never_ends_above_the_averages():
    for seed in range(10):
        for e in estimate_targets(unrelated([3] * 5, seed=seed, m=8, n=8), method="flora-na"):
            assert e.rho <= e.rho_fedavg * (1 + 1e-12)
