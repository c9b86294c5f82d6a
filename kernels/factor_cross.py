"""Products of the clients' stacked LoRA factors with one more matrix: ``Bs^T X_B`` and ``As X_A^T`` per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._described import check_beside, stacks_of
from ._dispatch import resolve
from ._factor_inputs import (
    Factors,
    TallColumns,
    check_factors,
    counts,
    cut,
    flat,
    module_of_mixed_types,
    nest,
    stored,
    tall_A,
    tall_B,
)
from ._floats import FLOATS
from ._native_factors import factor_products
from ._plan import PlanCache, check_one_device, launching_on, place
from ._prepared import first, inventory
from ._stacks import Stacks

if TYPE_CHECKING:
    from ._factor_gram_plan import GramPlan

Crosses = list[Tensor] | None


def factor_cross(
    B: Factors | None,
    A: Factors | None,
    X_B: Sequence[Tensor] | None,
    X_A: Sequence[Tensor] | None,
    *,
    precise: bool = False,
    backend: str = "auto",
) -> tuple[Crosses, Crosses]:
    """Inner products of the stacked factors with the columns of ``X_B`` and the rows of ``X_A``.

    Module by module ``Bs^T X_B`` (R, k) and ``As X_A^T`` (R, k): what an anchor, an alignment or a subspace iteration
    needs from the clients' factors. A side is skipped by passing both of its arguments as None.

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``, or None.
        A: ``A[l][u]`` (r_lu, n_l), or None.
        X_B: ``X_B[l]`` (m_l, k_l), or None.
        X_A: ``X_A[l]`` (k_l, n_l), or None.
        precise: as in ``factor_gram``.
        backend: ``auto``, ``triton``, ``native`` or ``torch``.

    Returns:
        Two lists of (R_l, k_l) float64 matrices on the inputs' device; None for a skipped side. They may be views of
        one memory. Errors are those of ``factor_gram``.

    Raises:
        ValueError: shapes, types or devices do not fit together; the message names the tensor.
        RuntimeError: ``backend="triton"`` or ``"native"`` cannot run here.
    """
    chosen, crosses = "torch", None
    if torch.compiler.is_compiling():
        check_cross(B, A, X_B, X_A)
        crosses = _compiled(B, A, X_B, X_A, precise, backend)
    elif (chosen := resolve(backend, first(B, A, X_B, X_A), native=True)) == "triton":
        crosses = _on_triton(B, A, X_B, X_A, precise, backend)
    if crosses is not None:
        modules = 0 if B is None else len(B)
        return None if B is None else crosses[:modules], None if A is None else crosses[modules:]
    if chosen == "native":
        return _native_cross(B, A, X_B, X_A)
    check_cross(B, A, X_B, X_A)
    resolve("torch", flat(B, A, X_B, X_A))
    return factor_cross_torch(B, A, X_B, X_A)


def check_cross(
    B: Factors | None, A: Factors | None, X_B: Sequence[Tensor] | None, X_A: Sequence[Tensor] | None
) -> None:
    """Raise ValueError unless the arguments of ``factor_cross`` fit together."""
    check_factors(B, A)
    _check_others(B, A, X_B, X_A)


def _check_others(
    B: Factors | None, A: Factors | None, X_B: Sequence[Tensor] | None, X_A: Sequence[Tensor] | None
) -> None:
    for name, factors, X, dim in (("X_B", B, X_B, 0), ("X_A", A, X_A, 1)):
        if (factors is None) != (X is None):
            raise ValueError(f"{name}: must be None exactly where {name[-1]} is None")
        if X is None or factors is None:
            continue
        if len(X) != len(factors):
            raise ValueError(f"{name}: {len(X)} modules, {name[-1]} has {len(factors)}")
        for l, (x, clients) in enumerate(zip(X, factors, strict=True)):
            if x.ndim != 2 or x.dtype not in FLOATS or x.shape[dim] != clients[0].shape[dim]:
                raise ValueError(
                    f"{name}[{l}]: expected a float matrix with dimension {dim} of {clients[0].shape[dim]}, "
                    f"got {tuple(x.shape)} {x.dtype}"
                )


@torch.no_grad()
def factor_cross_torch(
    B: Factors | None,
    A: Factors | None,
    X_B: Sequence[Tensor] | None,
    X_A: Sequence[Tensor] | None,
    *,
    precise: bool = False,
) -> tuple[Crosses, Crosses]:
    """The torch twin of ``factor_cross``: float64 throughout, in blocks that fit the cache."""
    left = None if B is None or X_B is None else [_cross(tall_B(bs), x) for bs, x in zip(B, X_B, strict=True)]
    right = None if A is None or X_A is None else [_cross(tall_A(as_), x.T) for as_, x in zip(A, X_A, strict=True)]
    return left, right


def _native_cross(
    B: Factors | None, A: Factors | None, X_B: Sequence[Tensor] | None, X_A: Sequence[Tensor] | None
) -> tuple[Crosses, Crosses]:
    left, right = stacks_of(B, A)
    X_B, X_A = stored(X_B), stored(X_A)
    _check_others(left, right, X_B, X_A)
    check_beside(flat(X_B, X_A), B, A)
    sides = [
        (stacks, Stacks([[x] for x in X], transposed=stacks.transposed))
        for stacks, X in ((left, X_B), (right, X_A))
        if stacks is not None and X is not None
    ]
    products = iter(factor_products(sides))
    return None if B is None else next(products), None if A is None else next(products)


def _cross(stack: TallColumns, x: Tensor) -> Tensor:
    out = torch.zeros(stack.width, x.shape[1], dtype=torch.float64, device=stack.device)
    for start, stop, block in stack.blocks():
        out.addmm_(block.T, x[start:stop].double())
    return out


PLANS: PlanCache[tuple[GramPlan, list[tuple[int, bool]]] | str] = PlanCache()


def _on_triton(
    B: Factors | None,
    A: Factors | None,
    X_B: Sequence[Tensor] | None,
    X_A: Sequence[Tensor] | None,
    precise: bool,
    backend: str,
) -> list[Tensor] | None:
    """The products of B's side, then of A's; None where the kernels cannot take them and nobody ordered them to."""
    if not (one := first(B, A, X_B, X_A)):
        return None
    from ._factor_gram_triton import factor_gram_triton

    X_B, X_A = stored(X_B), stored(X_A)
    layout, pointers = inventory(B, A, X_B, X_A)
    with launching_on(one[0].device):
        found = PLANS.get((place(one[0].device), precise, layout), lambda: _plan(B, A, X_B, X_A, precise))
        if not isinstance(found, str):
            plan, turned = found
            xs, factors = flat(X_B, X_A), len(pointers) - len(flat(X_B, X_A))
            copies = {i: _turned(xs[i - factors], transposed) for i, transposed in turned}
            for i, copy in copies.items():
                pointers[i] = copy.data_ptr()
            return plan.split(factor_gram_triton(plan, pointers))
    if backend == "triton":
        raise ValueError(f"backend='triton': {found}")
    return None


def _turned(x: Tensor, transposed: bool) -> Tensor:
    """A copy of ``x`` contiguous along the long dimension, for factors that are so: tiles run along one dimension."""
    return x.contiguous() if transposed else x.T.contiguous().T


def _plan(
    B: Factors | None, A: Factors | None, X_B: Sequence[Tensor] | None, X_A: Sequence[Tensor] | None, precise: bool
) -> tuple[GramPlan, list[tuple[int, bool]]] | str:
    """Check once per layout and lay out the work, with the matrices X to turn; or say why the kernels cannot do it."""
    from ._factor_gram_plan import GramPlan, Task
    from ._factor_plan import Piece, is_wide
    from ._triton_common import factor_precision as products

    check_cross(B, A, X_B, X_A)
    if (reason := module_of_mixed_types(B, A)) is not None:
        return reason
    check_one_device(flat(B, A, X_B, X_A))
    tasks, turned, index, x_index = [], [], 0, sum(counts(B)) + sum(counts(A))
    for factors, xs, transposed in ((B, X_B, False), (A, X_A, True)):
        for clients, x in zip(factors or (), xs or (), strict=True):
            pieces = [Piece.of(index + u, t, transposed=transposed) for u, t in enumerate(clients)]
            index += len(clients)
            other = Piece.of(x_index, x, transposed=transposed)
            if is_wide(pieces) and not is_wide([other]):
                turned.append((x_index, transposed))
                other = Piece.of(x_index, _turned(x, transposed), transposed=transposed)
            x_index += 1
            tasks.append(Task(pieces, [other], products({clients[0].dtype, x.dtype}, x.device, precise=precise)))
    return GramPlan(tasks, flat(B, A)[0].device), turned


def _compiled(
    B: Factors | None,
    A: Factors | None,
    X_B: Sequence[Tensor] | None,
    X_A: Sequence[Tensor] | None,
    precise: bool,
    backend: str,
) -> list[Tensor] | None:
    """What ``torch.compile`` sees: one operator with a flat output, split again outside."""
    if not flat(B, A):
        return None
    products = _factor_cross_op(
        flat(B), flat(A), flat(X_B), flat(X_A), counts(B), counts(A), B is None, A is None, precise, backend
    )
    return cut(products, cross_shapes(B, A, X_B, X_A))


def cross_shapes(
    B: Factors | None, A: Factors | None, X_B: Sequence[Tensor] | None, X_A: Sequence[Tensor] | None
) -> list[tuple[int, int]]:
    """The shapes of all products, of B's side, then of A's."""
    left = [(sum(b.shape[1] for b in bs), x.shape[1]) for bs, x in zip(B or (), X_B or (), strict=True)]
    return left + [(sum(a.shape[0] for a in as_), x.shape[0]) for as_, x in zip(A or (), X_A or (), strict=True)]


@torch.library.custom_op("fedgram::factor_cross", mutates_args=())
def _factor_cross_op(
    B: list[Tensor],
    A: list[Tensor],
    X_B: list[Tensor],
    X_A: list[Tensor],
    clients_B: list[int],
    clients_A: list[int],
    skip_B: bool,
    skip_A: bool,
    precise: bool,
    backend: str,
) -> Tensor:
    """All products in one flat float64 tensor."""
    left = (None, None) if skip_B else (nest(B, clients_B), X_B)
    right = (None, None) if skip_A else (nest(A, clients_A), X_A)
    both = factor_cross(left[0], right[0], left[1], right[1], precise=precise, backend=backend)
    return torch.cat([product.reshape(-1) for side in both for product in side or ()])


@_factor_cross_op.register_fake
def _(B, A, X_B, X_A, clients_B, clients_A, skip_B, skip_A, precise, backend):  # noqa: ANN001
    shapes = cross_shapes(nest(B, clients_B), nest(A, clients_A), X_B, X_A)
    return (B or A)[0].new_empty(sum(rows * columns for rows, columns in shapes), dtype=torch.float64)
