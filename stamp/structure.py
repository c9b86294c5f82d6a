"""What gradients come as: tensors, sequences of tensors, state dicts or modules, read in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

GradientLike: TypeAlias = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor] | nn.Module

# The buffers of torch's normalisation layers that follow the data by running means, not by gradients.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class Inputs:
    """K gradients taken apart: what is matched, what is averaged, and how one of them is put together."""

    names: tuple[str, ...]  # P entries that are matched
    tensors: tuple[tuple[Tensor, ...], ...]  # K x P, detached views of what was given
    averaged: Mapping[str, tuple[Tensor, ...]]  # name -> K tensors
    kind: str  # "tensor", "sequence" or "mapping"
    order: tuple[str, ...]  # all entries of one gradient as given, those absent from every task included
    who: str  # what a gradient belongs to, for messages

    def assemble(self, direction: Sequence[Tensor], averages: Mapping[str, Tensor]) -> Any:
        """One object of the structure of the inputs; a sequence comes back as a list, a module as a dict."""
        if self.kind == "tensor":
            return direction[0]
        entries = dict(zip(self.names, direction, strict=True)) | dict(averages)
        if self.kind == "sequence":
            return [entries.get(name) for name in self.order]
        return {name: entries[name] for name in self.order if name in entries}


def read(gradients: Iterable[GradientLike], who: str = "task") -> Inputs:
    """Take K gradients of one structure apart without copying.

    Raises:
        ValueError: none given, structures, names, shapes, dtypes or devices that differ, nothing to match; the
            message names the task and the entry.
    """
    if isinstance(gradients, Tensor | nn.Module | Mapping):
        raise ValueError(f"gradients: expected a sequence with one entry per {who}, got one {type(gradients).__name__}")
    given = list(gradients)
    if not given:
        raise ValueError("gradients: none given; at least one is needed")
    kinds = [_kind(gradient, k, who) for k, gradient in enumerate(given)]
    if len(set(kinds)) > 1:
        k = next(k for k, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(f"gradients: {who} 0 is a {kinds[0]}, {who} {k} a {kinds[k]}")
    entries = [_entries(gradient) for gradient in given]
    order = tuple(entries[0])
    for k, other in enumerate(entries):
        _check_names(order, other, k, who)
    matched, averaged = [], {}
    for name in order:
        column = _column(name, [e[name] for e in entries], who)
        if column is None:
            continue
        if _is_averaged(name, column[0], kinds[0]):
            averaged[name] = column
        else:
            matched.append((name, column))
    if not matched:
        raise ValueError(f"gradients: {who} 0 has no tensor to match")
    names = tuple(name for name, _ in matched)
    rows = tuple(zip(*(column for _, column in matched), strict=True))
    kind = "mapping" if kinds[0] == "module" else kinds[0]
    return Inputs(names, rows, averaged, kind, order, who)


def _kind(gradient: object, k: int, who: str) -> str:
    for kind, types in (("tensor", Tensor), ("module", nn.Module), ("mapping", Mapping), ("sequence", list | tuple)):
        if isinstance(gradient, types):
            return kind
    raise ValueError(
        f"gradients: {who} {k} is a {type(gradient).__name__}; expected a tensor, a list of tensors, a state dict or a "
        "module"
    )


def _entries(gradient: Any) -> dict[str, Tensor | None]:
    """Name -> tensor, or None where there is no gradient. A module gives the gradients of its trainable parameters."""
    if isinstance(gradient, Tensor):
        return {"": gradient}
    if isinstance(gradient, nn.Module):
        return {name: p.grad for name, p in gradient.named_parameters() if p.requires_grad}
    if isinstance(gradient, Mapping):
        return dict(gradient)
    return {f"[{p}]": t for p, t in enumerate(gradient)}


def _check_names(expected: tuple[str, ...], entries: Mapping[str, object], k: int, who: str) -> None:
    missing = [name for name in expected if name not in entries]
    extra = [name for name in entries if name not in set(expected)]
    if missing:
        raise ValueError(f"gradients: {who} {k} lacks {missing[0]!r}, which {who} 0 has")
    if extra:
        raise ValueError(f"gradients: {who} {k} has {extra[0]!r}, which {who} 0 lacks")


def _column(name: str, tensors: list[Tensor | None], who: str) -> tuple[Tensor, ...] | None:
    """One entry of every task; None counts as zero, and an entry that is None everywhere is left out."""
    first = next((t for t in tensors if t is not None), None)
    if first is None:
        return None
    for k, t in enumerate(tensors):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise ValueError(f"gradients: {who} {k}, {name!r} is a {type(t).__name__}; expected a tensor")
        if t.layout is not torch.strided or t.is_complex():
            raise ValueError(f"gradients: {who} {k}, {name!r} is {t.dtype}, {t.layout}; expected real and dense")
        for what in ("shape", "dtype", "device"):
            if (got := getattr(t, what)) != (expected := getattr(first, what)):
                got, expected = (tuple(x) if what == "shape" else x for x in (got, expected))
                raise ValueError(f"gradients: {who} {k}, {name!r} has {what} {got}; others have {expected}")
    return tuple(torch.zeros_like(first) if t is None else t.detach() for t in tensors)


def _is_averaged(name: str, tensor: Tensor, kind: str) -> bool:
    if kind != "mapping":
        if not tensor.is_floating_point():
            raise ValueError(f"gradients: {name!r} is {tensor.dtype}; a gradient is floating point")
        return False
    return not tensor.is_floating_point() or name.rpartition(".")[2] in STATISTICS


def average(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The mean under ``weights`` (K,), summed in float64; rounded to the nearest for integers, the majority for bool."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64, device=tensors[0].device)
    for tensor, weight in zip(tensors, weights.to(total.device), strict=True):
        total.addcmul_(tensor.to(torch.float64), weight)
    if tensors[0].dtype == torch.bool:
        return total > 0.5
    return (total if tensors[0].is_floating_point() else total.round()).to(tensors[0].dtype)


def not_finite(inputs: Inputs) -> str:
    """Say which entry of which task is not finite, or that inner products overflow. Reads the data once."""
    for k, row in enumerate(inputs.tensors):
        for name, tensor in zip(inputs.names, row, strict=True):
            if not bool(tensor.isfinite().all()):
                what = "NaN" if bool(tensor.isnan().any()) else "infinite"
                where = f", {name!r}" if name else ""
                return f"gradients: {inputs.who} {k}{where} is not finite (it has {what} entries)"
    top, k = max((max(float(t.abs().max()) for t in row if t.numel()), k) for k, row in enumerate(inputs.tensors))
    return f"gradients: finite, but their inner products overflow ({inputs.who} {k} reaches {top:.3g})"
