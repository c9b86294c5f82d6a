import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedgram.kernels import grad_gram
from fedgram.kernels._grad_inputs import column_blocks, exact_product_type, flat_range, memory_order
from fedgram.kernels.grad_gram import GradGram
from fedgram.stamp import solve_dual
from fedgram_testing.gradients import (
    ALL_BACKENDS,
    CPU_BACKENDS,
    SHAPES,
    TYPES,
    errors,
    garbage,
    gradients,
    threads,
    triple,
)

# The promise of the operation: float32 products of short chains, 2e-6; float64 throughout leaves rounding of
# sums of some 500 terms, far below 1e-12.
PROMISE, PRECISE = 2e-6, 1e-12

__all__ = ["garbage"]


def weights(K):
    return torch.linspace(0.5, 2, K)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


CASES = [
    (b, t, K)
    for b in ALL_BACKENDS
    for t in TYPES
    for K in (1, 2, 5, 16, 20, 32, 64, 70)  # a Triton tile of 16, 32 or 64 tasks with a row to spare, and without
    if b != "triton" or K < 64 or t.itemsize > 2
]


@pytest.mark.parametrize(("backend", "dtype", "K"), CASES)
def test_triple_is_that_of_the_stored_values(backend, dtype, K, garbage):
    G = gradients(K, dtype=dtype)
    got = grad_gram(G, weights(K), backend=backend)
    assert isinstance(got, GradGram)
    assert max(errors(got, G, weights(K))) < (PRECISE if dtype is torch.float64 else PROMISE)
    assert [t.dtype for t in got] == [torch.float64] * 3
    assert [tuple(t.shape) for t in got] == [(), (K,), (K, K)]
    assert torch.equal(got.H, got.H.T)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("K", [5, 16, 32, 33, 64])
def test_precise_multiplies_in_float64(backend, K, garbage):
    G = gradients(K)
    assert max(errors(grad_gram(G, precise=True, backend=backend), G)) < PRECISE


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_types_may_differ_between_parameters(backend, garbage):
    narrow, wide = gradients(3, [(40, 7)], torch.bfloat16), gradients(3, [(300,), (2,)], seed=1)
    G = [a + b for a, b in zip(narrow, wide, strict=True)]
    assert max(errors(grad_gram(G, backend=backend), G)) < PROMISE


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [3, 66])
def test_a_small_spread_about_a_large_common_part_survives(backend, dtype, K):
    G = gradients(K, [(3000 if K == 3 else 300,)], dtype, common=1.0, spread=1e-4 if dtype is torch.float32 else 3e-3)
    assert errors(grad_gram(G, backend=backend), G)[2] < PROMISE


@pytest.mark.parametrize("columns", [1, 6])
def test_bf16_of_few_columns_on_triton(columns):
    """Two parts hold 2^-18 of a number, which few columns do not average out; ``precise`` has no such parts."""
    G = gradients(5, [(columns,)], torch.bfloat16)
    e = torch.stack([g[0].double() for g in G])
    e -= e.mean(0)
    s = e.norm(dim=1)
    error = (grad_gram(G, backend="triton").H - e @ e.T).abs()
    assert bool((error <= 1e-5 * (s[:, None] + s.mean()) * (s[None] + s.mean())).all())
    error = (grad_gram(G, precise=True, backend="triton").H - e @ e.T).abs()
    assert bool((error <= 1e-7 * (s[:, None] + s.mean()) * (s[None] + s.mean())).all())


def test_matching_weights_are_right_to_1e_5_where_a_plain_float32_gram_is_off():
    G = gradients(4, [(1_000_000,)], common=1.0, spread=1e-4)
    exact = solve_dual(_dense(triple(G)), 0.25).weights
    ours = solve_dual(_dense(grad_gram(G)), 0.25).weights
    F = torch.stack([g[0] for g in G])
    plain = solve_dual((F @ F.T).double(), 0.25).weights
    assert float((ours - exact).abs().max()) < 1e-5
    assert float((plain - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_products_of_one_sign_are_added_up_in_short_chains(backend):
    """All products are one number, which a float32 sum rounds the same way each time: long chains would lose 3e-6."""
    third = torch.full((3_000_000,), 1 / 3)
    G = [[third], [-third]]
    assert errors(grad_gram(G, backend=backend), G)[2] < PROMISE


def _dense(t):
    n0, h, H = t
    return n0 + h[:, None] + h[None, :] + H


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shapes", [[], [(0,)], [(3, 0), ()]])
def test_hardly_anything_to_multiply(backend, shapes, garbage):
    G = gradients(3, shapes)
    got = grad_gram(G, backend=backend)
    assert all(torch.isfinite(t).all() for t in got)
    assert max(errors(got, G)) < PROMISE


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_zero_and_identical_tasks(backend, garbage):
    one = gradients(1)[0]
    zeros = grad_gram([[torch.zeros_like(t) for t in one]] * 3, backend=backend)
    assert all(not t.any() for t in zeros)
    same = grad_gram([one] * 3, torch.tensor([1.0, 5.0, 3.0]), backend=backend)
    # the centre is off by a float32 rounding, at most 1e-7 of it, and its square is all that is left
    assert float(same.H.abs().max()) < 1e-14 * float(same.n0)
    G = [one, [torch.zeros_like(t) for t in one], gradients(1, seed=2)[0]]
    assert max(errors(grad_gram(G, backend=backend), G)) < PROMISE


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_bits_repeat_and_do_not_follow_the_scale_of_the_weights(backend):
    G = gradients(6)
    first = grad_gram(G, weights(6), backend=backend)
    assert equal(first, grad_gram(G, weights(6), backend=backend))
    assert equal(first, grad_gram(G, 4 * weights(6), backend=backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize(("K", "d"), [(1, 70), (2, 3001), (5, 40_000), (20, 150_001), (63, 30_000), (100, 20_000)])
def test_bits_do_not_follow_the_number_of_threads(K, d, precise, backend):
    G = gradients(K, [(d - 17,), (17,)])
    results = []
    for count in (1, 2, 3, 4, 8):
        with threads(count):
            results.append(grad_gram(G, weights(K), precise=precise, backend=backend))
    assert all(equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_any_strides(backend, garbage):
    base = [torch.randn(21, 36, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    views = {
        "transposed": [b.T for b in base],
        "every second": [b[:, ::2] for b in base],
        "expanded": [b[:, :1].expand(21, 9) for b in base],
        "misaligned": [b.view(-1)[1:701] for b in base],
        "of unlike strides": [base[0], base[1].T.contiguous().T, base[2][:, torch.arange(36)]],
        "contiguous for the first task only": [
            base[0].view(-1)[:30],
            base[1].view(-1)[::25][:30],
            base[2][0, 0].expand(30),
        ],
        "channels last": [b.view(2, 3, 6, 21).contiguous(memory_format=torch.channels_last) for b in base],
    }
    for name, tensors in views.items():
        G = [[t] for t in tensors]
        assert max(errors(grad_gram(G, backend=backend), G)) < PROMISE, name
    G = [list(ts) for ts in zip(*views.values(), strict=True)]
    assert max(errors(grad_gram(G, backend=backend), G)) < PROMISE


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("precise", [False, True])
def test_a_task_at_the_mean_is_at_no_negative_distance(backend, precise):
    """What is left of it is rounding, of either sign."""
    random = torch.Generator().manual_seed(0)
    for K in (3, 16, 17):
        g, apart = torch.randn(200, generator=random), 10 * torch.randn((K - 1) // 2, 200, generator=random)
        G = [[row] for row in (g, *(g + apart), *(g - apart))]
        concentrated = torch.full((len(G),), 1e-9)
        concentrated[0] = 1.0
        for u in (None, concentrated):
            got = grad_gram(G, u, precise=precise, backend=backend)
            assert bool((got.H.diagonal() >= 0).all())
            assert errors(got, G, u)[0] < PROMISE


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_views_that_negate_their_memory(backend):
    z = torch.complex(*torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)))
    G = [[t, t[3]] for t in (z[0].conj().imag, z[1].imag, z[2].conj().imag)]
    assert G[0][1].is_neg()
    assert max(errors(grad_gram(G, backend=backend), G)) < PROMISE


def test_blocks_of_columns_join_small_tensors_and_cut_large_ones(monkeypatch):
    shapes = [(7,), (5000,), (3, 3), (0,), (2048,), (1,), (77, 91)]
    G = gradients(4, shapes)
    G[2][6] = G[2][6].T.contiguous().T  # read piece by piece through its strides
    monkeypatch.setattr(importlib.import_module("fedgram.kernels.grad_gram"), "BLOCK_BYTES", {"cpu": 1})
    assert max(errors(grad_gram(G, backend="torch"), G)) < PROMISE
    for size in (1, 3, 64, 2048):
        blocks = column_blocks(tuple(t.numel() for t in G[0]), size)
        columns = [(p, c) for block in blocks for p, start, stop in block for c in range(start, stop)]
        assert columns == [(p, c) for p, t in enumerate(G[0]) for c in range(t.numel())]
        assert all(sum(stop - start for _, start, stop in block) == size for block in blocks[:-1])


def test_flat_range_is_row_major_order():
    t = torch.arange(2 * 3 * 4 * 5).view(5, 4, 3, 2).permute(3, 1, 0, 2)
    flat = t.reshape(-1)
    assert memory_order([t, t.contiguous()]) is None
    assert all(torch.equal(flat_range(t, a, b), flat[a:b]) for a in range(0, 120, 7) for b in range(a + 1, 121))


class Allocations(TorchDispatchMode):
    """Bytes of the storages made within."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_are_neither_stacked_nor_copied(backend):
    K, d = 4, 4_000_000
    G = [[torch.ones(d // 2), torch.ones(d // 2, dtype=torch.bfloat16)] for _ in range(K)]
    inputs = {t.untyped_storage().data_ptr() for g in G for t in g}
    with Allocations() as made:
        grad_gram(G, backend=backend)
    extra = sum(size for place, size in made.bytes.items() if place not in inputs)
    assert extra < 6 << 20  # one block of 4 MiB, and small matrices; the gradients are 48 MiB


def test_switches_of_the_user_do_not_reach_the_products():
    G = gradients(4, [(5000,)])
    plain = grad_gram(G)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(plain, grad_gram(G))
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert exact_product_type(torch.device("cpu")) is torch.float64
        assert max(errors(grad_gram(G, backend="torch"), G)) < PRECISE
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_no_graph_is_kept():
    G = [[t.requires_grad_() for t in g] for g in gradients(3)]
    assert not any(t.requires_grad for t in grad_gram(G))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_operation_is_registered(backend):
    G = gradients(3, [(5, 3), (4,)])
    flat = [t for g in G for t in g]
    u = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fedgram.grad_gram, (flat, u, False, backend))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(gs, w):
        return grad_gram(gs, w, backend=backend).H + 1

    assert torch.equal(compiled(G, weights(3)), grad_gram(G, weights(3), backend=backend).H + 1)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(
    ("G", "u", "words"),
    [
        ([], None, "gradients: expected at least one"),
        ([gradients(1)[0], gradients(1)[0][:-1]], None, r"gradients\[1\]: expected 6 tensors"),
        ([[torch.ones(3)], [torch.ones(4)]], None, r"gradients\[1\]\[0\]: expected shape \(3,\)"),
        ([[torch.ones(3)], [torch.ones(3).half()]], None, r"gradients\[1\]\[0\]: expected torch.float32"),
        ([[torch.ones(3).long()]], None, r"gradients\[0\]\[0\]: expected a float tensor"),
        ([[torch.ones(3)], [torch.ones(3, device="meta")]], None, "several devices"),
        (gradients(2), torch.ones(3), r"weights: expected shape \(2,\)"),
        (gradients(2), torch.tensor([1.0, -1.0]), "weights: expected finite numbers >= 0"),
        (gradients(2), torch.zeros(2), "positive sum"),
        (gradients(2), torch.tensor([1.0, float("nan")]), "weights: expected finite"),
    ],
)
def test_bad_input_is_named(backend, G, u, words):
    with pytest.raises(ValueError, match=words):
        grad_gram(G, u, backend=backend)


def test_shapes_under_test_hold_the_awkward_ones():
    assert (0,) in SHAPES
    assert () in SHAPES
