import pytest
import torch

from fedgram.kernels import grad_combine
from fedgram.kernels._memory import span
from fedgram_testing.gradients import ALL_BACKENDS, TYPES, garbage, gradients

__all__ = ["garbage"]

SHAPES = [(40, 33), (5, 7), (), (0,), (1,), (1024,), (1500,)]


def coefficients(K, seed=0):
    return torch.randn(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(G, v):
    return [sum(v[k].double() * g[p].double() for k, g in enumerate(G)) for p in range(len(G[0]))]


def ulp_error(got, exact, dtype):
    """Largest error in units of what rounding once to ``dtype`` allows: half a unit in the last place of the exact."""
    eps = torch.finfo(dtype).eps / 2
    return max(
        (
            float(((a.double() - e).abs() / (eps * e.abs() + 1e-300)).max())
            for a, e in zip(got, exact, strict=True)
            if e.numel()
        )
    )


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("K", [1, 2, 7, 20])
def test_sum_is_wide_and_rounded_once(backend, dtype, K, garbage):
    G, v = gradients(K, SHAPES, dtype), coefficients(K)
    got = grad_combine(G, v, backend=backend)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in G[0]]
    # float64 sums of K terms have errors of K eps of the terms, which one cancelled result may show
    exact = reference(G, v)
    if dtype is torch.float64:
        assert all(torch.allclose(a, e, rtol=1e-13, atol=1e-13) for a, e in zip(got, exact, strict=True))
    else:
        # the interpreter truncates to bf16 where hardware rounds: two half units there
        limit = 2.001 if backend == "triton" and dtype is torch.bfloat16 else 1.001
        slack = K * 2.0 ** (-24 if dtype.itemsize == 2 else -53) * 8  # of the wide sum, before it is rounded
        close = [e + torch.clamp(a.double() - e, -slack, slack) for a, e in zip(got, exact, strict=True)]
        assert ulp_error(got, close, dtype) < limit


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_sixteen_bit_gradients_can_be_combined_into_wider_ones(backend, garbage):
    G, v = gradients(5, SHAPES, torch.bfloat16), coefficients(5)
    out = [torch.empty(s) for s in SHAPES]
    returned = grad_combine(G, v, out=out, backend=backend)
    assert all(a is b for a, b in zip(returned, out, strict=True))
    for a, e in zip(out, reference(G, v), strict=True):
        assert torch.allclose(a.double(), e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_autograd_sees_that_outputs_were_written(backend):
    G, v = gradients(2, SHAPES), coefficients(2)
    out = [torch.empty(s) for s in SHAPES]
    versions = [t._version for t in out]
    grad_combine(G, v, out=out, backend=backend)
    assert all(t._version > before for t, before in zip(out, versions, strict=True) if t.numel())


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_any_strides_in_and_out(backend, garbage):
    base = [torch.randn(30, 40, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    v = coefficients(3)
    cases = {
        "transposed": ([b.T for b in base], torch.empty(30, 40).T),
        "unlike": ([b.T for b in base], torch.empty(40, 30)),
        "gaps": ([b[:, ::2] for b in base], torch.empty(30, 40)[:, 1::2]),
        "expanded in": ([b[:1].expand(30, 40) for b in base], torch.empty(30, 40)),
        "misaligned": ([b.view(-1)[1:] for b in base], torch.empty(1200)[1:]),
    }
    G = [[c[0][k] for c in cases.values()] for k in range(3)]
    out = grad_combine(G, v, out=[c[1] for c in cases.values()], backend=backend)
    for name, a, e in zip(cases, out, reference(G, v), strict=True):
        assert torch.allclose(a.double(), e, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_coefficients_may_lie_anyhow(backend):
    G = gradients(5, SHAPES)
    views = {
        "every third": coefficients(15)[::3],
        "expanded": torch.tensor(0.5, dtype=torch.float64).expand(5),
        "negated": torch.complex(torch.zeros(5, dtype=torch.float64), coefficients(5)).conj().imag,
    }
    for name, v in views.items():
        for a, e in zip(grad_combine(G, v, backend=backend), reference(G, v.clone()), strict=True):
            assert torch.allclose(a.double(), e, rtol=1e-6, atol=1e-6), name


def test_long_tensors_are_summed_block_by_block():
    G, v = gradients(2, [((1 << 18) + 5,)]), coefficients(2)
    G[1][0] = torch.stack([G[1][0]] * 2, 1)[:, 0]  # strided
    assert torch.allclose(grad_combine(G, v)[0].double(), reference(G, v)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_output_may_be_a_gradient_of_the_same_parameter(backend):
    G, v = gradients(4, SHAPES), coefficients(4)
    expected = grad_combine(G, v, backend=backend)
    out = grad_combine(G, v, out=G[2], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert out[0] is G[2][0]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_outputs_beside_the_gradients_in_one_buffer(backend):
    flat = torch.randn(300, generator=torch.Generator().manual_seed(0))
    G, out = [[flat[:100]], [flat[100:200]]], [flat[200:]]
    expected = reference(G, torch.ones(2))[0].float()
    assert torch.equal(grad_combine(G, torch.ones(2), out=out, backend=backend)[0], expected)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_other_overlaps_are_refused(backend):
    flat = torch.zeros(300)
    a, b, c = flat[:100], flat[100:200], flat[200:]
    v = torch.ones(2)
    overlaps = {
        "shifted gradient": ([[a], [b]], [flat[50:150]]),
        "other parameter": ([[a, b], [a, c]], [b, c.clone()]),
        "two outputs": ([[a, b], [a, b]], [torch.zeros(150)[:100], None]),
        "reversed strides": ([[flat.view(10, 30)[:, :10]], [torch.zeros(10, 10)]], [flat.view(30, 10)[:10]]),
    }
    overlaps["two outputs"][1][1] = overlaps["two outputs"][1][0]
    for name, (G, out) in overlaps.items():
        with pytest.raises(ValueError, match="overlap"):
            grad_combine(G, v, out=out, backend=backend)
        assert not flat.any(), name
    with pytest.raises(ValueError, match="expanded"):
        grad_combine([[a.view(10, 10)]], v[:1], out=[torch.zeros(10, 1).expand(10, 10)], backend=backend)


def test_span_is_the_bytes_a_view_can_touch():
    t = torch.zeros(6, 10)[1:4, 2::3]
    first, end = span(t)
    touched = [t[i, j].data_ptr() for i in range(t.shape[0]) for j in range(t.shape[1])]
    assert (first, end) == (min(touched), max(touched) + 4)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_zero_coefficients_and_repeatability(backend):
    G = gradients(3, SHAPES)
    zeros = grad_combine(G, torch.zeros(3), backend=backend)
    assert not any(t.any() for t in zeros)
    v = coefficients(3)
    first, second = (grad_combine(G, v, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_an_output_may_be_a_parameter(backend, shape):
    G, v = gradients(2, [(6, 4)]), coefficients(2)
    out = torch.nn.Parameter(torch.zeros(shape) if shape == (6, 4) else torch.zeros(shape).T)
    assert grad_combine(G, v, out=[out], backend=backend)[0] is out
    assert torch.allclose(out.detach().double(), reference(G, v)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_views_that_negate_their_memory(backend):
    z = torch.complex(*torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)))
    G = [[t, t[3]] for t in (z[0].conj().imag, z[1].imag, z[2].conj().imag)]
    assert G[0][1].is_neg()
    v = torch.arange(3.0)
    for got, want in zip(grad_combine(G, v, backend=backend), reference(G, v), strict=True):
        assert torch.allclose(got.double(), want, atol=1e-6)
    with pytest.raises(ValueError, match=r"out\[0\]: a view that negates its memory"):
        grad_combine(G, v, out=G[0], backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_operations_are_registered(backend):
    G, v = gradients(2, [(5, 3), (4,)]), coefficients(2)
    flat = [t for g in G for t in g]
    torch.library.opcheck(torch.ops.fedgram.grad_combine, (flat, v, backend))
    out = [torch.zeros(5, 3), torch.zeros(4)]
    torch.library.opcheck(torch.ops.fedgram.grad_combine_out, (flat, v, out, backend))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(gs, c, targets):
        grad_combine(gs, c, out=targets, backend=backend)
        return [t + 1 for t in grad_combine(gs, c, backend=backend)]

    expected = grad_combine(G, v, backend=backend)
    plus = compiled(G, v, out)
    assert all(torch.equal(a, e) for a, e in zip(out, expected, strict=True))
    assert all(torch.equal(a, e + 1) for a, e in zip(plus, expected, strict=True))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_lists_of_unlike_lengths_are_named(backend):
    for G in ([[], [torch.ones(3)]], [[torch.ones(3)], []]):
        with pytest.raises(ValueError, match=r"gradients\[1\]: expected"):
            grad_combine(G, torch.ones(2), backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(
    ("v", "out", "words"),
    [
        (torch.ones(3), None, r"coefficients: expected shape \(2,\)"),
        (torch.ones(2), [torch.ones(3)], "out: expected 2 tensors"),
        (torch.ones(2), [torch.ones(3), torch.ones(5)], r"out\[1\]: expected shape \(4,\)"),
        (torch.ones(2), [torch.ones(3), torch.ones(4).long()], r"out\[1\]: expected a float tensor"),
        (torch.ones(2), [torch.ones(3), torch.ones(4, device="meta")], r"out\[1\]: .* on meta"),
    ],
)
def test_bad_input_is_named(backend, v, out, words):
    with pytest.raises(ValueError, match=words):
        grad_combine(gradients(2, [(3,), (4,)]), v, out=out, backend=backend)
