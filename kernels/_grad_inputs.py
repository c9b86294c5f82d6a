"""What the gradient operations take: checks of K lists of tensors, flat views, and blocks of columns.

Task k's gradient is the concatenation of its P tensors; a *column* is one scalar position of it, common to the tasks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import refuse_composed
from ._floats import FLOATS
from ._plan import moved

Gradients = Sequence[Sequence[Tensor]]


class GradLayout(NamedTuple):
    """What a plan may depend on: the shapes and types of one task's tensors, and the number of tasks."""

    tasks: int
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @property
    def numels(self) -> tuple[int, ...]:
        """Columns of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)


def check_gradients(gradients: Gradients) -> GradLayout:
    """Return the common layout of K lists of P tensors, or raise ValueError naming the first tensor out of line."""
    if len(gradients) == 0:
        raise ValueError("gradients: expected at least one list of tensors, got none")
    first = gradients[0]
    shapes = [t.shape for t in first]
    dtypes = [t.dtype for t in first]
    devices = {t.device for g in gradients for t in g}
    if len(devices) > 1:
        raise ValueError(f"gradients: tensors lie on several devices: {', '.join(sorted(map(str, devices)))}")
    for k, g in enumerate(gradients):
        if len(g) != len(shapes):
            raise ValueError(f"gradients[{k}]: expected {len(shapes)} tensors as in gradients[0], got {len(g)}")
        if [t.shape for t in g] != shapes:
            p = next(p for p, t in enumerate(g) if t.shape != shapes[p])
            raise ValueError(f"gradients[{k}][{p}]: expected shape {tuple(shapes[p])}, got {tuple(g[p].shape)}")
        if [t.dtype for t in g] != dtypes:
            p = next(p for p, t in enumerate(g) if t.dtype != dtypes[p])
            raise ValueError(f"gradients[{k}][{p}]: expected {dtypes[p]} as in gradients[0], got {g[p].dtype}")
    for p, dtype in enumerate(dtypes):
        if dtype not in FLOATS:
            raise ValueError(f"gradients[0][{p}]: expected a float tensor (64, 32 or 16 bit), got {dtype}")
    for p in range(len(shapes)):
        if any(g[p].layout is not torch.strided for g in gradients):
            raise ValueError(f"gradients[.][{p}]: expected dense (strided) tensors")
    return GradLayout(len(gradients), tuple(shapes), tuple(dtypes), devices.pop() if devices else torch.device("cpu"))


def check_weights(weights: Tensor | None, tasks: int, device: torch.device) -> Tensor:
    """Return (K,) float64 weights of sum 1 on ``device``.

    Signs are checked only where that needs no synchronisation, that is, for weights that lie on the CPU.
    """
    if weights is None:
        return torch.full((tasks,), 1.0 / tasks, dtype=torch.float64, device=device)
    if weights.shape != (tasks,):
        raise ValueError(f"weights: expected shape ({tasks},), got {tuple(weights.shape)}")
    if not torch.compiler.is_compiling():
        refuse_composed({type(weights)})
    u = weights.detach().to(torch.float64)
    if u.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_weighting(u):
        raise ValueError(f"weights: expected finite numbers >= 0 with a positive sum, got {u.tolist()}")
    u = moved(u, device)
    return u / u.sum()


def _is_weighting(u: Tensor) -> bool:
    return bool((u >= 0).all()) and bool(torch.isfinite(u).all()) and bool(u.sum() > 0)


def memory_order(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """One-dimensional views of ``tensors`` in a common order of columns, or None where only a copy would do.

    Tensors of the same strides without holes (channels_last, a transposed weight) are walked in memory order:
    a Gram and a combination do not depend on the order of the columns, only on its being the same for all.
    """
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    strides = tensors[0].stride()
    if any(t.stride() != strides for t in tensors) or not _dense(tensors[0]):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def _dense(t: Tensor) -> bool:
    """Whether the elements of ``t`` fill one stretch of memory without holes or overlaps."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat_range(t: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of ``t`` in row-major order; copies no more than a few times what it returns."""
    if t.is_contiguous():
        return t.view(-1)[start:stop]
    if t.ndim == 1:
        return t[start:stop]
    inner = t[0].numel()
    first, last = start // inner, -(-stop // inner)
    if last - first == 1:
        return flat_range(t[first], start - first * inner, stop - first * inner)
    parts = [flat_range(t[first], start - first * inner, inner)]
    if last - first > 2:
        parts.append(t[first + 1 : last - 1].reshape(-1))
    parts.append(flat_range(t[last - 1], 0, stop - (last - 1) * inner))
    return torch.cat(parts)


class ColumnRange(NamedTuple):
    """Columns ``start`` to ``stop`` of tensor ``tensor``."""

    tensor: int
    start: int
    stop: int


@functools.lru_cache(maxsize=64)
def column_blocks(numels: tuple[int, ...], size: int) -> tuple[tuple[ColumnRange, ...], ...]:
    """Cut tensors of these sizes into blocks of at most ``size`` columns, small tensors sharing a block."""
    blocks: list[tuple[ColumnRange, ...]] = []
    block: list[ColumnRange] = []
    room = size
    for p, n in enumerate(numels):
        start = 0
        while start < n:
            stop = min(n, start + room)
            block.append(ColumnRange(p, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                blocks.append(tuple(block))
                block, room = [], size
    if block:
        blocks.append(tuple(block))
    return tuple(blocks)


def transposed(gradients: Gradients) -> list[list[Tensor]]:
    """The tensors by parameter, then task; flat views where they exist (see ``memory_order``)."""
    by_parameter = [list(ts) for ts in zip(*gradients, strict=True)]
    return [memory_order(ts) or ts for ts in by_parameter]


def flatten(gradients: Gradients) -> list[Tensor]:
    """All tensors in one list, task by task: the form that ``torch.library`` operations take."""
    return list(itertools.chain.from_iterable(gradients))


def stored(gradients: Gradients, tensors: Sequence[Tensor]) -> Gradients:
    """The gradients, of which ``tensors`` are all, as their memory reads: copied where one is a view that negates it.

    ``z.conj().imag`` is one. Conjugation is the only other thing that a view does to numbers, and not to floats.
    """
    if any(map(Tensor.is_neg, tensors)):
        return [[t.resolve_neg() for t in g] for g in gradients]
    return gradients


def unflatten(tensors: Sequence[Tensor], tasks: int) -> list[list[Tensor]]:
    """Inverse of ``flatten``."""
    count = len(tensors) // tasks
    return [list(tensors[k * count : (k + 1) * count]) for k in range(tasks)]


def exact_product_type(device: torch.device) -> torch.dtype:
    """float32 where its matrix product is a float32 product; users may have allowed tf32 or bf16 in its stead."""
    backends = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return torch.float32 if backends.matmul.fp32_precision in ("ieee", "none") else torch.float64
