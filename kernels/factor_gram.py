"""Gram matrices of the clients' stacked LoRA factors: ``G_B = Bs^T Bs`` and ``G_A = As As^T`` per module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._described import stacks_of
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
    tall_A,
    tall_B,
)
from ._native_factors import factor_products
from ._plan import PlanCache, check_one_device, launching_on, place
from ._prepared import first, inventory

if TYPE_CHECKING:
    from ._factor_gram_plan import GramPlan

PANEL = 128  # columns of one panel of the symmetric product: above it, only one triangle is computed


def factor_gram(
    B: Factors, A: Factors, *, precise: bool = False, backend: str = "auto"
) -> tuple[list[Tensor], list[Tensor]]:
    """Gram matrices of all modules of an adapter and all clients, from the factors where they lie.

    With ``Bs = [B_1 .. B_U]`` (m, R) and ``As = [A_1; ..; A_U]`` (R, n), ``R = sum of the ranks``, module by module:
    ``G_B = Bs^T Bs`` and ``G_A = As As^T``. Every inner product between clients' updates follows from the two:
    ``<B_u A_u, B_v A_v> = tr(G_B[u, v] G_A[v, u])``, and so do the estimators of FLoRA-NA (arXiv:2509.26399).

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``; any float type, any strides.
        A: ``A[l][u]`` (r_lu, n_l).
        precise: on Triton, float64 products throughout; without it 16-bit inputs are multiplied as they are, and
            float32 ones as tf32x3, or in float64 on GPUs with tensor cores for it (A100, H100), where that is faster.
            On the CPU everything is float64 always.
        backend: ``auto``, ``triton``, ``native`` or ``torch``. Triton leaves clients of several types within one
            module and side to the torch twin.

    Returns:
        Two lists of (R_l, R_l) float64 matrices on the inputs' device, exactly symmetric, the same bits on every run.
        They may be views of one memory. Errors, relative to the norms of the two columns: 2e-6 on Triton, rounding of
        float64 with ``precise`` or ``torch``.

    Raises:
        ValueError: shapes, types or devices do not fit together; the message names the tensor.
        RuntimeError: ``backend="triton"`` or ``"native"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        check_factors(B, A)
        if not len(B):
            return [], []
        shapes = [(width, width) for width in gram_widths(B, A)]
        grams = cut(_factor_gram_op(flat(B), flat(A), counts(B), precise, backend), shapes)
        return grams[: len(B)], grams[len(B) :]
    # the first tensor decides: whether all lie on its device is checked with the rest, once per layout
    chosen = resolve(backend, first(B, A), native=True)
    if chosen == "triton":
        found = _on_triton(B, A, precise, backend)
        if found is not None:
            return found[: len(B)], found[len(B) :]
    if chosen == "native":
        left, right = factor_products([(stacks, None) for stacks in stacks_of(B, A) if stacks is not None])
        return left, right
    check_factors(B, A)
    resolve("torch", flat(B, A))
    return factor_gram_torch(B, A, precise=precise)


@torch.no_grad()
def factor_gram_torch(B: Factors, A: Factors, *, precise: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The torch twin of ``factor_gram``: float64 throughout, in blocks that fit the cache."""
    return [_gram(tall_B(bs)) for bs in B], [_gram(tall_A(as_)) for as_ in A]


def _gram(stack: TallColumns) -> Tensor:
    gram = torch.zeros(stack.width, stack.width, dtype=torch.float64, device=stack.device)
    for _, _, block in stack.blocks():
        for i in range(0, stack.width, PANEL):
            gram[i : i + PANEL, i:].addmm_(block[:, i : i + PANEL].T, block[:, i:])
    upper = gram.triu()  # BLAS does not promise equal bits in the two triangles
    return upper + upper.triu(1).T


PLANS: PlanCache[GramPlan | str] = PlanCache()


def _on_triton(B: Factors, A: Factors, precise: bool, backend: str) -> list[Tensor] | None:
    """The Grams of B, then of A; None where the kernels cannot take the factors and nobody ordered them to."""
    if not (one := first(B, A)):
        return None
    from ._factor_gram_triton import factor_gram_triton

    layout, pointers = inventory(B, A)
    with launching_on(one[0].device):
        plan = PLANS.get((place(one[0].device), precise, layout), lambda: _plan(B, A, precise))
        if not isinstance(plan, str):
            return plan.split(factor_gram_triton(plan, pointers))
    if backend == "triton":
        raise ValueError(f"backend='triton': {plan}")
    return None


def _plan(B: Factors, A: Factors, precise: bool) -> GramPlan | str:
    """Check the factors once per layout and lay out the work, or say why the kernels cannot do it."""
    from ._factor_gram_plan import GramPlan, Task
    from ._factor_plan import Piece
    from ._triton_common import factor_precision as products

    check_factors(B, A)
    if (reason := module_of_mixed_types(B, A)) is not None:
        return reason
    check_one_device(flat(B, A))
    tasks, index = [], 0
    for side, transposed in ((B, False), (A, True)):
        for clients in side:
            pieces = [Piece.of(index + u, t, transposed=transposed) for u, t in enumerate(clients)]
            tasks.append(Task(pieces, None, products({clients[0].dtype}, clients[0].device, precise=precise)))
            index += len(clients)
    return GramPlan(tasks, B[0][0].device)


def gram_widths(B: Factors, A: Factors) -> list[int]:
    """The sizes R of all Gram matrices, of B, then of A."""
    return [sum(b.shape[1] for b in bs) for bs in B] + [sum(a.shape[0] for a in as_) for as_ in A]


@torch.library.custom_op("fedgram::factor_gram", mutates_args=())
def _factor_gram_op(B: list[Tensor], A: list[Tensor], clients: list[int], precise: bool, backend: str) -> Tensor:
    """All Grams in one flat float64 tensor: what ``torch.compile`` sees of ``factor_gram``."""
    left, right = factor_gram(nest(B, clients), nest(A, clients), precise=precise, backend=backend)
    return torch.cat([gram.reshape(-1) for gram in left + right])


@_factor_gram_op.register_fake
def _(B: list[Tensor], A: list[Tensor], clients: list[int], precise: bool, backend: str) -> Tensor:
    widths = gram_widths(nest(B, clients), nest(A, clients))
    return B[0].new_empty(sum(w * w for w in widths), dtype=torch.float64)
