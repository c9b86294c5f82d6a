"""NaN and Inf in gradients reach the result on every path, also with the NaN that GPUs return."""

import pytest
import torch

from fedgram.kernels import grad_gram
from fedgram_testing.gradients import ALL_BACKENDS, gradients

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fedgram.kernels import _grad_gram_triton  # noqa: E402
from fedgram.kernels._triton_split import split_bf16, split_tf32  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
CANONICAL = 0x7FFFFFFF  # what float32 operations on NVIDIA GPUs return for any NaN
LARGEST = 0x7F7FFFFF


@triton.jit
def as_on_a_gpu(e):
    return tl.where(e == e, e.to(tl.int32, bitcast=True), 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def split_bf16_on_a_gpu(e, INTERPRET: tl.constexpr):
    return split_bf16(as_on_a_gpu(e), INTERPRET)


@triton.jit
def split_tf32_on_a_gpu(e):
    return split_tf32(as_on_a_gpu(e))


@triton.jit
def parts_kernel(p, q, N: tl.constexpr, INTERPRET: tl.constexpr):
    i = tl.arange(0, N)
    high, low = split_bf16(tl.load(p + i), INTERPRET)
    tl.store(q + i, high.to(tl.float32))
    tl.store(q + N + i, low.to(tl.float32))


@pytest.mark.parametrize("rounds", [False, True])
def test_parts_of_a_number_are_finite_only_where_it_is(rounds):
    """``rounds``: whether the lower part is rounded before the interpreter cuts it, which a GPU does not need."""
    special = torch.tensor([CANONICAL, 0x7FC00000, 0x7F800000, -0x800000, LARGEST], dtype=torch.int32)
    numbers = torch.randn(251, generator=torch.Generator().manual_seed(0)) * 1e3
    out = torch.empty(2, 256)
    parts_kernel[(1,)](torch.cat([special.view(torch.float32), numbers]), out, N=256, INTERPRET=rounds)
    assert not (out[0, :5] * out[0, :5] + out[1, :5] * out[1, :5]).isfinite().any()
    error = (out.double().sum(0)[5:] - numbers.double()).abs()
    assert bool((error <= numbers.abs() * 2.0 ** (-17 if rounds else -16)).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("K", [5, 16, 65])  # with a row to spare and without, and several tiles
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_gram_of_what_is_not_finite_is_not(backend, K, dtype, value, monkeypatch):
    monkeypatch.setattr(_grad_gram_triton, "split_bf16", split_bf16_on_a_gpu)
    monkeypatch.setattr(_grad_gram_triton, "split_tf32", split_tf32_on_a_gpu)
    G = gradients(K, [(40,)], dtype)
    G[1][0][7] = value
    assert not any(t.isfinite().any() for t in grad_gram(G, backend=backend))
