"""Centred Gram matrix of K gradients, each a list of tensors, read in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native_gradients
from ._dispatch import resolve
from ._grad_inputs import (
    ColumnRange,
    Gradients,
    GradLayout,
    check_gradients,
    check_weights,
    column_blocks,
    exact_product_type,
    flat_range,
    flatten,
    memory_order,
    stored,
    transposed,
    unflatten,
)
from ._plan import launching_on
from .native_calls import at_most_threads

# A block of K rows of this many bytes stays in the last-level cache of a CPU while it is centred and multiplied.
BLOCK_BYTES = {"cpu": 4 << 20}
BLOCK_BYTES_DEVICE = 64 << 20
# Columns of one product: within it the accumulator has the products' type, beyond it float64.
PRODUCT_COLUMNS = 512
# Products of a block, at least: on a CPU no more threads than these work on them.
PRODUCTS = 8
ROUNDING = 8 * 2.0**-52  # of the four terms of a recentred entry
# Up to this many tasks the compiled loops are faster than a matrix product; above, the product decides.
NATIVE_TASKS = 256


class GradGram(NamedTuple):
    """The centred triple of docs/math.md 2.2: ``G_kl = <g_k, g_l> = n0 + h_k + h_l + H_kl``, all float64.

    Attributes:
        n0: (), squared norm of the weighted mean ``g0 = sum_k u_k g_k``.
        h: (K,), ``<g0, e_k>`` with ``e_k = g_k - g0``.
        H: (K, K), ``<e_k, e_l>``, exactly symmetric.
    """

    n0: Tensor
    h: Tensor
    H: Tensor


def grad_gram(
    gradients: Gradients, weights: Tensor | None = None, *, precise: bool = False, backend: str = "auto"
) -> GradGram:
    """Centred Gram of K gradients in one read of the data (STAMP, arXiv:2506.12031, the G of its eq. for matching).

    Centring comes before the product because gradients of neighbouring tasks share a large common part: with a
    relative spread of 1e-4 the plain float32 Gram has lost the spread. The gradients are neither stacked nor copied;
    extra memory is O(K^2) plus one block of columns. The result has the same bits on every run and, on the CPU, for
    every number of threads.

    Args:
        gradients: K sequences of P tensors, the same shapes and types for every task; float64, float32, bfloat16 or
            float16 (types may differ between parameters); any strides, empty and 0-dim tensors included.
        weights: (K,) u >= 0, taken relative to their sum; default uniform. On a GPU only their shape is checked.
        precise: multiply in float64. Otherwise float32 within ``PRODUCT_COLUMNS`` columns (float64 inputs are always
            multiplied in float64) and float64 beyond; error 2e-6 of ``sqrt(H_kk H_ll)``, 1e-7 when precise. Triton
            takes bfloat16 in two parts, 2^-18 of each number: that averages out over many columns, and where few
            hold most of ``H`` errors reach 1e-5 of ``(s_k + s) (s_l + s)``, ``s_k = sqrt(H_kk)``, ``s`` their mean.
        backend: "auto", "triton", "native" or "torch".

    Returns:
        ``GradGram(n0, h, H)`` in float64 on the gradients' device.

    Raises:
        ValueError: no gradients; shapes, types or devices that differ; bad weights.
        RuntimeError: ``backend="triton"`` or ``"native"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        u = check_weights(weights, len(gradients), check_gradients(gradients).device)
        return GradGram(*_grad_gram_op(flatten(gradients), u, precise, backend))
    tensors = flatten(gradients)
    gradients = stored(gradients, tensors)
    chosen = resolve(backend, tensors, native=True)
    if tensors and chosen == "triton":
        from ._grad_gram_launch import grad_gram_triton

        with launching_on(tensors[0].device):
            return GradGram(*grad_gram_triton(gradients, weights, precise))
    layout = check_gradients(gradients)
    u = check_weights(weights, layout.tasks, layout.device)
    if chosen == "native" and (backend == "native" or layout.tasks <= NATIVE_TASKS):
        return recentred(*_gram_native(gradients, layout, u, precise), u)
    return recentred(*_gram_about_centre(transposed(gradients), layout, u, precise), u)


@torch.library.custom_op("fedgram::grad_gram", mutates_args=())
def _grad_gram_op(
    gradients: Sequence[Tensor], weights: Tensor, precise: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    triple = grad_gram(unflatten(gradients, weights.shape[0]), weights, precise=precise, backend=backend)
    return triple.n0, triple.h, triple.H


@_grad_gram_op.register_fake
def _(gradients: Sequence[Tensor], weights: Tensor, precise: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    K = weights.shape[0]
    return weights.new_empty(()), weights.new_empty((K,)), weights.new_empty((K, K))


def recentred(n: Tensor, h: Tensor, H: Tensor, u: Tensor) -> GradGram:
    """The triple about ``g0`` from the triple about any centre c near it.

    ``n = ||c||^2``, ``h_k = <c, e_k>``, ``H_kl = <e_k, e_l>`` with ``e_k = g_k - c``. The centre may carry rounding
    errors, as it does when it is stored in float32: with ``m = sum_k u_k e_k``, ``g0 = c + m`` holds exactly, and all
    of the correction is K x K arithmetic. ``e_k`` itself is exact where g_k and c are within a factor of two of
    each other, which is just where centring matters (Sterbenz's lemma).
    """
    H = (H + H.T) / 2
    Hu = (H * u).sum(1)
    mm, cm = (Hu * u).sum(), (h * u).sum()
    # Sums of two commute, so H stays symmetric to the bit.
    centred = H - (Hu[:, None] + Hu[None, :]) + mm
    # A task whose squared distance is rounding of what it is a difference of lies at g0: no negative squares.
    apart = centred.diagonal() > ROUNDING * (H.diagonal() + 2 * Hu.abs() + mm)
    return GradGram(n + 2 * cm + mm, h - cm + Hu - mm, centred * apart[:, None] * apart[None, :])


def _gram_native(gradients: Gradients, layout: GradLayout, u: Tensor, precise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled loops on what lies flat in memory, the torch twin on the rest: the triple is a sum over columns."""
    columns = [list(ts) for ts in zip(*gradients, strict=True) if ts[0].numel()]
    views = [memory_order(ts) for ts in columns]
    flat = [found for found in views if found is not None]
    rest = [ts for ts, found in zip(columns, views, strict=True) if found is None]
    wide = precise or torch.float64 in layout.dtypes
    parts = [_native_gradients.grad_gram(flat, u, wide)] if flat else []
    if rest or not parts:
        shapes, dtypes = tuple(ts[0].shape for ts in rest), tuple(ts[0].dtype for ts in rest)
        parts.append(_gram_about_centre(rest, layout._replace(shapes=shapes, dtypes=dtypes), u, wide))
    n, h, H = (sum(terms[1:], start=terms[0]) for terms in zip(*parts, strict=True))
    return n, h, H


@torch.no_grad()
def _gram_about_centre(
    columns: list[list[Tensor]], layout: GradLayout, u: Tensor, precise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch twin: blocks of columns are gathered, centred in place and multiplied while they are in the cache."""
    K, device = layout.tasks, layout.device
    dtype = torch.float64 if precise or torch.float64 in layout.dtypes else exact_product_type(device)
    rows = -(-(K + 1) // 8) * 8  # row K holds the centre; matrix products are slow off multiples of 8
    G = torch.zeros((rows, rows), dtype=torch.float64, device=device)
    with torch.autocast(device.type, enabled=False):
        for block in _centred_blocks(columns, layout, u.to(dtype), rows):
            # Products that are fewer than the threads may be split over their columns, and the bits would follow; of
            # as many or more every one is computed the same way whoever computes it.
            with at_most_threads(len(block)) if device.type == "cpu" else nullcontext():
                products = torch.bmm(block, block.transpose(1, 2))
            G += products.sum(0, dtype=torch.float64)
    return G[K, K], G[K, :K], G[:K, :K]


def _centred_blocks(tensors: list[list[Tensor]], layout: GradLayout, u: Tensor, rows: int) -> Iterator[Tensor]:
    """Yield (batch, rows, columns) views of one buffer: rows g_k - c, then the row c, then rows of zeros."""
    K = layout.tasks
    budget = BLOCK_BYTES.get(layout.device.type, BLOCK_BYTES_DEVICE) // (rows * u.element_size())
    size = max(budget // PRODUCT_COLUMNS, PRODUCTS) * PRODUCT_COLUMNS
    size = min(size, _padded(sum(layout.numels)))
    buffer = torch.empty(rows * size, dtype=u.dtype, device=u.device)
    zeros = u.new_zeros(16 * _batch(size))
    matrix = buffer[:0].view(rows, 0)
    for pieces in column_blocks(layout.numels, size):
        used = sum(piece.stop - piece.start for piece in pieces)
        columns = _padded(used)
        if matrix.shape[1] != columns:
            matrix = buffer[: rows * columns].view(rows, columns)
            matrix[K + 1 :].zero_()
        _gather(tensors, pieces, zeros, columns - used, buffer[: K * columns], K)
        centre = matrix[K]
        torch.mv(matrix[:K].T, u, out=centre)
        matrix[:K].sub_(centre)
        batch = _batch(columns)
        yield matrix.view(rows, batch, columns // batch).transpose(0, 1)


def _gather(
    tensors: list[list[Tensor]], pieces: tuple[ColumnRange, ...], zeros: Tensor, padding: int, out: Tensor, K: int
) -> None:
    """Copy the pieces of all tasks into ``out``, task after task, each followed by ``padding`` zeros."""
    parts = []
    for k in range(K):
        parts += [flat_range(tensors[p][k], start, stop) for p, start, stop in pieces]
        if padding:
            parts.append(zeros[:padding])
    torch.cat(parts, out=out)


def _batch(columns: int) -> int:
    return max(2, -(-columns // PRODUCT_COLUMNS))


def _padded(columns: int) -> int:
    """Columns rounded up so that they divide into equal products of a multiple of 16 columns."""
    unit = 16 * _batch(columns)
    return max(1, -(-columns // unit)) * unit
