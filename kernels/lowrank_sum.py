"""Add a weighted sum of low-rank products to one weight: ``beta W + sum_u c_u B_u A_u``, without dense copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _native_sums
from ._dispatch import resolve
from ._factor_inputs import check_factors, flat, mixed_types
from ._floats import FLOATS
from ._memory import ask_for_large_pages, check_memory, meets, overlaps_itself, span
from ._plan import PlanCache, check_runnable, launching_on, place, survey

if TYPE_CHECKING:
    from ._lowrank_sum_triton import SumPlan

TILE = (256, 512)  # rows and columns of W worked on at once on a CPU: 1 MB in float64
TILE_GPU = (4096, 8192)
CHUNK, CHUNK_GPU = 256, 1024  # stacked ranks packed at once
CUBLAS_RANK = 256  # from this total rank on the sum is bound by arithmetic, where cuBLAS is at the floor


def lowrank_sum(
    W: Tensor | None,
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    coefficients: Tensor,
    *,
    beta: float = 1.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``beta W + sum_u c_u B_u A_u`` of one module in one pass over ``W``, with one rounding at the end.

    Args:
        W: (m, n), any float type; None stands for zero. Not read where ``beta`` is 0.
        B: ``B[u]`` (m, r_u).
        A: ``A[u]`` (r_u, n).
        coefficients: (U,) float64, on the factors' device.
        beta: factor of ``W``.
        out: (m, n) to write into, which may be ``W`` itself; by default a new tensor of the type of ``W``, or of the
            factors where ``W`` is None. It must not share memory with the factors, nor with a ``W`` that it is not.
        backend: ``auto``, ``triton``, ``native`` or ``torch``. On a GPU ``auto`` takes Triton while the ranks sum to
            less than ``CUBLAS_RANK``, where the sum is bound by memory; from there on cuBLAS for bfloat16 and float64
            factors. float32 and float16 stay on Triton, whose tf32x3 products are faster than cuBLAS's float32.

    The sum is kept in float64 where a factor or the output is float64, on the torch path also for float32 outputs;
    else in float32, on the compiled CPU loops over 64 ranks at a time, and float64 beyond. Where a processor has a
    matrix unit (Intel's AMX) the loops split every factor into as many bfloat16 numbers as hold all its bits, so that
    nothing is lost but products of 2^-24, and keep sums in float32 over 512 ranks at a time. On a GPU the coefficients
    are applied to finished products, never to stored numbers, and clients of several types are left to the torch path.

    Returns:
        (m, n), ``out`` where it is given.

    Raises:
        ValueError: shapes, types or devices do not fit together; the message names the tensor.
        RuntimeError: ``backend="triton"`` or ``"native"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        check_sum(W, B, A, coefficients, out)
        if out is None:
            return _lowrank_sum_op(W, list(B), list(A), coefficients, float(beta), backend)
        in_place = out is W
        _lowrank_sum_out_op(
            out, None if in_place else W, list(B), list(A), coefficients, float(beta), in_place, backend
        )
        return out
    kind = resolve(backend, flat(B, A, [coefficients], [t for t in (W, out) if t is not None]), native=True)
    check_sum(W, B, A, coefficients, out)
    fresh = out is None
    if out is None:
        out = new_output(W, B, A)
        if kind == "native":
            ask_for_large_pages(out)
    if kind == "triton" and not (backend == "auto" and cublas_wins(B)):
        done = _on_triton(W, B, A, coefficients, beta, out, backend)
        if done is not None:
            return done
    if kind == "native":
        double = torch.float64 in {t.dtype for t in (*B, *A, out)}
        _native_sums.lowrank_sum(W, B, A, coefficients, beta, out, wide=double, fresh=fresh)
        torch.autograd.graph.increment_version(out)  # as every write of torch does: autograd must see it
        return out
    return lowrank_sum_torch(W, B, A, coefficients, beta=beta, out=out)


def cublas_wins(B: Sequence[Tensor]) -> bool:
    """The rule of ``auto`` on a GPU: cuBLAS for much arithmetic in types that it multiplies at full speed."""
    return sum(b.shape[1] for b in B) >= CUBLAS_RANK and {b.dtype for b in B} <= {torch.bfloat16, torch.float64}


def check_sum(
    W: Tensor | None, B: Sequence[Tensor], A: Sequence[Tensor], coefficients: Tensor, out: Tensor | None
) -> None:
    """Raise ValueError unless the arguments of ``lowrank_sum`` fit together."""
    if isinstance(B, Tensor) or not len(B):
        raise ValueError("B: expected a sequence of at least one client's tensor")
    check_factors([B], [A])
    if coefficients.shape != (len(B),) or coefficients.dtype != torch.float64:
        got = f"{tuple(coefficients.shape)} {coefficients.dtype}"
        raise ValueError(f"coefficients: expected float64 ({len(B)},), got {got}")
    shape = (B[0].shape[0], A[0].shape[1])
    for name, t in (("W", W), ("out", out)):
        if t is not None and (t.shape != shape or t.dtype not in FLOATS):
            raise ValueError(f"{name}: expected a float matrix {shape}, got {tuple(t.shape)} {t.dtype}")
        if t is not None and not torch.compiler.is_compiling() and t.is_neg():
            raise ValueError(f"{name}: a view that negates its memory; pass a tensor of its own")
    if out is not None and not torch.compiler.is_compiling():
        _check_memory(out, W, B, A)


def _check_memory(out: Tensor, W: Tensor | None, B: Sequence[Tensor], A: Sequence[Tensor]) -> None:
    if not out.numel():
        return
    if overlaps_itself(out):
        raise ValueError("out: its elements share memory")
    first, end = span(out)
    for name, factors in (("B", B), ("A", A)):
        for u, t in enumerate(factors):
            if meets(t, first, end):
                raise ValueError(f"out: shares memory with {name}[{u}]")
    if W is not None and W is not out and meets(W, first, end):
        same = (W.data_ptr(), W.stride(), W.dtype) == (out.data_ptr(), out.stride(), out.dtype)
        if not same:
            raise ValueError("out: shares memory with W without being W")


def new_output(W: Tensor | None, B: Sequence[Tensor], A: Sequence[Tensor]) -> Tensor:
    """An uninitialised (m, n) of the type of ``W``, or of the first factor."""
    like = B[0] if W is None else W
    return torch.empty(B[0].shape[0], A[0].shape[1], dtype=like.dtype, device=like.device)


@torch.no_grad()
def lowrank_sum_torch(
    W: Tensor | None, B: Sequence[Tensor], A: Sequence[Tensor], coefficients: Tensor, *, beta: float, out: Tensor
) -> Tensor:
    """The torch twin of ``lowrank_sum``: tiles of ``W``, stacked ranks in chunks.

    The sum is kept in float64, or in float32 where the output has 16 bits. On a GPU bfloat16 factors keep their type:
    the weighted ``B`` is split in two bfloat16 terms (2^-17), multiplied natively with a float32 sum.
    """
    gpu = out.is_cuda
    (m, n), (rows, columns) = out.shape, TILE_GPU if gpu else TILE
    chunks = list(_chunks(B, CHUNK_GPU if gpu else CHUNK))
    depth = max((stop - start for _, (start, stop) in chunks), default=0)
    types = {t.dtype for t in (*B, *A)}
    wide = torch.float32 if out.dtype.itemsize == 2 and torch.float64 not in types else torch.float64
    right_type = torch.bfloat16 if gpu and wide == torch.float32 and types == {torch.bfloat16} else wide
    acc = torch.empty(min(m, rows), min(n, columns), dtype=wide, device=out.device)
    left = torch.empty(min(m, rows), depth, dtype=wide, device=out.device)
    right = torch.empty(depth, min(n, columns), dtype=right_type, device=out.device)
    weights = coefficients.to(wide)
    for i in range(0, m, rows):
        for j in range(0, n, columns):
            tile = out[i : i + rows, j : j + columns]
            total = acc[: tile.shape[0], : tile.shape[1]]
            if W is None or beta == 0:
                total.zero_()
            else:
                total.copy_(W[i : i + rows, j : j + columns]).mul_(beta)
            for clients, (start, stop) in chunks:
                b, a = left[: tile.shape[0], : stop - start], right[: stop - start, : tile.shape[1]]
                offset = 0
                for u, first, last in clients:
                    r = last - first
                    b[:, offset : offset + r].copy_(B[u][i : i + rows, first:last]).mul_(weights[u])
                    a[offset : offset + r].copy_(A[u][first:last, j : j + columns])
                    offset += r
                _add_product(total, b, a)
            tile.copy_(total)
    return out


def _add_product(total: Tensor, b: Tensor, a: Tensor) -> None:
    """``total += b @ a``, for ``a`` of 16 bits with ``b`` as the sum of two terms of that type."""
    if a.dtype == b.dtype:
        total.addmm_(b, a)
        return
    high = b.to(a.dtype)
    _add_native(total, high, a)
    _add_native(total, (b - high).to(a.dtype), a)


def _add_native(total: Tensor, b: Tensor, a: Tensor) -> None:
    """``total += b @ a`` with 16-bit operands and a float32 sum, which torch offers on GPUs only."""
    torch.addmm(total, b, a, out_dtype=total.dtype, out=total)


def _chunks(B: Sequence[Tensor], most: int) -> Iterator[tuple[list[tuple[int, int, int]], tuple[int, int]]]:
    """Yield runs of at most ``most`` stacked ranks: the pieces ``(client, first, last)`` and the run's bounds."""
    pieces: list[tuple[int, int, int]] = []
    start = position = 0
    for u, b in enumerate(B):
        first = 0
        while first < b.shape[1]:
            last = min(b.shape[1], first + most - (position - start))
            pieces.append((u, first, last))
            position += last - first
            first = last
            if position - start == most:
                yield pieces, (start, position)
                pieces, start = [], position
    if pieces:
        yield pieces, (start, position)


PLANS: PlanCache[SumPlan] = PlanCache(256)  # one per weight


def _on_triton(
    W: Tensor | None,
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    coefficients: Tensor,
    beta: float,
    out: Tensor,
    backend: str,
) -> Tensor | None:
    """``out``, written; None where the kernel cannot take the factors and nobody ordered it to."""
    from ._factor_plan import Piece
    from ._lowrank_sum_triton import SumPlan, lowrank_sum_triton

    if (reason := mixed_types([*B, *A])) is not None:
        if backend == "triton":
            raise ValueError(f"backend='triton': {reason}")
        return None
    check_runnable(out.device)
    tensors = [*B, *A]
    layout, pointers = survey(tensors)
    others = [t for t in (W, out, coefficients) if t is not None]
    if not pointers.all() or not all(map(Tensor.data_ptr, others)):
        check_memory([*tensors, *others])

    def build() -> SumPlan:
        pieces = [Piece.of(i, t, transposed=i >= len(B)) for i, t in enumerate(tensors)]
        return SumPlan(pieces[: len(B)], pieces[len(B) :], out.dtype, out.device)

    with launching_on(out.device):
        plan = PLANS.get((place(out.device), out.dtype, len(B), layout), build)
        lowrank_sum_triton(plan, pointers, W, coefficients.resolve_neg().contiguous(), beta, out)
    torch.autograd.graph.increment_version(out)  # as every write of torch does: autograd must see it
    return out


@torch.library.custom_op("fedgram::lowrank_sum", mutates_args=())
def _lowrank_sum_op(
    W: Tensor | None, B: list[Tensor], A: list[Tensor], coefficients: Tensor, beta: float, backend: str
) -> Tensor:
    """What ``torch.compile`` sees of ``lowrank_sum`` into new memory."""
    return lowrank_sum(W, B, A, coefficients, beta=beta, backend=backend)


@_lowrank_sum_op.register_fake
def _(W, B, A, coefficients, beta, backend):  # noqa: ANN001
    return new_output(W, B, A)


@torch.library.custom_op("fedgram::lowrank_sum_out", mutates_args=("out",))
def _lowrank_sum_out_op(
    out: Tensor,
    W: Tensor | None,
    B: list[Tensor],
    A: list[Tensor],
    coefficients: Tensor,
    beta: float,
    in_place: bool,
    backend: str,
) -> None:
    """What ``torch.compile`` sees of ``lowrank_sum`` into ``out``, which is W itself with ``in_place``."""
    lowrank_sum(out if in_place else W, B, A, coefficients, beta=beta, out=out, backend=backend)


@_lowrank_sum_out_op.register_fake
def _(out, W, B, A, coefficients, beta, in_place, backend):  # noqa: ANN001
    return None
