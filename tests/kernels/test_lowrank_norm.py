import importlib

import pytest
import torch

from fedgram.kernels import lowrank_norm
from fedgram_testing.factor_ops import LAYOUTS, TYPES, draw


def dense(B, A, c):
    return sum(w * (b.double() @ a.double()) for w, b, a in zip(c, B, A, strict=True))


# (ranks, m, n): the core of two triangles where the ranks sum to little, strips of rows where they do not
SHAPES = {
    "core": ([2, 3], 40, 60),
    "strips": ([8, 3, 16], 40, 33),
    "one row": ([2], 1, 9),
    "rank 0": ([0, 2], 30, 20),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_of_the_stored_values(dtype, shape, layout):
    ranks, m, n = SHAPES[shape]
    B, A = draw(ranks, [(m, n)], dtype, layout=layout)
    c = torch.randn(len(ranks), dtype=torch.float64)
    (norm,) = lowrank_norm(B, A, [c])
    assert norm.dtype == torch.float64
    assert norm.ndim == 0
    assert abs(norm - dense(B[0], A[0], c).norm()) <= 1e-13 * norm


@pytest.mark.parametrize("shape", ["core", "strips"])
@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-12])
def test_a_small_difference_keeps_its_digits(shape, size):
    """An estimate that misses the sum by ``size``: the norm of the rest is right to eps / size, not to its square.

    Entries of the two terms cancel with an error of some 10 eps each; squares would have lost everything below 1e-8.
    """
    ranks, m, n = SHAPES[shape]
    B, A = draw(ranks, [(m, n)], torch.float64)
    c = torch.rand(len(ranks), dtype=torch.float64) + 0.5
    left = torch.cat([w * b for w, b in zip(c, B[0], strict=True)], 1)
    u, v = torch.randn(m, 1, dtype=torch.float64), torch.randn(1, n, dtype=torch.float64)
    whole = dense(B[0], A[0], c).norm()
    miss = u @ v * (size * whole / (u @ v).norm())
    estimate_B, estimate_A = torch.cat([left, miss @ v.T / (v @ v.T)], 1), torch.cat([*A[0], v], 0)
    (norm,) = lowrank_norm(
        [[*B[0], estimate_B]], [[*A[0], estimate_A]], [torch.cat([c, -torch.ones(1, dtype=torch.float64)])]
    )
    assert abs(float(norm / whole) / size - 1) <= 1e-14 / size + 1e-9


def test_strips_are_folded_together(monkeypatch):
    monkeypatch.setattr(importlib.import_module("fedgram.kernels.lowrank_norm"), "STRIP_BYTES", 8 * 33 * 7)
    B, A = draw([20], [(40, 33)], torch.float64)
    c = torch.ones(1, dtype=torch.float64)
    (norm,) = lowrank_norm(B, A, [c])
    assert abs(norm - dense(B[0], A[0], c).norm()) <= 1e-13 * norm


@pytest.mark.parametrize("strip_bytes", [8 * 33 * 7, 8 * 5, 1 << 28])
@pytest.mark.parametrize(
    "types", [(torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float32, torch.float64, torch.float16)]
)
def test_strips_where_launches_cost(monkeypatch, strip_bytes, types):
    """What a GPU does: few strips, rows of them or of columns too, and clients of one type weighted together."""
    module = importlib.import_module("fedgram.kernels.lowrank_norm")
    monkeypatch.setattr(module, "launches_cost", lambda device: True)
    monkeypatch.setattr(module, "STRIP_BYTES_GPU", strip_bytes)
    monkeypatch.setattr(module, "CORE_SHARE", 1 << 20)  # strips, not the core, as on a GPU
    (drawn_B,), (drawn_A,) = draw([8, 3, 16], [(40, 33)], torch.float64)
    B, A = ([x.to(dtype) for x, dtype in zip(side, types, strict=True)] for side in (drawn_B, drawn_A))
    c = torch.randn(3, dtype=torch.float64)
    (norm,) = lowrank_norm([B], [A], [c])
    assert abs(norm - dense(B, A, c).norm()) <= 1e-13 * norm


@pytest.mark.parametrize(("ranks", "m", "n"), [([0], 3, 4), ([2], 0, 4), ([2], 3, 0)])
def test_empty_sums_are_zero(ranks, m, n):
    B, A = draw(ranks, [(m, n)], torch.float32)
    (norm,) = lowrank_norm(B, A, [torch.ones(1, dtype=torch.float64)])
    assert float(norm) == 0


def test_many_modules_at_once():
    B, A = draw([2, 3], [(10, 50), (60, 70)], torch.float32)
    c = [torch.rand(2, dtype=torch.float64) for _ in B]
    norms = lowrank_norm(B, A, c)
    assert [float(n) for n in norms] == [float(lowrank_norm([b], [a], [w])[0]) for b, a, w in zip(B, A, c, strict=True)]
    assert lowrank_norm([], [], []) == []


z = torch.zeros
BAD = {
    "coefficients: 0 modules, B has 1": ([[z(3, 2)]], [[z(2, 4)]], []),
    r"coefficients\[0\]: expected float64 \(1,\), got \(1,\) torch.float32": ([[z(3, 2)]], [[z(2, 4)]], [z(1)]),
    r"A\[0\]\[0\]: rank 3": ([[z(3, 2)]], [[z(3, 4)]], [z(1).double()]),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_input_is_named(reason):
    with pytest.raises(ValueError, match=reason):
        lowrank_norm(*BAD[reason])


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize(("m", "n"), [(700, 600), (20, 33)])
def test_clients_that_share_a_factor_count_as_one(side, others, m, n):
    """A frozen A or B: the same norm, and of what cancels between the clients the digits that numbers have."""
    B, A = draw([4] * (3 + others), [(m, n)], torch.float32)
    shared = A if side == "A" else B
    shared[0][1:3] = [shared[0][0].clone(), shared[0][0]]
    c = torch.linspace(-1, 2, 3 + others, dtype=torch.float64)
    (norm,) = lowrank_norm(B, A, [c])
    assert abs(norm - dense(B[0], A[0], c).norm()) <= 1e-13 * norm
    free = B if side == "A" else A
    free[0][1] = free[0][0] * (1 + 2**-20)
    c[:2], c[2:] = torch.tensor([1.0, -1.0]), 0.0
    (left,) = lowrank_norm(B, A, [c])
    b, a = ([x.double() for x in factors[0][:2]] for factors in (B, A))
    rest = (b[0] - b[1]) @ a[0] if side == "A" else b[0] @ (a[0] - a[1])
    assert left == pytest.approx(float(rest.norm()), rel=1e-12)
