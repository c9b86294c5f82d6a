"""Add a weighted sum of low-rank products to one weight: ``beta W + sum_u c_u B_u A_u``, without dense copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._dispatch import resolve
from ._factor_inputs import FLOATS, check_factors, flat

TILE = (256, 512)  # rows and columns of W worked on at once: 1 MB in float64
CHUNK = 256  # stacked ranks packed at once
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
            factors where ``W`` is None. It must not share memory with the factors.
        backend: ``auto``, ``triton`` or ``torch``. ``auto`` takes Triton on a GPU while the ranks sum to less than
            ``CUBLAS_RANK``, where the sum is bound by memory, and cuBLAS from there on.

    Returns:
        (m, n), ``out`` where it is given.

    Raises:
        ValueError: shapes, types or devices do not fit together; the message names the tensor.
        RuntimeError: ``backend="triton"`` cannot run here.
    """
    check_sum(W, B, A, coefficients, out)
    resolve(backend, flat(B, A, [coefficients], [t for t in (W, out) if t is not None]))
    out = new_output(W, B, A) if out is None else out
    return lowrank_sum_torch(W, B, A, coefficients, beta=beta, out=out)


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
    if out is not None and out.device.type != "meta" and out.numel():
        memory = out.untyped_storage().data_ptr()
        for name, t in [(f"B[{u}]", t) for u, t in enumerate(B)] + [(f"A[{u}]", t) for u, t in enumerate(A)]:
            if t.untyped_storage().data_ptr() == memory:
                raise ValueError(f"out: shares memory with {name}")


def new_output(W: Tensor | None, B: Sequence[Tensor], A: Sequence[Tensor]) -> Tensor:
    """An uninitialised (m, n) of the type of ``W``, or of the first factor."""
    like = B[0] if W is None else W
    return torch.empty(B[0].shape[0], A[0].shape[1], dtype=like.dtype, device=like.device)


@torch.no_grad()
def lowrank_sum_torch(
    W: Tensor | None, B: Sequence[Tensor], A: Sequence[Tensor], coefficients: Tensor, *, beta: float, out: Tensor
) -> Tensor:
    """The torch twin of ``lowrank_sum``: tiles of ``W`` in float64, stacked ranks in chunks of ``CHUNK``."""
    (m, n), (rows, columns) = out.shape, TILE
    chunks = list(_chunks(B))
    depth = max((stop - start for _, (start, stop) in chunks), default=0)
    wide = {"dtype": torch.float64, "device": out.device}
    acc, left, right = (torch.empty(s, **wide) for s in ((rows, columns), (rows, depth), (depth, columns)))
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
                    b[:, offset : offset + r].copy_(B[u][i : i + rows, first:last]).mul_(coefficients[u])
                    a[offset : offset + r].copy_(A[u][first:last, j : j + columns])
                    offset += r
                total.addmm_(b, a)
            tile.copy_(total)
    return out


def _chunks(B: Sequence[Tensor]) -> Iterator[tuple[list[tuple[int, int, int]], tuple[int, int]]]:
    """Yield runs of at most CHUNK stacked ranks: the pieces ``(client, first, last)`` and the run's bounds."""
    pieces: list[tuple[int, int, int]] = []
    start = position = 0
    for u, b in enumerate(B):
        first = 0
        while first < b.shape[1]:
            last = min(b.shape[1], first + CHUNK - (position - start))
            pieces.append((u, first, last))
            position += last - first
            first = last
            if position - start == CHUNK:
                yield pieces, (start, position)
                pieces, start = [], position
    if pieces:
        yield pieces, (start, position)
