"""Kernels touch no memory but that of tensors; and the memory checker sees what it is for."""

import pytest
import torch

from fedgram import kernels
from fedgram.kernels._dispatch import triton_missing
from fedgram_testing import bounds
from fedgram_testing.factor_ops import LAYOUTS, SHAPES, TYPES, draw
from fedgram_testing.gradients import gradients

if triton_missing() is not None:
    pytest.skip(str(triton_missing()), allow_module_level=True)

import triton
from triton import language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels do not run in the interpreter")


@pytest.fixture(autouse=True)
def memory_is_watched(monkeypatch):
    bounds.guard(monkeypatch)


@triton.jit
def copy(source, to, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at, mask=at < n), mask=at < n)


def test_a_kernel_that_stays_inside_is_let_through():
    x, y = torch.randn(13), torch.zeros(13)
    copy[(1,)](x, y, 13, BLOCK=16)
    assert torch.equal(x, y)
    part = torch.zeros(20)
    copy[(1,)](x, part[3:16], 13, BLOCK=16)
    assert torch.equal(part[3:16], x)


@pytest.mark.parametrize(("lengths", "what"), [((13, 12), "a store"), ((12, 13), "a load"), ((13, 0), "a store")])
def test_one_element_too_many_is_an_error(lengths, what):
    x, y = (torch.zeros(n) for n in lengths)
    with pytest.raises(Exception, match=f"{what} of .* outside any tensor's memory"):
        copy[(1,)](x, y, 13, BLOCK=16)


def operate_on_factors(B, A):
    """Every operation on factors that has a Triton kernel."""
    P = [torch.randn(sum(b.shape[1] for b in bs), 3, dtype=torch.float64) for bs in B]
    p = [torch.randn(len(bs), dtype=torch.float64) for bs in B]
    kernels.factor_gram(B, A, backend="triton")
    kernels.factor_combine(B, A, p, p, backend="triton")
    X = kernels.factor_combine(B, A, P, [x.T.contiguous() for x in P], backend="triton")
    kernels.factor_cross(B, A, *X, backend="triton")
    for bs, as_ in zip(B, A, strict=True):
        W = torch.randn(bs[0].shape[0], as_[0].shape[1]).to(bs[0].dtype)
        kernels.lowrank_sum(W, bs, as_, torch.ones(len(bs), dtype=torch.float64), backend="triton")


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("dtype", TYPES[:2])
def test_factors_of_any_shape(case, dtype):
    operate_on_factors(*draw(*SHAPES[case], dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_in_any_layout(layout):
    operate_on_factors(*draw([8, 3], [(48, 40), (33, 17)], torch.bfloat16, layout=layout))


@pytest.mark.parametrize("K", [1, 3, 20])
@pytest.mark.parametrize("dtype", TYPES[:2])
def test_gradients(K, dtype):
    G = gradients(K, dtype=dtype)
    kernels.grad_gram(G, backend="triton")
    kernels.grad_combine(G, torch.ones(K, dtype=torch.float64), backend="triton")


@pytest.mark.parametrize("offsets", [[0, 3, 3, 10, 37], [0, 1]])
@pytest.mark.parametrize("dtype", TYPES[:2])
def test_inputs_and_output_gradients(offsets, dtype):
    N = offsets[-1]
    kernels.ghost_gram(torch.randn(N, 19).to(dtype), torch.randn(N, 7).to(dtype), offsets, bias=True, backend="triton")


def test_rows_of_classes():
    kernels.subset_select(torch.randn(33, 13), [0, 5, 5, 33], [2, 0, 7], backend="triton")
