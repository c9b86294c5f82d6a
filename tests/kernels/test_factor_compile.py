"""The factor operations inside ``torch.compile``: registered, traced whole, and equal to the eager call."""

import importlib

import pytest
import torch
from torch.library import opcheck

from fedgram.kernels import factor_combine, factor_cross, factor_gram, lowrank_sum
from fedgram_testing.factor_ops import BACKENDS, draw

pytestmark = pytest.mark.filterwarnings("default")  # what torch.compile warns about depends on its version


def op(name, of):
    return getattr(importlib.import_module(f"fedgram.kernels.{of}"), name)


RANKS, MODULES = (3, 4), [(20, 9), (17, 11)]
B, A = draw(RANKS, MODULES, torch.float32)
P, Q = [torch.randn(7, 2).double(), torch.randn(2).double()], [torch.randn(2, 7).double(), torch.randn(2).double()]
X_B, X_A = [torch.randn(20, 2), torch.randn(17, 3)], [torch.randn(2, 9), torch.randn(3, 11)]
W, c = torch.randn(20, 9), torch.randn(2).double()

CALLS = {
    "gram": lambda backend: factor_gram(B, A, backend=backend),
    "gram precise": lambda backend: factor_gram(B, A, precise=True, backend=backend),
    "cross": lambda backend: factor_cross(B, A, X_B, X_A, backend=backend),
    "cross of one side": lambda backend: factor_cross(None, A, None, X_A, backend=backend),
    "combine": lambda backend: factor_combine(B, A, P, Q, backend=backend),
    "combine of one side": lambda backend: factor_combine(B, None, P, None, dtype=torch.bfloat16, backend=backend),
    "sum": lambda backend: lowrank_sum(W, B[0], A[0], c, beta=0.3, backend=backend),
    "sum without W": lambda backend: lowrank_sum(None, B[0], A[0], c, backend=backend),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    elif a is None:
        assert b is None
    else:
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("call", CALLS)
def test_compiled_calls_are_traced_whole_and_equal_the_eager_ones(call, compiler, backend):
    torch.compiler.reset()
    same(CALLS[call](backend), torch.compile(CALLS[call], fullgraph=True, backend=compiler)(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_sum_in_place(backend):
    torch.compiler.reset()

    def add(W, out):
        lowrank_sum(W, B[0], A[0], c, out=out, backend=backend)
        return out * 2

    expected = lowrank_sum(W, B[0], A[0], c, backend=backend)
    for make in (lambda W: W, torch.empty_like):
        start = W.clone()
        out = make(start)
        doubled = torch.compile(add, fullgraph=True, backend="aot_eager")(start, out)
        assert torch.equal(out, expected)
        assert torch.equal(doubled, expected * 2)


def test_compiled_bad_input_is_refused():
    torch.compiler.reset()
    with pytest.raises(Exception, match="modules, B has"):
        torch.compile(lambda: factor_gram(B, A[:1]), fullgraph=True, backend="eager")()


OPS = {
    "gram": ("_factor_gram_op", "factor_gram", lambda backend: (B[0], A[0], [2], False, backend)),
    "cross": (
        "_factor_cross_op",
        "factor_cross",
        lambda backend: (B[0], A[0], X_B[:1], X_A[:1], [2], [2], False, False, False, backend),
    ),
    "combine": (
        "_factor_combine_op",
        "factor_combine",
        lambda backend: (B[0] + B[1], A[0] + A[1], P, Q, [2, 2], [2, 2], False, False, None, backend),
    ),
    "combine of one side": (
        "_factor_combine_op",
        "factor_combine",
        lambda backend: ([], A[0], [], Q[:1], [], [2], True, False, torch.bfloat16, backend),
    ),
    "sum": ("_lowrank_sum_op", "lowrank_sum", lambda backend: (W, B[0], A[0], c, 0.3, backend)),
    "sum without W": ("_lowrank_sum_op", "lowrank_sum", lambda backend: (None, B[0], A[0], c, 1.0, backend)),
    "sum into": (
        "_lowrank_sum_out_op",
        "lowrank_sum",
        lambda backend: (W.clone(), None, B[0], A[0], c, 1.0, True, backend),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_registrations_are_sound(name, backend):
    function, of, arguments = OPS[name]
    opcheck(op(function, of), arguments(backend))
