"""Weighted combinations of the clients' LoRA factors: ``B = sum_u B_u P_u`` and ``A = sum_u Q_u A_u`` per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._described import check_beside, stacks_of
from ._dispatch import resolve
from ._factor_combine_torch import Combined, factor_combine_torch, output_dtype
from ._factor_inputs import Factors, check_factors, counts, flat, module_of_mixed_types, nest, stored
from ._floats import FLOATS
from ._native_factors import factor_combine as combine_stacks
from ._native_factors import spread_scalars
from ._plan import PlanCache, addresses, check_one_device, describe, launching_on, place
from ._prepared import first, inventory
from ._stacks import Stacks

if TYPE_CHECKING:
    from ._factor_combine_plan import CombinePlan
    from ._factor_scalars_launch import ScalarPlan

Side = tuple[Stacks, list[Tensor], Stacks]  # of the compiled loops: factors, coefficients, outputs


class Combination(NamedTuple):
    """What is asked of ``factor_combine``, whose arguments these are."""

    B: Factors | None
    A: Factors | None
    P: Sequence[Tensor] | None
    Q: Sequence[Tensor] | None
    dtype: torch.dtype | None

    def sides(self) -> list[tuple[Factors, Sequence[Tensor], bool]]:
        """Factors, coefficients, and whether they are the A side, of the sides that are not skipped."""
        both = ((self.B, self.P, False), (self.A, self.Q, True))
        return [(factors, c, transposed) for factors, c, transposed in both if factors is not None and c is not None]


def factor_combine(
    B: Factors | None,
    A: Factors | None,
    P: Sequence[Tensor] | None,
    Q: Sequence[Tensor] | None,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Combined, Combined]:
    """Combine the clients' factors of every module into one pair, accumulating wide and rounding once.

    With scalars this is FLoRA-NA's estimate ``B = sum_u p_u B_u``, ``A = sum_u q_u A_u`` (arXiv:2509.26399), and with
    the clients' weights the average of FedIT; with blocks any rank-r pair in the span of the clients' factors.

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``, or None to skip the side.
        A: ``A[l][u]`` (r_lu, n_l), or None.
        P: ``P[l]`` float64, either blocks (R_l, r), ``B_out = sum_u B_u P_u``, or scalars (U_l,),
            ``B_out = sum_u p_u B_u`` with every ``B_u`` padded by zero columns to the largest rank. None with ``B``.
        Q: ``Q[l]`` float64, either blocks (r, R_l), ``A_out = sum_u Q_u A_u``, or scalars (U_l,). None with ``A``.
        dtype: type of the outputs; by default that of the inputs.
        backend: ``auto``, ``triton``, ``native`` or ``torch``.

    Returns:
        Two lists, of (m_l, r) and (r, n_l) contiguous tensors on the inputs' device; None for a skipped side. They may
        be views of one memory. Before the rounding, errors are 2e-6 of ``sum |c| |x|`` on Triton (a hundredth of the
        rounding where the output has 16 bits), and those of float64 on torch or where a type is float64. A number of
        a factor that is not finite may, on Triton, spoil all of its row of B, or column of A, with scalars too.

    Raises:
        ValueError: shapes, types or devices do not fit together; the message names the tensor.
        RuntimeError: ``backend="triton"`` or ``"native"`` cannot run here.
    """
    asked = Combination(B, A, P, Q, dtype)
    chosen, outputs = "torch", None
    if torch.compiler.is_compiling():
        check_combine(asked)
        outputs = _compiled(asked, backend)
    elif (chosen := resolve(backend, first(B, A), native=True)) == "triton":
        outputs = _on_triton(asked, backend)
    if outputs is not None:
        modules = 0 if B is None else len(B)
        return None if B is None else outputs[:modules], None if A is None else outputs[modules:]
    if chosen == "native":
        sides = native_sides(asked)
        combine_stacks(sides)
        combined = iter(written(sides))
        return None if B is None else next(combined), None if A is None else next(combined)
    check_combine(asked)
    resolve("torch", flat(B, A, P, Q))
    return factor_combine_torch(B, A, P, Q, dtype=dtype)


def check_combine(asked: Combination) -> None:
    """Raise ValueError unless the arguments of ``factor_combine`` fit together."""
    check_factors(asked.B, asked.A)
    _check_coefficients(asked)


def _check_coefficients(asked: Combination) -> None:
    if asked.dtype is not None and asked.dtype not in FLOATS:
        raise ValueError(f"dtype: expected a float type, got {asked.dtype}")
    for name, factors, coefficients, rank_dim in (("P", asked.B, asked.P, 1), ("Q", asked.A, asked.Q, 0)):
        side = "BA"[1 - rank_dim]
        if (factors is None) != (coefficients is None):
            raise ValueError(f"{name}: must be None exactly where {side} is None")
        if coefficients is None or factors is None:
            continue
        if len(coefficients) != len(factors):
            raise ValueError(f"{name}: {len(coefficients)} modules, {side} has {len(factors)}")
        for l, (c, clients) in enumerate(zip(coefficients, factors, strict=True)):
            R = factors.ranks[l] if isinstance(factors, Stacks) else sum(t.shape[rank_dim] for t in clients)
            fits = c.shape == (len(clients),) or (c.ndim == 2 and c.shape[1 - rank_dim] == R)
            if c.dtype != torch.float64 or not fits:
                blocks = f"({R}, r)" if name == "P" else f"(r, {R})"
                raise ValueError(
                    f"{name}[{l}]: expected float64 ({len(clients)},) or {blocks}, got {tuple(c.shape)} {c.dtype}"
                )


def native_sides(asked: Combination) -> list[Side]:
    """Per side that is not skipped what the compiled loops take: factors, coefficients, and empty outputs.

    Raises:
        ValueError: as ``factor_combine``.
    """
    B, A, P, Q, dtype = asked
    described = Combination(*stacks_of(B, A), stored(P), stored(Q), dtype)
    _check_coefficients(described)
    check_beside(flat(P, Q), B, A)
    return [
        (stacks, [_blocks(stacks, l, c) for l, c in enumerate(coefficients)], _outputs(stacks, coefficients, dtype))
        for stacks, coefficients, _ in described.sides()
        if isinstance(stacks, Stacks)
    ]


def written(sides: Sequence[Side]) -> list[list[Tensor]]:
    """The outputs of the sides, once the loops have run."""
    return [[clients[0] for clients in to] for _, _, to in sides]


def _outputs(stacks: Stacks, coefficients: Sequence[Tensor], dtype: torch.dtype | None) -> Stacks:
    out, turned = [], stacks.transposed
    for length, widest, own, c in zip(stacks.lengths, stacks.widest, stacks.dtypes, coefficients, strict=True):
        rank = widest if c.ndim == 1 else c.shape[not turned]
        shape = (rank, length) if turned else (length, rank)
        out.append([torch.empty(shape, dtype=dtype or own, device="cpu")])
    return Stacks(out, transposed=turned)


def _blocks(stacks: Stacks, module: int, coefficients: Tensor) -> Tensor:
    """Coefficients as tall blocks (R, r), or as scalars (U,) where the loops take them as such."""
    if coefficients.ndim == 2:
        return coefficients.T if stacks.transposed else coefficients
    if stacks.mixable[module]:
        return coefficients
    return spread_scalars(coefficients, [t.shape[not stacks.transposed] for t in stacks[module]])


PLANS: PlanCache[CombinePlan | ScalarPlan | str] = PlanCache()


def _on_triton(asked: Combination, backend: str) -> list[Tensor] | None:
    """The outputs of B's side, then of A's; None where the kernels cannot take them and nobody ordered them to."""
    B, A, P, Q, dtype = asked
    if not (one := first(B, A)):
        return None
    from ._factor_combine_triton import factor_combine_triton
    from ._factor_scalars_launch import ScalarPlan

    coefficients = [c.contiguous() for c in flat(stored(P), stored(Q))]
    layout, pointers = inventory(B, A)
    key = (place(one[0].device), dtype, P is None, Q is None, layout, describe(coefficients))
    with launching_on(one[0].device):
        plan = PLANS.get(key, lambda: _plan(asked, pointers))
        if isinstance(plan, ScalarPlan):
            return plan.combine(pointers, addresses(coefficients))
        if not isinstance(plan, str):
            return plan.split(factor_combine_triton(plan, pointers, addresses(coefficients)))
    if backend == "triton":
        raise ValueError(f"backend='triton': {plan}")
    return None


def _plan(asked: Combination, pointers: np.ndarray) -> CombinePlan | ScalarPlan | str:
    """Check once per layout and lay out the work, or say why the kernels cannot do it."""
    from ._factor_combine_plan import CombinePlan, Task
    from ._factor_plan import Piece
    from ._factor_scalars_launch import ScalarPlan, is_sum
    from ._triton_common import coefficient_precision

    check_combine(asked)
    B, A, P, Q, dtype = asked
    if (reason := module_of_mixed_types(B, A)) is not None:
        return reason
    check_one_device(flat(B, A, P, Q))
    sides, scalars = [*(B or ()), *(A or ())], [*(P or ()), *(Q or ())]
    if all(is_sum(clients, c) for clients, c in zip(sides, scalars, strict=True)):
        return ScalarPlan(sides, [output_dtype(clients, dtype) for clients in sides], pointers)
    tasks, index = [], 0
    for factors, coefficients, transposed in asked.sides():
        for clients, c in zip(factors, coefficients, strict=True):
            pieces = [Piece.of(index + u, t, transposed=transposed) for u, t in enumerate(clients)]
            index += len(clients)
            out = output_dtype(clients, dtype)
            precision = coefficient_precision(clients[0].dtype, out)
            tasks.append(Task(pieces, output_rank(clients, c, transposed), c.ndim == 1, transposed, out, precision))
    return CombinePlan(tasks, flat(B, A)[0].device)


def output_rank(clients: Sequence[Tensor], coefficients: Tensor, transposed: bool) -> int:
    """The rank of a module's output: the largest of the clients', or what the blocks ask for."""
    rank_dim = 0 if transposed else 1
    return max(t.shape[rank_dim] for t in clients) if coefficients.ndim == 1 else coefficients.shape[rank_dim]


def output_shapes(
    B: Factors | None, A: Factors | None, P: Sequence[Tensor] | None, Q: Sequence[Tensor] | None
) -> list[tuple[int, int]]:
    """The shapes of all outputs, of B's side, then of A's."""
    left = [(bs[0].shape[0], output_rank(bs, p, False)) for bs, p in zip(B or (), P or (), strict=True)]
    return left + [(output_rank(as_, q, True), as_[0].shape[1]) for as_, q in zip(A or (), Q or (), strict=True)]


def _compiled(asked: Combination, backend: str) -> list[Tensor] | None:
    """What ``torch.compile`` sees: one operator."""
    B, A, P, Q, dtype = asked
    if not flat(B, A):
        return None
    skip = (B is None, A is None)
    return _factor_combine_op(flat(B), flat(A), flat(P), flat(Q), counts(B), counts(A), *skip, dtype, backend)


@torch.library.custom_op("fedgram::factor_combine", mutates_args=())
def _factor_combine_op(
    B: list[Tensor],
    A: list[Tensor],
    P: list[Tensor],
    Q: list[Tensor],
    clients_B: list[int],
    clients_A: list[int],
    skip_B: bool,
    skip_A: bool,
    dtype: torch.dtype | None,
    backend: str,
) -> list[Tensor]:
    """All outputs, each with its own memory, as operators must return them."""
    left = (None, None) if skip_B else (nest(B, clients_B), P)
    right = (None, None) if skip_A else (nest(A, clients_A), Q)
    both = factor_combine(left[0], right[0], left[1], right[1], dtype=dtype, backend=backend)
    return [t.clone(memory_format=torch.contiguous_format) for side in both for t in side or ()]


@_factor_combine_op.register_fake
def _(B, A, P, Q, clients_B, clients_A, skip_B, skip_A, dtype, backend):  # noqa: ANN001
    shapes = output_shapes(nest(B, clients_B), nest(A, clients_A), P, Q)
    sides = nest(B, clients_B) + nest(A, clients_A)
    return [c[0].new_empty(s, dtype=output_dtype(c, dtype)) for c, s in zip(sides, shapes, strict=True)]
