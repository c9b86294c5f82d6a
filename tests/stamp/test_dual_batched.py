"""Batches of duals: the same answers as one by one, without a look from the host."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedgram.stamp import Gramian, solve_dual
from fedgram_testing.gradient_families import FAMILIES, gradients


class NoHostLook(TorchDispatchMode):
    """Raises where an operation would wait for a GPU: reading a value, or a result whose shape depends on values."""

    LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.LOOKS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("K", [1, 2, 3, 8, 24])
def test_batches_agree_with_the_exact_solver(K):
    X = np.stack([gradients(family, K, seed) for family in FAMILIES[:6] for seed in range(3)])
    u = np.random.default_rng(0).dirichlet(np.ones(K), len(X))
    G = X @ X.transpose(0, 2, 1)
    batched, exact = solve_dual(G, 0.4, u, method="batched"), solve_dual(G, 0.4, u, method="exact")
    assert batched.status == exact.status
    assert (batched.objective - exact.objective).abs().le(1e-9 * exact.scale + 1e-30).all()
    assert batched.relative_gap.le(1e-9).all()
    assert batched.weights.shape == (len(X), K)


@pytest.mark.parametrize("family", ["opposing pair", "a zero", "many zeros"])
@pytest.mark.parametrize("K", [3, 8, 24])
def test_degenerate_entries_agree_with_the_exact_solver(family, K):
    X = np.stack([gradients(family, K, seed) for seed in range(6)])
    G = X @ X.transpose(0, 2, 1)
    batched, exact = solve_dual(G, 0.8, method="batched"), solve_dual(G, 0.8, method="exact")
    assert batched.status == exact.status
    assert "degenerate" in exact.status
    d, e = ((dual.coefficients.numpy()[:, None] @ X)[:, 0] for dual in (batched, exact))
    assert (np.linalg.norm(d - e, axis=1) <= 1e-6 * np.linalg.norm(e, axis=1)).all()


def test_the_batched_path_never_looks():
    X = np.stack([gradients(family, 6, 0)[:, :3] for family in FAMILIES])
    parts = Gramian.from_dense(X @ X.transpose(0, 2, 1))
    from fedgram.stamp import _batched

    u = torch.full((len(X), 6), 1 / 6, dtype=torch.float64)
    with NoHostLook():
        answer, _ = _batched.solve_batched((parts.n0, parts.h, parts.H), u, 0.3, 1e-9)
    for part in (answer.w, answer.step, answer.share, answer.objective, answer.gap, answer.scale):
        assert part.isfinite().all()
    assert answer.code.shape == (len(X),)


def test_on_a_device_without_values():
    # The meta device has shapes and no values: whatever looks at one fails.
    dual = solve_dual(torch.zeros(5, 5, device="meta"), 0.3, rescale="mean")
    assert dual.weights.shape == dual.coefficients.shape == (5,)
    assert dual.weights.device.type == "meta"
    assert solve_dual(torch.zeros(2, 5, 5, device="meta"), 0.3).weights.shape == (2, 5)


def test_what_the_passes_leave_is_refined(monkeypatch):
    from fedgram.stamp import _batched, dual

    X = np.stack([gradients("random", 24, seed) for seed in range(4)])
    G = torch.from_numpy(X @ X.transpose(0, 2, 1))
    monkeypatch.setattr(_batched, "FACES", 1)
    monkeypatch.setattr(_batched, "frank_wolfe", lambda batch, steps: batch.u)
    rough = dual._batch(G, 0.4, torch.full((4, 24), 1 / 24, dtype=torch.float64), False)
    assert "inexact" in rough.status
    fine = rough.refine()
    assert fine.status == ("optimal",) * 4
    assert fine.relative_gap.max() <= 1e-9
    assert (fine.objective <= rough.objective + 1e-12 * rough.scale).all()
    assert solve_dual(G, 0.4, method="batched").status == ("optimal",) * 4  # on the CPU of itself


def test_non_finite_entries_do_not_spread():
    from fedgram.stamp import _batched

    G = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    G[1, 0, 0] = float("nan")
    u = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    answer, _ = _batched.solve_batched((G,), u, 0.3, 1e-9)
    for part in (answer.w, answer.step, answer.share, answer.objective, answer.gap, answer.scale):
        assert part[1].isnan().all()
    assert [_batched.STATUSES[k] for k in answer.code] == ["optimal", "nonfinite", "optimal"]
    assert torch.allclose(answer.w[[0, 2]], u[[0, 2]])


def test_special_cases_of_a_batch():
    G = torch.stack([torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.eye(2)])
    assert solve_dual(G, 0.5, method="batched").status == ("stationary", "stationary", "optimal")
    assert solve_dual(G, 0.0, method="batched").status == ("stationary", "stationary", "mean")
    assert torch.equal(solve_dual(G, 0.0, method="batched").coefficients, torch.full((3, 2), 0.5, dtype=torch.float64))
