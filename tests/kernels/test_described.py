"""Factors described once: the same results from every operation, parts and unions, and errors that name the tensor."""

import pytest
import torch

from fedgram.kernels import Described, described, factor_combine, factor_cross, factor_gram, native_calls, prepare
from fedgram.kernels._stacks import Stacks
from fedgram_testing.factor_ops import BACKENDS, SHAPES, draw, garbage

__all__ = ["garbage"]
built = pytest.mark.skipif(native_calls.missing() is not None, reason=str(native_calls.missing()))


def equal(found, wanted):
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted, strict=True):
        assert torch.equal(f, w)


def everything(B, A, backend="auto"):
    P = [torch.ones(sum(b.shape[1] for b in bs), 3, dtype=torch.float64) for bs in B]
    X = [torch.ones(bs[0].shape[0], 2) for bs in B], [torch.ones(2, as_[0].shape[1]) for as_ in A]
    found = [factor_gram(B, A, backend=backend), factor_cross(B, A, *X, backend=backend)]
    found.append(factor_combine(B, A, P, [p.T for p in P], backend=backend))
    return [t for pair in found for side in pair for t in side]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("case", SHAPES)
def test_operations_do_not_tell_them_from_lists(case, backend, garbage):
    ranks, modules = SHAPES[case]
    B, A = draw(ranks, modules, torch.float32)
    once = described(B, A)
    equal(everything(once.B, once.A, backend), everything(B, A, backend))


def test_some_of_the_modules_and_the_modules_of_several(garbage):
    B, A = draw([2, 4, 8], [(40, 30), (64, 7), (5, 90), (33, 33)], torch.bfloat16)
    once = described(B, A)
    some = once.pick([2, 0])
    equal(everything(some.B, some.A), everything([B[2], B[0]], [A[2], A[0]]))
    assert once.pick(range(4)) is once
    both = Described.joined([some, once.pick([3])])
    equal(everything(both.B, both.A), everything([B[2], B[0], B[3]], [A[2], A[0], A[3]]))
    assert Described.joined([once]) is once


def test_numbers_that_change_are_seen(garbage):
    B, A = draw([2, 4], [(40, 30)], torch.float32)
    once = described(B, A)
    B[0][0] += 1
    equal(everything(once.B, once.A), everything(B, A))


@built
def test_prepared_factors_are_described_once_and_still_watched(monkeypatch, garbage):
    B, A = draw([2, 4], [(40, 30)], torch.float32)
    kept, made = prepare(B, A), []
    init = Stacks.__init__
    monkeypatch.setattr(Stacks, "__init__", lambda self, *a, **k: (made.append(1), init(self, *a, **k))[1])
    factor_gram(kept.B, kept.A)
    factor_gram(kept.B, kept.A)
    assert len(made) == 2
    B[0][0].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"B\[0\]\[0\]: its memory was moved or freed"):
        factor_gram(kept.B, kept.A)


BAD = {
    r"B\[0\]\[1\]: dimension 0 is 39, client 0 has 40": lambda B, A: B[0].__setitem__(1, B[0][1][1:]),
    r"A\[1\]\[0\]: expected a float matrix, got \(2, 7\) torch.int64": lambda B, A: A[1].__setitem__(0, A[1][0].long()),
    r"B\[1\]\[1\]: expected a float matrix, got \(256,\)": lambda B, A: B[1].__setitem__(1, B[1][1].flatten()),
    r"A\[0\]\[1\]: rank 3, B\[0\]\[1\] has rank 4": lambda B, A: A[0].__setitem__(1, A[0][1][1:]),
    r"A: 1 modules, B has 2": lambda B, A: A.pop(),
    r"A\[1\]: 1 clients, B\[1\] has 2": lambda B, A: A[1].pop(),
    r"B\[0\]: expected a sequence of at least one client's tensor": lambda B, A: B.__setitem__(0, []),
    r"tensors lie on several devices: cpu, meta": lambda B, A: A[1].__setitem__(1, A[1][1].to("meta")),
}


@built
@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("make", [described, factor_gram])
def test_what_does_not_fit_is_named(message, make, garbage):
    B, A = draw([2, 4], [(40, 30), (64, 7)], torch.float32)
    BAD[message](B, A)
    with pytest.raises(ValueError, match=message):
        make(B, A)
