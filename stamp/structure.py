"""What gradients come as: tensors, sequences of tensors, state dicts or modules, read in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

GradientLike: TypeAlias = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None] | nn.Module

# The buffers of torch's normalisation layers that follow the data by running means, not by gradients.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class Inputs:
    """K gradients taken apart: what is matched, what is averaged, and how one of them is put together."""

    names: tuple[str, ...]  # P entries that are matched
    tensors: tuple[tuple[Tensor, ...], ...]  # K x P, detached views of what was given
    averaged: Mapping[str, tuple[Tensor, ...]]  # name -> K tensors
    kind: str  # "tensor", "sequence", "mapping" or "module"
    order: tuple[str, ...]  # all entries of one gradient as given, those absent from every task included
    labels: tuple[str, ...]  # what each gradient is called in messages
    argument: str  # what all of them are called

    def with_first_last(self) -> Inputs:
        """The same with the first gradient moved to the end."""
        averaged = {name: (*column[1:], column[0]) for name, column in self.averaged.items()}
        tensors, labels = ((*rows[1:], rows[0]) for rows in (self.tensors, self.labels))
        return replace(self, tensors=tensors, labels=labels, averaged=averaged)

    def without_last(self) -> Inputs:
        """The same without the last gradient."""
        averaged = {name: column[:-1] for name, column in self.averaged.items()}
        return replace(self, tensors=self.tensors[:-1], labels=self.labels[:-1], averaged=averaged)

    def assemble(self, direction: Sequence[Tensor], averages: Mapping[str, Tensor]) -> Any:
        """One object of the structure of the inputs; a sequence comes back as a list, a module as a dict."""
        if self.kind == "tensor":
            return direction[0]
        entries = dict(zip(self.names, direction, strict=True)) | dict(averages)
        if self.kind == "sequence":
            return [entries.get(name) for name in self.order]
        return {name: entries[name] for name in self.order if name in entries}


def read_gradients(gradients: Sequence[Mapping[str, Tensor | None]], labels: Sequence[str]) -> Inputs:
    """``read`` for mappings from parameter to gradient: every entry is matched, whatever its name."""
    called = tuple(labels)
    matched, _ = _split([dict(g) for g in gradients], "module", called)
    rows = tuple(zip(*(column for _, column in matched), strict=True))
    return Inputs(tuple(name for name, _ in matched), rows, {}, "module", tuple(gradients[0]), called, "gradients")


def read(gradients: Iterable[GradientLike], labels: Sequence[str] | None = None, argument: str = "gradients") -> Inputs:
    """Take K gradients of one structure apart without copying. Messages call them by ``labels``, default "task k".

    Raises:
        ValueError: none given, structures, names, shapes, dtypes or devices that differ, nothing to match; the
            message names the task and the entry.
    """
    if isinstance(gradients, Tensor | nn.Module | Mapping):
        raise ValueError(f"{argument}: expected a sequence with one entry per task, got one {type(gradients).__name__}")
    given = list(gradients)
    if not given:
        raise ValueError(f"{argument}: none given; at least one is needed")
    called = tuple(labels) if labels is not None else tuple(f"task {k}" for k in range(len(given)))
    try:
        entries, kind = _same_structure(given, called)
        matched, averaged = _split(entries, kind, called)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
    names = tuple(name for name, _ in matched)
    rows = tuple(zip(*(column for _, column in matched), strict=True))
    return Inputs(names, rows, averaged, kind, tuple(entries[0]), called, argument)


def _same_structure(given: list[Any], labels: tuple[str, ...]) -> tuple[list[dict[str, Tensor | None]], str]:
    """Every gradient as name -> tensor, all with the same names, and their kind."""
    kinds = [_kind(gradient, label) for gradient, label in zip(given, labels, strict=True)]
    for kind, label in zip(kinds, labels, strict=True):
        if kind != kinds[0]:
            raise ValueError(f"{labels[0]} is a {kinds[0]}, {label} a {kind}")
    entries = [_entries(gradient) for gradient in given]
    for other, label in zip(entries, labels, strict=True):
        if missing := [name for name in entries[0] if name not in other]:
            raise ValueError(f"{label} lacks {missing[0]!r}, which {labels[0]} has")
        if extra := [name for name in other if name not in entries[0]]:
            raise ValueError(f"{label} has {extra[0]!r}, which {labels[0]} lacks")
    return entries, kinds[0]


Column: TypeAlias = tuple[Tensor, ...]


def _split(
    entries: list[dict[str, Tensor | None]], kind: str, labels: tuple[str, ...]
) -> tuple[list[tuple[str, Column]], dict[str, Column]]:
    """The entries that are matched, in order, and those that are averaged."""
    matched, averaged = [], {}
    for name in entries[0]:
        column = _column(name, [e[name] for e in entries], labels)
        if column is None:
            continue
        if _is_averaged(name, column[0], kind):
            if absent := [label for label, e in zip(labels, entries, strict=True) if e[name] is None]:
                raise ValueError(f"{absent[0]}, {name!r} is None; expected a tensor, as it is averaged")
            averaged[name] = column
        else:
            matched.append((name, column))
    if not matched:
        raise ValueError(f"{labels[0]} has no tensor to match")
    return matched, averaged


def _kind(gradient: object, label: str) -> str:
    for kind, types in (("tensor", Tensor), ("module", nn.Module), ("mapping", Mapping), ("sequence", list | tuple)):
        if isinstance(gradient, types):
            return kind
    got = type(gradient).__name__
    raise ValueError(f"{label} is a {got}; expected a tensor, a list of tensors, a state dict or a module")


def _entries(gradient: Any) -> dict[str, Tensor | None]:
    """Name -> tensor, or None where there is no gradient. A module gives the gradients of its trainable parameters."""
    if isinstance(gradient, Tensor):
        return {"": gradient}
    if isinstance(gradient, nn.Module):
        return {name: p.grad for name, p in gradient.named_parameters() if p.requires_grad}
    if isinstance(gradient, Mapping):
        return dict(gradient)
    return {f"[{p}]": t for p, t in enumerate(gradient)}


def _column(name: str, tensors: list[Tensor | None], labels: tuple[str, ...]) -> Column | None:
    """One entry of every task; None counts as zero, and an entry that is None everywhere is left out."""
    first = next((t for t in tensors if t is not None), None)
    if first is None:
        return None
    for label, t in zip(labels, tensors, strict=True):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise ValueError(f"{label}, {name!r} is a {type(t).__name__}; expected a tensor")
        if hasattr(t, "__tensor_flatten__"):  # made of other tensors
            raise ValueError(
                f"{label}, {name!r} is a {type(t).__name__}; expected a plain tensor (of a DTensor, its full_tensor())"
            )
        if t.layout is not torch.strided or t.is_complex():
            raise ValueError(f"{label}, {name!r} is {t.dtype}, {t.layout}; expected real and dense")
        for what in ("shape", "dtype", "device"):
            if (got := getattr(t, what)) != (expected := getattr(first, what)):
                got, expected = (tuple(x) if what == "shape" else x for x in (got, expected))
                raise ValueError(f"{label}, {name!r} has {what} {got}; expected {expected} as in the others")
    return tuple(torch.zeros_like(first) if t is None else t.detach() for t in tensors)


def _is_averaged(name: str, tensor: Tensor, kind: str) -> bool:
    if kind != "mapping":  # a module's gradients are of parameters, whatever their names
        if not tensor.is_floating_point():
            raise ValueError(f"{name or 'the tensor'} is {tensor.dtype}; a gradient is floating point")
        return False
    return not tensor.is_floating_point() or name.rpartition(".")[2] in STATISTICS


def average(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The mean under ``weights`` (K,), summed in float64; integers are rounded, bools follow the majority.

    Integers are summed as distances from the smallest: equal ones stay as they are, whatever their size.
    """
    dtype = tensors[0].dtype
    if not dtype.is_floating_point and dtype != torch.bool:
        return _average_of_integers(tensors, weights)
    total = _weighted((t.to(torch.float64) for t in tensors), weights)
    return total > 0.5 if dtype == torch.bool else total.to(dtype)


def _weighted(terms: Iterable[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of float64 tensors."""
    total: Tensor | None = None
    for term, weight in zip(terms, weights, strict=True):
        total = torch.zeros_like(term) if total is None else total
        total.addcmul_(term, weight.to(term.device))
    assert total is not None
    return total


def _average_of_integers(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    dtype = tensors[0].dtype
    sign = -(2**63) if dtype == torch.uint64 else 0  # has unsigned numbers in the order of signed ones

    def signed(t: Tensor) -> Tensor:
        return t.to(torch.int64) ^ sign

    low = high = signed(tensors[0])
    for t in tensors[1:]:
        low, high = torch.minimum(low, signed(t)), torch.maximum(high, signed(t))
    low = low & ~1  # even, as halves are rounded to even numbers
    total = _weighted((_unsigned(signed(t) - low) for t in tensors), weights).round()
    mean = low + torch.where(total >= 2.0**63, total - 2.0**64, total).to(torch.int64)
    return (torch.where(total >= _unsigned(high - low), high, mean) ^ sign).to(dtype)


def _unsigned(distance: Tensor) -> Tensor:
    """The float64 value of a distance in int64 that has turned negative where it is 2^63 or more."""
    return distance.to(torch.float64) + (distance < 0) * 2.0**64


def wrapping_sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum of integers in their own type, modulo its size; torch has no sum for some of the unsigned ones."""
    return (a.to(torch.int64) + b.to(torch.int64)).to(a.dtype)


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of all tensors are finite. One read, nothing of their size is made; waits for a GPU."""
    tops = [torch.linalg.vector_norm(t, torch.inf) for t in tensors if t.numel() and t.is_floating_point()]
    return bool(torch.stack([top.isfinite() for top in tops]).all()) if tops else True


def not_finite(inputs: Inputs) -> str:
    """Say which entry of which task is not finite, or that inner products overflow. Reads the data once."""
    for k, (label, row) in enumerate(zip(inputs.labels, inputs.tensors, strict=True)):
        averaged = [(name, column[k]) for name, column in inputs.averaged.items()]
        for name, tensor in [*zip(inputs.names, row, strict=True), *averaged]:
            if not bool(tensor.isfinite().all()):
                what = "NaN" if bool(tensor.isnan().any()) else "infinite"
                where = f", {name!r}" if name else ""
                return f"{inputs.argument}: {label}{where} is not finite (it has {what} entries)"
    tops = [max((float(t.abs().max()) for t in row if t.numel()), default=0.0) for row in inputs.tensors]
    label = inputs.labels[tops.index(max(tops))]
    return f"{inputs.argument}: finite, but their inner products overflow ({label} reaches {max(tops):.3g})"


def unfit(inputs: Inputs, results: Mapping[str, Tensor], what: str) -> str:
    """Say why results are not finite though what was matched is: averages of what is not, or sums beyond the dtype."""
    if not finite(t for column in inputs.averaged.values() for t in column):
        return not_finite(inputs)
    name, tensor = next((name, t) for name, t in results.items() if not finite([t]))
    where = f", {name!r}" if name else ""
    limit = torch.finfo(tensor.dtype).max
    return f"{inputs.argument}: {what}{where} exceeds {limit:.5g}, the largest number of {tensor.dtype}"
