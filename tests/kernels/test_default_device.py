"""What the operations make lies where their tensors do, whatever torch's default device is."""

import pytest
import torch

from fedgram import kernels
from fedgram_testing.factor_ops import draw
from fedgram_testing.gradients import ALL_BACKENDS, BACKENDS, gradients

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU are not Triton's")


@pytest.fixture
def elsewhere():
    """Run operations with a default device that has no memory, and again without."""

    def run(operation):
        expected = torch.utils._pytree.tree_leaves(operation())
        torch.set_default_device("meta")
        try:
            found = torch.utils._pytree.tree_leaves(operation())
        finally:
            torch.set_default_device(None)
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert x is y or torch.equal(x, y)

    return run


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("ranks", [[3, 3], [3, 2]])
def test_factors(elsewhere, backend, ranks):
    B, A = draw(ranks, [(20, 9)], torch.float32)
    p = [torch.rand(2, dtype=torch.float64)]
    P = [torch.rand(sum(ranks), 2, dtype=torch.float64)]
    Q = [P[0].T.contiguous()]
    elsewhere(lambda: kernels.factor_gram(B, A, backend=backend))
    elsewhere(lambda: kernels.factor_combine(B, A, p, p, backend=backend))
    elsewhere(lambda: kernels.factor_cross(B, A, [B[0][0]], [A[0][0]], backend=backend))
    elsewhere(lambda: kernels.combine_products(B, A, p, p, backend=backend))
    elsewhere(lambda: kernels.gram_combine(B, A, P, Q, beside=True, backend=backend))
    elsewhere(lambda: kernels.lowrank_sum(None, B[0], A[0], p[0], backend=backend))


def test_factors_without_a_choice_of_backend(elsewhere):
    B, A = draw([3, 2], [(20, 9)], torch.float32)
    S, c = [torch.eye(3, dtype=torch.float64)], torch.ones(2, dtype=torch.float64)
    elsewhere(lambda: kernels.factor_traces(B, A, S, S))
    elsewhere(lambda: kernels.factor_triangle(B, A))
    elsewhere(lambda: kernels.lowrank_norm(B, A, [c]))
    elsewhere(lambda: kernels.factor_gram(kernels.prepare(B, A).B, A))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_gradients(elsewhere, backend):
    G, v = gradients(4), torch.rand(4, dtype=torch.float64)
    out = [torch.zeros_like(t) for t in G[0]]
    elsewhere(lambda: kernels.grad_gram(G, backend=backend))
    elsewhere(lambda: kernels.grad_combine(G, v, backend=backend))
    elsewhere(lambda: kernels.grad_combine(G, v, out=out, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("restarts", [0, 2])
def test_rows(elsewhere, backend, restarts):
    a, d = torch.randn(12, 3), torch.randn(12, 5)
    elsewhere(lambda: kernels.ghost_gram(a, d, [0, 3, 12], backend=backend))
    elsewhere(lambda: kernels.subset_select(a, [0, 5, 12], [2, 3], restarts=restarts, backend=backend))
