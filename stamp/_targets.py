"""Where a matched direction is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .structure import Inputs

NAMED = ("mapping", "module")
Target: TypeAlias = nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor]


def targets_of(into: Target, inputs: Inputs) -> dict[str, Tensor]:
    """Name -> tensor to write, checked against the gradients before anything is computed.

    Raises:
        ValueError: an entry is missing, no tensor, of another shape, device or kind, or the same tensor as another.
    """
    found: dict[str, Tensor]
    if isinstance(into, nn.Module):
        found = {name: p for name, p in into.named_parameters() if p.requires_grad}
    elif isinstance(into, Mapping):
        found = dict(into)
    elif isinstance(into, Tensor):
        found = {"": into}
    else:
        found = {f"[{p}]": t for p, t in enumerate(into)}
    if len(found) == len(inputs.order) and inputs.kind not in NAMED:  # positions, whatever the names
        found = dict(zip(inputs.order, found.values(), strict=True))
    elif inputs.kind in NAMED and not isinstance(into, nn.Module | Mapping):
        raise ValueError("into: the gradients have names; expected a module or a mapping from name to tensor")
    elif inputs.kind not in NAMED:
        raise ValueError(f"into: expected {len(inputs.order)} tensors, one per entry of a gradient, got {len(found)}")
    names: dict[int, str] = {}
    for name, row in [*zip(inputs.names, zip(*inputs.tensors, strict=True), strict=True), *inputs.averaged.items()]:
        if name not in found:
            raise ValueError(f"into: lacks {name!r}")
        _check(name, found[name], row[0])
        if names.setdefault(id(found[name]), name) != name:
            raise ValueError(f"into: {name!r} is the same tensor as {names[id(found[name])]!r}")
    return found


def check_fits(targets: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    """Refuse averages that the dtypes of their targets cannot hold.

    Raises:
        ValueError: a floating-point one would become infinite there, an integer another number.
    """
    for name, value in averages.items():
        held = value.to(targets[name].dtype)
        fits = held.isfinite() if held.is_floating_point() else held.to(value.dtype) == value
        if not bool(fits.all()):
            raise ValueError(f"into: {name!r} is {held.dtype}, whose range its weighted mean exceeds")


def written(target: Tensor) -> Tensor:
    """The tensor itself, or the ``.grad`` of one that requires it: a new one, still to be attached, if it has none."""
    if not target.requires_grad:
        return target
    return torch.empty_like(target) if target.grad is None else target.grad


def attach(targets: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> None:
    """Give parameters without a ``.grad`` the one that was written for them."""
    for name, grad in direction.items():
        if targets[name].requires_grad:
            targets[name].grad = grad


def _check(name: str, target: Tensor, gradient: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise ValueError(f"into: {name!r} is a {type(target).__name__}; expected a tensor")
    if target.shape != gradient.shape or target.device != gradient.device:
        got, expected = (f"{tuple(t.shape)} on {t.device}" for t in (target, gradient))
        raise ValueError(f"into: {name!r} is {got}; the gradients are {expected}")
    if gradient.is_floating_point() and not target.is_floating_point():
        raise ValueError(f"into: {name!r} is {target.dtype}; expected floating point, as the gradients are")
