"""Gram matrix of task gradients of a linear layer, without the gradients."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import resolve
from ._floats import FLOATS
from ._grad_inputs import exact_product_type
from ._offsets import checked_offsets, host_integers
from ._plan import launching_on

# Rows of one side of a tile; memory is a few tiles of this side in float64.
TILE_ROWS = 512


def ghost_gram(
    inputs: Tensor,
    output_grads: Tensor,
    offsets: Tensor | Sequence[int],
    *,
    bias: bool = False,
    precise: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Inner products of K task gradients of a linear layer from its inputs and output gradients.

    With ``g_k = sum_{i in k} d_i a_i^T``, ``<g_k, g_l> = sum_{i in k, j in l} (a_i . a_j)(d_i . d_j)``; with a bias the
    first factor is ``a_i . a_j + 1``. Rows are samples and positions alike; all uses of a reused weight stack as rows.
    Costs ``N^2 (p + q)`` multiplications; no N x N matrix is kept.

    Args:
        inputs: (N, p) rows a_i, or (N,) int64 token numbers of an embedding, where ``a_i . a_j = [tok_i = tok_j]``.
        output_grads: (N, q) rows d_i; float64, float32, bfloat16 or float16, as ``inputs``.
        offsets: (K + 1,) row boundaries of the tasks, from 0 to N, never falling, on the host (a list or a CPU
            tensor; a list under ``torch.compile``): rows ``offsets[k]`` to ``offsets[k+1]`` belong to task k, which may
            be none.
        bias: add the gradient of the bias.
        precise: multiply in float64. Otherwise the row products are float32 (16-bit rows are widened first), and all
            that follows is float64.
        backend: "auto", "triton" or "torch".

    Returns:
        (K, K) float64 on the inputs' device, exactly symmetric. Its error is relative to
        ``sum |a_i||a_j||d_i||d_j|``: where the rows' gradients cancel within a task, take ``precise=True``.

    Raises:
        ValueError: shapes, types or offsets that do not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    _check_rows(inputs, output_grads, bias)
    if torch.compiler.is_compiling():
        return _ghost_gram_op(inputs, output_grads, host_integers(offsets, "offsets"), bias, precise, backend)
    return _ghost_gram(inputs, output_grads, checked_offsets(offsets, inputs.shape[0]), bias, precise, backend)


def _ghost_gram(
    inputs: Tensor, output_grads: Tensor, offsets: tuple[int, ...], bias: bool, precise: bool, backend: str
) -> Tensor:
    if resolve(backend, [inputs, output_grads]) == "triton":
        from ._ghost_gram_launch import ghost_gram_triton

        with launching_on(inputs.device):
            return ghost_gram_triton(inputs, output_grads, offsets, bias, precise)
    return _ghost_gram_torch(inputs, output_grads, offsets, bias, precise)


@torch.library.custom_op("fedgram::ghost_gram", mutates_args=())
def _ghost_gram_op(
    inputs: Tensor, output_grads: Tensor, offsets: Sequence[int], bias: bool, precise: bool, backend: str
) -> Tensor:
    return _ghost_gram(inputs, output_grads, checked_offsets(offsets, inputs.shape[0]), bias, precise, backend)


@_ghost_gram_op.register_fake
def _(inputs: Tensor, output_grads: Tensor, offsets: Sequence[int], bias: bool, precise: bool, backend: str) -> Tensor:
    K = len(offsets) - 1
    return output_grads.new_empty((K, K), dtype=torch.float64)


class RowBlock(NamedTuple):
    """Rows ``start`` to ``stop``: a part of one task, or several whole tasks ``first`` to ``last``."""

    start: int
    stop: int
    first: int
    last: int


@functools.lru_cache(maxsize=64)
def row_blocks(offsets: tuple[int, ...], size: int) -> tuple[RowBlock, ...]:
    """Cut the rows into blocks of at most ``size`` rows and tasks: long tasks into parts, short neighbours together."""
    blocks: list[RowBlock] = []
    group: RowBlock | None = None
    for k, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if group is not None and stop - group.start <= size and k < group.first + size:
            group = group._replace(stop=stop, last=k + 1)
            continue
        if group is not None:
            blocks.append(group)
        group = RowBlock(start, stop, k, k + 1)
        if stop - start > size:
            blocks += [RowBlock(s, min(s + size, stop), k, k + 1) for s in range(start, stop, size)]
            group = None
    if group is not None:
        blocks.append(group)
    return tuple(block for block in blocks if block.start < block.stop)


@torch.no_grad()
def _ghost_gram_torch(
    inputs: Tensor, output_grads: Tensor, offsets: tuple[int, ...], bias: bool, precise: bool
) -> Tensor:
    """The torch twin: tiles of ``(a a^T) * (d d^T)``, each summed over its pairs of tasks in float64."""
    K, device = len(offsets) - 1, output_grads.device
    off = torch.zeros((K, K), dtype=torch.float64, device=device)
    diagonal = torch.zeros_like(off)
    precise = precise or torch.float64 in (inputs.dtype, output_grads.dtype)
    dtype = torch.float64 if precise else exact_product_type(device)
    blocks = row_blocks(offsets, TILE_ROWS)
    with torch.autocast(device.type, enabled=False):
        for n, i in enumerate(blocks):
            for j in blocks[n:]:
                tile = _products(inputs, i, j, dtype)
                if bias:
                    tile += 1
                tile *= _products(output_grads, i, j, dtype)
                sums = _task_sums(_task_sums(tile, i, offsets).T, j, offsets).T
                target = diagonal if i is j else off
                target[i.first : i.last, j.first : j.last] += sums
    return off + off.T + (diagonal + diagonal.T) / 2


def _products(rows: Tensor, i: RowBlock, j: RowBlock, dtype: torch.dtype) -> Tensor:
    """Inner products of the rows of two blocks, float64; of token numbers, whether they are equal."""
    x, y = rows[i.start : i.stop], rows[j.start : j.stop]
    if rows.ndim == 1:
        return (x[:, None] == y[None, :]).to(torch.float64)
    return torch.mm(x.to(dtype), y.to(dtype).T).to(torch.float64)


def _task_sums(tile: Tensor, block: RowBlock, offsets: tuple[int, ...]) -> Tensor:
    """Sum the tile's rows over each task of the block."""
    if block.last - block.first == 1:
        return tile.sum(0, keepdim=True)
    bounds = [offsets[k] - block.start for k in range(block.first, block.last + 1)]
    ends = torch.tensor(bounds, device=tile.device)
    return torch.segment_reduce(tile.contiguous(), "sum", offsets=ends, axis=0, unsafe=True, initial=0)


def _check_rows(inputs: Tensor, output_grads: Tensor, bias: bool) -> None:
    tokens = inputs.ndim == 1
    if inputs.ndim not in (1, 2) or (tokens and inputs.dtype != torch.int64):
        kind = f"{tuple(inputs.shape)} {inputs.dtype}"
        raise ValueError(f"inputs: expected (N, p) rows, or (N,) int64 token numbers, got {kind}")
    if not tokens and inputs.dtype not in FLOATS:
        raise ValueError(f"inputs: expected a float tensor (64, 32 or 16 bit), got {inputs.dtype}")
    if output_grads.ndim != 2 or output_grads.dtype not in FLOATS:
        kind = f"{tuple(output_grads.shape)} {output_grads.dtype}"
        raise ValueError(f"output_grads: expected (N, q) floats (64, 32 or 16 bit), got {kind}")
    if inputs.shape[0] != output_grads.shape[0]:
        raise ValueError(f"output_grads: expected {inputs.shape[0]} rows as in inputs, got {output_grads.shape[0]}")
    if tokens and bias:
        raise ValueError("bias: an embedding has none")
