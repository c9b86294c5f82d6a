"""Prepared factors and slabs: the results of plain lists, and never a plan for what the tensors no longer are."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgram import kernels
from fedgram.kernels import _prepared
from fedgram_testing.factor_ops import BACKENDS, draw

MODULES = [(20, 9), (17, 11)]
RANKS = (3, 0, 4)


def flat(*sides):
    return [t for side in sides for item in side for t in ([item] if isinstance(item, torch.Tensor) else item)]


def operations(B, A, backend):
    """Every operation that takes prepared factors, all outputs in one list."""
    R, U = sum(b.shape[1] for b in B[0]), len(B[0])
    random = torch.Generator().manual_seed(0)
    P = [torch.randn(R, 2, generator=random, dtype=torch.float64) for _ in B]
    q = [torch.randn(U, generator=random, dtype=torch.float64) for _ in A]
    X_B = [torch.randn(b[0].shape[0], 2, generator=random) for b in B]
    X_A = [torch.randn(3, a[0].shape[1], generator=random) for a in A]
    return flat(
        *kernels.factor_gram(B, A, backend=backend),
        *kernels.factor_cross(B, A, X_B, X_A, backend=backend),
        *kernels.factor_combine(B, A, P, q, backend=backend),
        *kernels.factor_combine(B, None, P, None, backend=backend)[:1],
        *kernels.factor_cross(None, A, None, X_A, backend=backend)[1:],
    )


def same(x, y):
    assert len(x) == len(y)
    for a, b in zip(x, y, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_factors_give_the_bits_of_plain_lists(backend):
    B, A = draw(RANKS, MODULES, torch.bfloat16)
    f = kernels.prepare(B, A)
    same(operations(f.B, f.A, backend), operations(B, A, backend))
    with f.held():
        same(operations(f.B, f.A, backend), operations(B, A, backend))
    same(operations(f.B, A, backend), operations(B, A, backend))  # one side prepared, the other not


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_written_later_are_seen(backend):
    B, A = draw(RANKS, MODULES, torch.float32)
    f = kernels.prepare(B, A)
    operations(f.B, f.A, backend)
    for t in flat(B, A):
        t.mul_(-2).add_(1)
    same(operations(f.B, f.A, backend), operations(B, A, backend))


def grow(t):
    t.untyped_storage().resize_(t.untyped_storage().nbytes() + (1 << 22))


def free(t):
    t.untyped_storage().resize_(0)


@pytest.mark.parametrize("change", [grow, free])
def test_moved_or_freed_memory_is_refused(change):
    B, A = draw((3, 4), MODULES, torch.float32)
    f = kernels.prepare(B, A)
    where = A[1][1].data_ptr()
    change(A[1][1])
    if A[1][1].data_ptr() == where:
        pytest.skip("the allocator grew it in place")
    with pytest.raises(ValueError, match=r"A\[1\]\[1\]: its memory was moved or freed"):
        kernels.factor_gram(f.B, f.A, backend="triton")
    with pytest.raises(ValueError, match=r"A\[1\]\[1\]"), f.held():
        pass
    kernels.factor_combine(f.B, None, [torch.ones(2).double()] * 2, None, backend="triton")  # the other side is whole


def retyped(t):
    t.data = t.data.double()


def reshaped(t):
    t.data = torch.zeros(5, 7)


def emptied(t):
    t.resize_(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [retyped, reshaped, emptied, torch.Tensor.t_])
def test_what_becomes_of_the_callers_tensors_does_not_reach_a_plan(change, backend):
    """Another type, shape, stride or memory of the caller's tensors: what was prepared stays what it was."""
    B, A = draw((3, 4), MODULES, torch.float32)
    kept = [[t.clone() for t in clients] for clients in B], [[t.clone() for t in clients] for clients in A]
    f = kernels.prepare(B, A)
    for t in flat(B, A):
        change(t)
    same(operations(f.B, f.A, backend), operations(*kept, backend))
    del B, A, t
    gc.collect()
    torch.full((1 << 16,), torch.nan)  # would land in memory that had been given back
    same(operations(f.B, f.A, backend), operations(*kept, backend))


MUTATIONS = {
    "transposed": lambda t: t.set_(t.T.contiguous().T),
    "moved": lambda t: t.set_(t.clone()),
    "misaligned": lambda t: t.set_(torch.zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)),
    "strided": lambda t: t.set_(torch.zeros(t.shape[0], t.shape[1] + 3)[:, 1:-2].copy_(t)),
    "written": lambda t: t.neg_(),
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(MUTATIONS)), st.integers(0, 3)), min_size=1, max_size=3))
def test_plans_follow_tensors_that_change_in_place(mutations):
    """The same tensor objects in the same lists, changed between calls: results are those of fresh copies."""
    B, A = draw((2, 3), MODULES[:1], torch.float32)
    kernels.factor_gram(B, A, backend="triton")
    for name, index in mutations:
        MUTATIONS[name](flat(B, A)[index])
        fresh = [[t.clone() for t in clients] for clients in B], [[t.clone() for t in clients] for clients in A]
        found, truth = (kernels.factor_gram(*pair, backend="triton") for pair in ((B, A), fresh))
        for x, y in zip(flat(found), flat(truth), strict=True):
            # another layout may sum in another order: float32 chains of at most 20 products
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_repeated_operation_builds_nothing(monkeypatch):
    """Neither checks nor plans nor address tables, for the same prepared factors and for others of their layout."""
    f, g = (kernels.prepare(*draw((3, 4), MODULES, torch.float32)) for _ in range(2))
    operations(f.B, f.A, "triton")
    operations(g.B, g.A, "triton")

    def refuse(*_):
        raise AssertionError("surveyed again")

    monkeypatch.setattr("fedgram.kernels._factor_gram_plan.GramPlan.__init__", refuse)
    monkeypatch.setattr("fedgram.kernels._factor_combine_plan.CombinePlan.__init__", refuse)
    monkeypatch.setattr(_prepared.PreparedSide, "__init__", refuse)
    operations(f.B, f.A, "triton")
    operations(g.B, g.A, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [(3, 5), ((1, 8), (0, 2), (3, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slab_gives_the_bits_of_the_factors_put_into_it(backend, ranks, dtype):
    slab = kernels.FactorSlab(MODULES, ranks, dtype=dtype)
    per_client = [[r] * 2 if isinstance(r, int) else r for r in ranks]
    random = torch.Generator().manual_seed(3)

    def made(*shape):
        return torch.randn(shape, generator=random).to(dtype)

    B = [[made(m, r[l]) for r in per_client] for l, (m, _) in enumerate(MODULES)]
    A = [[made(r[l], n) for r in per_client] for l, (_, n) in enumerate(MODULES)]
    f = slab.factors
    kernels.factor_gram(f.B, f.A, backend=backend)  # before anything has arrived
    for u in reversed(range(len(ranks))):
        slab.put(u, [b[u] for b in B], [a[u] for a in A])
    for side, put in ((f.B, B), (f.A, A)):
        assert all((t.data_ptr() - slab.buffer.data_ptr()) % 128 == 0 for t in flat(side) if t.numel())
        same(flat(side), flat(put))
    for x, y in zip(kernels.factor_gram(f.B, f.A, backend=backend), kernels.factor_gram(B, A, backend=backend)):  # noqa: B905
        for a, b in zip(x, y, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)  # alignment may change the variant, so the order


def test_a_client_of_a_slab_is_one_stretch():
    slab = kernels.FactorSlab(MODULES, (2, 4))
    other = kernels.FactorSlab(MODULES, (2, 4))
    for t in flat(slab.factors.B, slab.factors.A):
        t.normal_()
    for u in range(2):
        other.client(u).copy_(slab.client(u))
    same(flat(other.factors.B, other.factors.A), flat(slab.factors.B, slab.factors.A))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kernels.FactorSlab([], [2]), "at least one of each"),
        (lambda: kernels.FactorSlab([(2, 3)], [[1, 2]]), r"ranks\[0\]: expected one rank for each of 1 modules"),
        (lambda: kernels.FactorSlab([(-1, 3)], [1]), "sizes of at least 0"),
        (lambda: kernels.FactorSlab([(2, 3)], [1], dtype=torch.int32), "expected a float type"),
        (lambda: kernels.FactorSlab([(2, 3)], [1]).put(0, [], []), "B: 0 modules, the slab has 1"),
        (
            lambda: kernels.FactorSlab([(2, 3)], [1]).put(0, [torch.ones(2, 2)], [torch.ones(1, 3)]),
            r"B\[0\] of client 0: \(2, 2\), the slab has \(2, 1\)",
        ),
        (lambda: kernels.prepare([[torch.ones(2, 3)]], [[torch.ones(2, 3)]]), r"A\[0\]\[0\]: rank 2"),
    ],
)
def test_bad_slabs_and_factors_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_empty_factors_are_not_looked_at_on_every_call(monkeypatch):
    """They have no address, as those have none whose memory is gone."""
    B, A = [[torch.empty(20, 0), torch.rand(20, 2)]], [[torch.empty(0, 9), torch.rand(2, 9)]]
    f = kernels.prepare(B, A)
    monkeypatch.setattr("fedgram.kernels._memory._check", lambda *_: pytest.fail("looked at"))
    assert _prepared.inventory(f.B, f.A)[1].tolist() == [0, B[0][1].data_ptr(), 0, A[0][1].data_ptr()]
