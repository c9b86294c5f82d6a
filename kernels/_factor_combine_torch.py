"""The torch twin of ``factor_combine``: blocks of the factors that fit the cache, combined in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ._factor_inputs import CACHE_BYTES, CACHE_BYTES_GPU, Factors, TallColumns, tall_A, tall_B

Combined = list[Tensor] | None


@torch.no_grad()
def factor_combine_torch(
    B: Factors | None,
    A: Factors | None,
    P: Sequence[Tensor] | None,
    Q: Sequence[Tensor] | None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Combined, Combined]:
    """The torch twin of ``factor_combine``: float64 throughout, in blocks that fit the cache."""
    left = right = None
    if B is not None and P is not None:
        left = [_combine(tall_B(bs), p, dtype, transposed=False) for bs, p in zip(B, P, strict=True)]
    if A is not None and Q is not None:
        right = [
            _combine(tall_A(as_), q.T if q.ndim == 2 else q, dtype, transposed=True).T
            for as_, q in zip(A, Q, strict=True)
        ]
    return left, right


def output_dtype(columns: Sequence[Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """The asked type, or the common type of the inputs."""
    if dtype is not None:
        return dtype
    return reduce(torch.promote_types, {t.dtype for t in columns})


def _combine(stack: TallColumns, coefficients: Tensor, dtype: torch.dtype | None, *, transposed: bool) -> Tensor:
    scalars = coefficients.ndim == 1
    rank = max(t.shape[1] for t in stack.columns) if scalars else coefficients.shape[1]
    shape = (rank, stack.length) if transposed else (stack.length, rank)
    out = torch.zeros(shape, dtype=output_dtype(stack.columns, dtype), device=stack.device)
    tall = out.T if transposed else out
    if out.numel() and stack.width:
        (_combine_scalars if scalars else _combine_blocks)(stack, coefficients, tall)
    return tall


def _combine_blocks(stack: TallColumns, P: Tensor, out: Tensor) -> None:
    product = torch.empty(P.shape[1], min(stack.rows_per_block(), stack.length), dtype=P.dtype, device=P.device)
    for start, stop, block in stack.blocks():
        # as (r, rows): BLAS runs a product with few rows up to 30 times faster than one with few columns
        out[start:stop].copy_(torch.mm(P.T, block.T, out=product[:, : stop - start]).T)


def _combine_scalars(stack: TallColumns, p: Tensor, out: Tensor) -> None:
    """``sum_u p_u B_u`` as one vector-matrix product per block: client u is row u of the block, zero-padded."""
    clients, rank = len(stack.columns), out.shape[1]
    cache = CACHE_BYTES if stack.device.type == "cpu" else CACHE_BYTES_GPU
    step = min(stack.length, max(64, cache // (8 * clients * rank)))
    ragged = any(t.shape[1] != rank for t in stack.columns)
    shape = (clients, rank, step) if stack.wide else (clients, step, rank)
    buffer = torch.zeros(shape, dtype=torch.float64, device=stack.device)
    for start in range(0, stack.length, max(step, 1)):
        stop = min(start + step, stack.length)
        if stop - start < step:  # the last block is a fresh one: rows of a part of the buffer are not contiguous
            shape = (clients, rank, stop - start) if stack.wide else (clients, stop - start, rank)
            buffer = torch.zeros(shape, dtype=torch.float64, device=stack.device)
        rows = [t[start:stop] for t in stack.columns]
        if not ragged:
            torch.stack([t.T for t in rows] if stack.wide else rows, out=buffer)
        for u, t in enumerate(rows if ragged else ()):
            (buffer[u].T if stack.wide else buffer[u])[:, : t.shape[1]].copy_(t)
        part = (p @ buffer.view(clients, -1)).view(buffer.shape[1:])
        out[start:stop].copy_(part.T if stack.wide else part)
