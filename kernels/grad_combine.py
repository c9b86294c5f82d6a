"""One weighted sum of K gradients, each a list of tensors, written where the caller wants it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native_gradients
from ._dispatch import refuse_composed, resolve
from ._floats import FLOATS
from ._grad_inputs import (
    Gradients,
    GradLayout,
    check_gradients,
    flat_range,
    flatten,
    memory_order,
    stored,
    unflatten,
)
from ._memory import overlaps_itself, span, storages
from ._plan import launching_on, moved

# Columns summed at a time: the accumulator and one converted gradient stay in the cache.
BLOCK_COLUMNS = 1 << 18


def grad_combine(
    gradients: Gradients, coefficients: Tensor, *, out: Sequence[Tensor] | None = None, backend: str = "auto"
) -> list[Tensor]:
    """Return ``d = sum_k v_k g_k``, tensor by tensor, in one read of the gradients.

    The sum is wide (float64 for float64 and float32 gradients, float32 for 16-bit ones) and rounded once.

    Args:
        gradients: K sequences of P tensors, the same shapes and types for every task (float64, float32, bfloat16 or
            float16; types may differ between parameters).
        coefficients: (K,) v of any float type, on any device; on the gradients' device they are not synchronised.
        out: P tensors to write to (the parameters' ``.grad``), of the gradients' shapes, of any float type and
            strides. ``out[p]`` may be one of the ``gradients[k][p]`` itself; it may overlap no other gradient and no
            other output.
        backend: "auto", "triton", "native" or "torch".

    Returns:
        ``out``, or P new tensors of the gradients' types, as a list.

    Raises:
        ValueError: gradients, coefficients or outputs that do not fit together, or outputs that overlap, or
            that are views which negate their memory.
        RuntimeError: ``backend="triton"`` or ``"native"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        v = _checked(check_gradients(gradients), coefficients, out)
        if out is None:
            return _grad_combine_op(flatten(gradients), v, backend)
        _grad_combine_out_op(flatten(gradients), v, list(out), backend)
        return list(out)
    tensors = flatten(gradients)
    gradients = stored(gradients, tensors)
    chosen = resolve(backend, tensors, native=True)
    if tensors and chosen == "triton":
        from ._grad_combine_launch import combine_triton

        with launching_on(tensors[0].device):
            return combine_triton(gradients, coefficients, out)
    v = _checked(check_gradients(gradients), coefficients, out)
    targets = outputs(gradients, out)
    (_combine_native if chosen == "native" else _combine_torch)(gradients, v, targets)
    return targets


def outputs(gradients: Gradients, out: Sequence[Tensor] | None) -> list[Tensor]:
    """``out``, once it is known to overlap nothing, or new tensors."""
    if out is None:
        return [torch.empty_like(t) for t in gradients[0]]
    _check_overlaps(gradients, out)
    return list(out)


def _checked(layout: GradLayout, coefficients: Tensor, out: Sequence[Tensor] | None) -> Tensor:
    if out is not None:
        check_out(out, layout.shapes, layout.device)
    return check_coefficients(coefficients, layout.tasks, layout.device)


@torch.library.custom_op("fedgram::grad_combine", mutates_args=())
def _grad_combine_op(gradients: Sequence[Tensor], coefficients: Tensor, backend: str) -> list[Tensor]:
    return grad_combine(unflatten(gradients, coefficients.shape[0]), coefficients, backend=backend)


@_grad_combine_op.register_fake
def _(gradients: Sequence[Tensor], coefficients: Tensor, backend: str) -> list[Tensor]:
    return [torch.empty_like(t) for t in unflatten(gradients, coefficients.shape[0])[0]]


@torch.library.custom_op("fedgram::grad_combine_out", mutates_args=("out",))
def _grad_combine_out_op(
    gradients: Sequence[Tensor], coefficients: Tensor, out: Sequence[Tensor], backend: str
) -> None:
    grad_combine(unflatten(gradients, coefficients.shape[0]), coefficients, out=out, backend=backend)


@_grad_combine_out_op.register_fake
def _(gradients: Sequence[Tensor], coefficients: Tensor, out: Sequence[Tensor], backend: str) -> None:
    return None


@torch.no_grad()
def _combine_native(gradients: Gradients, v: Tensor, out: Sequence[Tensor]) -> None:
    """The compiled loops on what lies flat in memory, the torch twin on the rest."""
    flat: dict[torch.dtype, list[list[Tensor]]] = {}
    rest = []
    for p, target in enumerate(out):
        tensors = [*(g[p] for g in gradients), target]
        columns = memory_order(tensors)
        if columns is None:
            rest.append(p)
        elif target.numel():
            flat.setdefault(_wide_type(tensors[0]), []).append(columns)
    for wide, parameters in flat.items():
        results = [columns[-1] for columns in parameters]
        _native_gradients.grad_combine([columns[:-1] for columns in parameters], v, results, wide == torch.float64)
        torch.autograd.graph.increment_version(results)  # as every write of torch does: autograd must see it
    if rest:
        _combine_torch([[g[p] for p in rest] for g in gradients], v, [out[p] for p in rest])


@torch.no_grad()
def _combine_torch(gradients: Gradients, v: Tensor, out: Sequence[Tensor]) -> None:
    """The torch twin: block by block, every gradient's block added to one wide accumulator."""
    work = {
        wide: torch.empty((2, BLOCK_COLUMNS), dtype=wide, device=v.device) for wide in map(_wide_type, gradients[0])
    }
    for p, target in enumerate(out):
        tensors = [g[p] for g in gradients]
        wide = _wide_type(tensors[0])
        scale = v.to(wide)
        flat = memory_order([*tensors, target])
        *sources, result = flat if flat is not None else [*tensors, torch.empty_like(target).flatten()]
        for start in range(0, target.numel(), BLOCK_COLUMNS):
            stop = min(start + BLOCK_COLUMNS, target.numel())
            total, term = work[wide][:, : stop - start]
            total.zero_()
            for k, source in enumerate(sources):
                total.addcmul_(term.copy_(flat_range(source, start, stop)), scale[k])
            result[start:stop].copy_(total)
        if flat is None:
            target.copy_(result.view(target.shape))


def _wide_type(t: Tensor) -> torch.dtype:
    return torch.float64 if t.element_size() >= 4 else torch.float32


def check_coefficients(coefficients: Tensor, tasks: int, device: torch.device) -> Tensor:
    """The coefficients in float64 on ``device``, contiguous: kernels read them where they lie."""
    if coefficients.shape != (tasks,):
        raise ValueError(f"coefficients: expected shape ({tasks},), got {tuple(coefficients.shape)}")
    if not torch.compiler.is_compiling():
        refuse_composed({type(coefficients)})
    return moved(coefficients.detach().to(torch.float64).resolve_neg().contiguous(), device)


def check_out(out: Sequence[Tensor], shapes: Sequence[torch.Size], device: torch.device) -> None:
    """Raise ValueError where an output cannot take its parameter's sum."""
    if len(out) != len(shapes):
        raise ValueError(f"out: expected {len(shapes)} tensors, got {len(out)}")
    if not torch.compiler.is_compiling():
        refuse_composed(set(map(type, out)))
    for p, (t, shape) in enumerate(zip(out, shapes, strict=True)):
        if t.shape != shape:
            raise ValueError(f"out[{p}]: expected shape {tuple(shape)}, got {tuple(t.shape)}")
        if t.dtype not in FLOATS or t.device != device:
            raise ValueError(f"out[{p}]: expected a float tensor on {device}, got {t.dtype} on {t.device}")
        if not torch.compiler.is_compiling() and t.is_neg():
            raise ValueError(f"out[{p}]: a view that negates its memory; pass a tensor of its own")


def _check_overlaps(gradients: Gradients, out: Sequence[Tensor]) -> None:
    """Outputs may share memory with nothing but a gradient of the same parameter with the same elements."""
    for p, t in enumerate(out):
        if overlaps_itself(t):
            raise ValueError(f"out[{p}]: an expanded tensor, whose elements overlap in memory")
    own = set(storages(out))
    if len(own) == len(out) and all(own.isdisjoint(storages(g)) for g in gradients):
        return
    spans = [(*span(t), p, t, "out") for p, t in enumerate(out) if t.numel()]
    spans += [
        (*span(t), p, t, f"gradients[{k}]") for k, g in enumerate(gradients) for p, t in enumerate(g) if t.numel()
    ]
    spans.sort(key=lambda s: s[:2])
    live: list[tuple] = []
    for one in spans:
        start, _, p, t, name = one
        live = [other for other in live if other[1] > start]
        for _, _, q, s, other in live:
            if "out" in (name, other) and not (name != other and p == q and _same_elements(s, t)):
                raise ValueError(f"{name}[{p}] and {other}[{q}] overlap in memory")
        live.append(one)


def _same_elements(s: Tensor, t: Tensor) -> bool:
    return s.data_ptr() == t.data_ptr() and s.dtype == t.dtype and s.stride() == t.stride()
