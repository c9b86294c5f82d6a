import itertools

import pytest
import torch

from fedgram.kernels import ghost_gram
from fedgram.kernels.ghost_gram import row_blocks
from fedgram_testing.gradients import BACKENDS, garbage

__all__ = ["garbage"]

N = 150
# Relative to the sum of the rows' norms: float32 products in chains of at most 64 (tf32x3 on Triton) terms.
PROMISE, PRECISE = 2e-6, 1e-13
BOUNDARIES = {
    "two and an empty one": [0, 3, 3, 70, N],
    "short tasks": list(range(0, N + 1, 10)),
    "single rows": list(range(N + 1)),
    "one task": [0, N],
    "empty ones all over": [0, 0, 90, 90, N, N],
    "more empty tasks than rows of a tile": [0] + [0] * 70 + [5, N],
}


def rows(dtype=torch.float32, p=37, q=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(N, n, generator=g, dtype=torch.float64).to(dtype) for n in (p, q))


def materialised(a, d, offsets, bias=False):
    """The Gram from the gradients themselves, and the sum of the norms that its rounding errors are relative to."""
    if a.ndim == 1:
        a = torch.nn.functional.one_hot(a).double()
    a = torch.cat([a.double(), torch.ones(len(a), 1, dtype=torch.float64)], 1) if bias else a.double()
    tasks = list(itertools.pairwise(offsets))
    g = torch.stack([(d[s:e].double().T @ a[s:e]).reshape(-1) for s, e in tasks])
    size = torch.stack([(a[s:e].norm(dim=1) * d[s:e].double().norm(dim=1)).sum() for s, e in tasks])
    return g @ g.T, size[:, None] * size[None, :] + 1e-300


def error(got, a, d, offsets, bias=False):
    G, scale = materialised(a, d, offsets, bias)
    assert torch.equal(got, got.T)
    assert got.dtype is torch.float64
    return float(((got - G).abs() / scale).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOUNDARIES)
@pytest.mark.parametrize("bias", [False, True])
def test_gram_of_the_materialised_gradients(backend, name, bias, garbage):
    a, d = rows()
    offsets = BOUNDARIES[name]
    assert error(ghost_gram(a, d, offsets, bias=bias, backend=backend), a, d, offsets, bias) < PROMISE
    tokens = torch.arange(N) % 7
    if not bias:
        assert error(ghost_gram(tokens, d, offsets, backend=backend), tokens, d, offsets) < PROMISE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)])
def test_narrow_and_mixed_types(backend, types):
    (a, d), offsets = rows(), [0, 20, 100, N]
    a, d = a.to(types[0]), d.to(types[1])
    assert error(ghost_gram(a, d, offsets, bias=True, backend=backend), a, d, offsets, True) < PROMISE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["short tasks", "one task"])
def test_precise(backend, dtype, name):
    (a, d), offsets = rows(dtype), BOUNDARIES[name]
    assert error(ghost_gram(a, d, offsets, precise=True, backend=backend), a, d, offsets) < PRECISE


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_rows(backend):
    (a, d), offsets = rows(), [0, 20, 20, 64, N]
    views = {
        "columns": (a[:, 1:30], d[:, ::2]),
        "transposed": (a.T.contiguous().T, d.T.contiguous().T),
        "one row for all": (a[:1].expand(N, 37), d),
    }
    for name, (x, y) in views.items():
        assert error(ghost_gram(x, y, offsets, backend=backend), x, y, offsets) < PROMISE, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_as_a_tensor_no_rows_and_repeatability(backend):
    a, d = rows()
    offsets = BOUNDARIES["two and an empty one"]
    first, second = (ghost_gram(a, d, torch.tensor(offsets), backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(ghost_gram(a[:0], d[:0], [0, 0, 0], backend=backend), torch.zeros(2, 2, dtype=torch.float64))
    assert error(ghost_gram(a[:, :0], d, offsets, bias=True, backend=backend), a[:, :0], d, offsets, True) < PROMISE


def test_many_rows_never_stand_side_by_side():
    # 512 rows a tile: eight tiles a side, long tasks cut and short ones joined
    n, offsets = 3000, [0, 1700, 1701, 1705, 2900, 3000]
    g = torch.Generator().manual_seed(0)
    a, d = torch.randn(n, 6, generator=g), torch.randn(n, 5, generator=g)
    assert error(ghost_gram(a, d, offsets), a, d, offsets) < PROMISE
    assert max(b.stop - b.start for b in row_blocks(tuple(offsets), 512)) == 512


@pytest.mark.parametrize("offsets", BOUNDARIES.values())
@pytest.mark.parametrize("size", [1, 7, 64])
def test_row_blocks_cover_the_rows_and_cut_only_long_tasks(offsets, size):
    blocks = row_blocks(tuple(offsets), size)
    assert [r for b in blocks for r in range(b.start, b.stop)] == list(range(N))
    for b in blocks:
        assert 0 < b.stop - b.start <= size
        assert 0 < b.last - b.first <= size
        assert offsets[b.first] <= b.start <= b.stop <= offsets[b.last]
        if b.last - b.first > 1:
            assert (b.start, b.stop) == (offsets[b.first], offsets[b.last])


@pytest.mark.parametrize("backend", BACKENDS)
def test_operation_is_registered(backend):
    a, d = (t[:20] for t in rows())
    torch.library.opcheck(torch.ops.fedgram.ghost_gram, (a, d, [0, 5, 20], True, False, backend))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, y):
        return ghost_gram(x, y, [0, 5, 20], bias=True, backend=backend) * 2

    assert torch.equal(compiled(a, d), 2 * ghost_gram(a, d, [0, 5, 20], bias=True, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("a", "d", "offsets", "options", "words"),
    [
        (torch.ones(4), torch.ones(4, 2), [0, 4], {}, "inputs: expected"),
        (torch.ones(4, 2).long(), torch.ones(4, 2), [0, 4], {}, "inputs: expected a float"),
        (torch.ones(4, 2), torch.ones(4), [0, 4], {}, "output_grads: expected"),
        (torch.ones(4, 2), torch.ones(5, 2), [0, 4], {}, "output_grads: expected 4 rows"),
        (torch.ones(4).long(), torch.ones(4, 2), [0, 4], {"bias": True}, "bias"),
        (torch.ones(4, 2), torch.ones(4, 2), [0, 3], {}, "offsets: expected boundaries"),
        (torch.ones(4, 2), torch.ones(4, 2), [0, 3, 2, 4], {}, "offsets"),
        (torch.ones(4, 2), torch.ones(4, 2), [], {}, "offsets"),
        (torch.ones(4, 2), torch.ones(4, 2), torch.ones(2), {}, "offsets: expected .* integers"),
        (torch.ones(4, 2), torch.ones(4, 2), torch.ones(2, device="meta").long(), {}, "offsets: expected a list"),
    ],
)
def test_bad_input_is_named(backend, a, d, offsets, options, words):
    with pytest.raises(ValueError, match=words):
        ghost_gram(a, d, offsets, backend=backend, **options)
