"""Tensors whose address leads nowhere: fake ones give shapes, those made of others are refused by name."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from fedgram import flora_na, kernels, stamp
from fedgram_testing.factor_ops import draw
from fedgram_testing.gradients import ALL_BACKENDS, gradients


def operations(B, A, P, Q, p, G):
    """Every operation on factors, then those on gradients; ``p`` (2,) float64."""
    S = [torch.eye(3, dtype=torch.float64)]
    return {
        "factor_gram": lambda **at: kernels.factor_gram(B, A, **at),
        "factor_combine": lambda **at: kernels.factor_combine(B, A, P, Q, **at),
        "factor_cross": lambda **at: kernels.factor_cross(B, A, [B[0][0]], [A[0][0]], **at),
        "combine_products": lambda **at: kernels.combine_products(B, A, [p], [p], **at),
        "gram_combine": lambda **at: kernels.gram_combine(B, A, P, Q, beside=True, **at),
        "lowrank_sum": lambda **at: kernels.lowrank_sum(None, B[0], A[0], p, **at),
        "grad_gram": lambda **at: tuple(kernels.grad_gram(G, **at)),
        "grad_combine": lambda **at: kernels.grad_combine(G, p, **at),
        "described": lambda: kernels.factor_gram(*(getattr(kernels.described(B, A), side) for side in "BA")),
        "prepared": lambda: kernels.factor_gram(*(getattr(kernels.prepare(B, A), side) for side in "BA")),
        "factor_traces": lambda: kernels.factor_traces(B, A, S, S),  # of torch's operations alone, as the next
        "factor_triangle": lambda: kernels.factor_triangle(B, A),
    }


def arguments():
    B, A = draw([3, 2], [(20, 9)], torch.float32)
    P = [torch.rand(5, 2, dtype=torch.float64)]
    return B, A, P, [P[0].T.contiguous()], torch.rand(2, dtype=torch.float64), gradients(2)


NAMES = list(operations(*arguments()))
ORDERED = NAMES[: NAMES.index("described")]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_give_shapes(name):
    real = arguments()
    mode = FakeTensorMode()
    fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, real)
    expected = torch.utils._pytree.tree_leaves(operations(*real)[name]())
    with mode:
        found = torch.utils._pytree.tree_leaves(operations(*fake)[name]())
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_outputs_without_memory_overlap_nothing(where):
    mode = FakeTensorMode()
    move = mode.from_tensor if where == "fake" else (lambda t: t.to("meta"))
    B, A, _, _, p, G = torch.utils._pytree.tree_map_only(torch.Tensor, move, arguments())
    with mode if where == "fake" else contextlib.nullcontext():
        W, out = torch.empty_like(B[0][0] @ A[0][0]), [torch.empty_like(t) for t in G[0]]
        assert kernels.lowrank_sum(W, B[0], A[0], p, out=torch.empty_like(W)).shape == W.shape
        assert [t.shape for t in kernels.grad_combine(G, p, out=out)] == [t.shape for t in out]


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_loops_and_kernels_are_not_given_fake_tensors(name, backend):
    mode = FakeTensorMode()
    fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments())
    with mode, pytest.raises(RuntimeError, match=f"backend='{backend}': a FakeTensor has no memory"):
        operations(*fake)[name](backend=backend)


@pytest.mark.parametrize("name", NAMES[:-2])
def test_tensors_made_of_others_are_refused(name):
    two = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: TwoTensor(t, t), arguments()[:2])
    other = arguments()[2:-1]
    G = [[TwoTensor(t, t) for t in g] for g in gradients(2)]
    with pytest.raises(ValueError, match="expected plain tensors, got a TwoTensor"):
        operations(*two, *other, G)[name]()


def test_the_refusal_names_the_argument():
    a, b = torch.rand(2, 5), torch.rand(6, 2)
    with pytest.raises(ValueError, match="lora_B is a TwoTensor: expected a plain tensor"):
        flora_na.LoraLayer(a, TwoTensor(b, b))
    with pytest.raises(ValueError, match="task 1, 'w' is a TwoTensor; expected a plain tensor"):
        stamp.match([{"w": a}, {"w": TwoTensor(a, a)}])


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)  # as of a sharded parameter between two uses
    return t


WITHOUT_MEMORY = {"freed": freed, "functional": torch._to_functional_tensor, "two": lambda t: TwoTensor(t, t)}
NO_MEMORY = "has no memory of its own"


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
@pytest.mark.parametrize("name", [*NAMES[:5], "described", "prepared"])
def test_a_later_factor_without_memory_is_named(name, kind):
    for side in (0, 1):
        given = arguments()
        given[side][0][1] = WITHOUT_MEMORY[kind](given[side][0][1])
        with pytest.raises(ValueError, match=rf"^{'BA'[side]}\[0\]\[1\]: a \w+ of shape .* {NO_MEMORY}"):
            operations(*given)[name]()


@pytest.mark.parametrize("kind", ["freed", "functional"])
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", ORDERED)
def test_neither_loops_nor_kernels_follow_an_address_of_zero(name, backend, kind):
    B, A, P, Q, p, G = arguments()
    if name.startswith("grad"):
        G[1][0] = WITHOUT_MEMORY[kind](G[1][0])
    else:
        A[0][1] = WITHOUT_MEMORY[kind](A[0][1])
    with pytest.raises(ValueError, match=NO_MEMORY):
        operations(B, A, P, Q, p, G)[name](backend=backend)


@pytest.mark.parametrize("name", ["factor_combine", "combine_products", "gram_combine", "lowrank_sum", "grad_combine"])
def test_coefficients_without_memory_are_refused(name):
    B, A, P, Q, p, G = arguments()
    P, Q, p = [torch._to_functional_tensor(P[0])], Q, torch._to_functional_tensor(p)
    with pytest.raises(ValueError, match=NO_MEMORY):
        operations(B, A, P, Q, p, G)[name]()


def test_a_matrix_beside_the_factors_without_memory_is_refused():
    B, A, *_ = arguments()
    with pytest.raises(ValueError, match=NO_MEMORY):
        kernels.factor_cross(B, None, [freed(torch.rand(20, 2))], None)
    with pytest.raises(ValueError, match=NO_MEMORY):
        kernels.lowrank_sum(freed(torch.rand(20, 9)), B[0], A[0], torch.rand(2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["inputs", "output_grads"])
@pytest.mark.parametrize("kind", ["freed", "functional"])
def test_rows_without_memory_are_refused_by_the_kernel(kind, name):
    rows = {"inputs": torch.rand(12, 6), "output_grads": torch.rand(12, 4)}
    rows[name] = WITHOUT_MEMORY[kind](rows[name])
    with pytest.raises(ValueError, match=f"^{name}: a .*{NO_MEMORY}"):
        kernels.ghost_gram(**rows, offsets=[0, 5, 12], backend="triton")


def test_empty_tensors_need_no_memory():
    B, A = [[torch.empty(20, 0), torch.rand(20, 2)]], [[torch.empty(0, 9), torch.rand(2, 9)]]
    assert torch.equal(kernels.factor_gram(B, A)[0][0], B[0][1].double().T @ B[0][1].double())


OPERANDS = {  # which of the arguments an operation reads
    "factor_gram": (0, 1), "factor_combine": (0, 1, 2, 3), "factor_cross": (0, 1), "combine_products": (0, 1, 4),
    "gram_combine": (0, 1, 2, 3), "lowrank_sum": (0, 1, 4), "grad_gram": (5,), "grad_combine": (4, 5),
}  # fmt: skip


@pytest.mark.parametrize(("name", "which"), [(name, which) for name in ORDERED for which in OPERANDS[name]])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_one_tensor_made_of_others_among_plain_ones_is_refused(backend, name, which):
    """Also the last one, and after a call on plain tensors of the same layout, whose plan is kept."""
    real = arguments()
    operations(*real)[name](backend=backend)
    leaves, spec = torch.utils._pytree.tree_flatten(real[which])
    other = torch.utils._pytree.tree_unflatten([*leaves[:-1], TwoTensor(leaves[-1], leaves[-1])], spec)
    with pytest.raises(ValueError, match="TwoTensor"):
        operations(*real[:which], other, *real[which + 1 :])[name](backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_weights_and_outputs_made_of_others_are_refused(backend):
    G, p = gradients(2), torch.rand(2, dtype=torch.float64)
    out = [TwoTensor(t, t) for t in G[0]]
    with pytest.raises(ValueError, match="TwoTensor"):
        kernels.grad_combine(G, p, out=out, backend=backend)
    with pytest.raises(ValueError, match="TwoTensor"):
        kernels.grad_gram(G, TwoTensor(p, p), backend=backend)


@pytest.mark.parametrize("name", ["factor_gram", "factor_combine", "factor_cross"])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_view_that_negates_its_memory_is_refused_where_a_plan_is_kept(backend, name):
    """The plan of other tensors of the same layout skips no check."""
    z, (B, A, P, Q, p, G) = torch.randn(20, 3, dtype=torch.cfloat), arguments()
    B[0][0] = z.imag
    operations(B, A, P, Q, p, G)[name](backend=backend)
    B[0][0] = z.conj().imag
    with pytest.raises(ValueError, match=r"B\[0\]\[0\]: a view that negates its memory"):
        operations(B, A, P, Q, p, G)[name](backend=backend)
