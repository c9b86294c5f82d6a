"""Modules batched by their members' ranks and dtype, with the Gram matrices of all in one read of the factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fedgram import kernels

from .finite import check_finite, check_traces
from .group import Average, Group, forms_grams
from .members import Members, Side
from .target import Target

HOST_RANK = 512
"""Up to this total rank the Grams of a GPU's factors come to the host: on the device their solvers are thousands of
launches of a few microseconds' work each. 48 modules of rank 80, ``als`` and all rho: 530 ms on an H100, 37 in all with
the host's; the copy is 0.3."""


def make_groups(
    targets: Sequence[Target], backend: str = "auto", *, averaged: bool = False, measured: bool = False
) -> list[tuple[Group, list[int]]]:
    """Batch the modules by member ranks and dtype, take their Grams in one launch; with each group its modules' places.

    Args:
        targets: the modules.
        backend: of the operation on the factors.
        averaged: also average the factors, in the same read where the backend can; only where Grams are formed.
        measured: take the products with the averages too.

    Raises:
        ValueError: a factor holds NaN or Inf (names the module, the client and the factor).
    """
    order: dict[tuple[tuple[int, ...], torch.dtype], list[int]] = {}
    for i, target in enumerate(targets):
        order.setdefault((target.ranks, target.dtype), []).append(i)
    parts = [_members(tuple([targets[i] for i in ids])) for ids in order.values()]
    factors = [kernels.described([t.B for t in part.targets], [t.A for t in part.targets]) for part in parts]
    formed = [at for at, part in enumerate(parts) if _forms_grams(part.targets)]
    for target in (t for at, part in enumerate(parts) if at not in formed for t in part.targets):
        check_finite(target)
    own = [parts[at] for at in formed], [factors[at] for at in formed]
    read = _averaged(*own, backend, measured) if averaged else _grams(*own, backend)
    found = dict(zip(formed, read, strict=True))
    groups = []
    for at, (part, of) in enumerate(zip(parts, factors, strict=True)):
        gram, average = found.get(at, (None, None))
        groups.append(Group(part, of, gram, backend, average))
    return list(zip(groups, order.values(), strict=True))


def _members(targets: tuple[Target, ...]) -> Members:
    """The members of modules of equal ranks and dtype; small ones are solved on the host, others by their Grams."""
    device = targets[0].device
    on_host = _forms_grams(targets) and sum(targets[0].ranks) <= HOST_RANK
    return Members(targets, torch.device("cpu") if on_host and device.type == "cuda" else device)


def _forms_grams(targets: Sequence[Target]) -> bool:
    return forms_grams(sum(targets[0].ranks), max(t.B[0].shape[0] + t.A[0].shape[1] for t in targets))


Read: TypeAlias = tuple[dict[Side, Tensor], Average | None]


def _grams(parts: Sequence[Members], factors: Sequence[kernels.Described], backend: str) -> list[Read]:
    """G_B and G_A (L, R, R) of the scaled factors of every part, in one launch."""
    if not parts:
        return []
    joined = kernels.Described.joined(factors)
    G_B, G_A = kernels.factor_gram(joined.B, joined.A, precise=True, backend=backend)
    return [(_checked(part, _held(part, G_B[own]), _held(part, G_A[own])), None) for part, own in _slices(parts)]


def _averaged(
    parts: Sequence[Members], factors: Sequence[kernels.Described], backend: str, measured: bool
) -> list[Read]:
    """The same, and the averages, with their products where they are to be ``measured``."""
    if not parts:
        return []
    joined = kernels.Described.joined(factors)
    P, Q = ([x for part in parts for x in part.average(side)] for side in ("B", "A"))
    (B, A), (G_B, G_A) = kernels.gram_combine(joined.B, joined.A, P, Q, beside=measured, precise=True, backend=backend)
    found: list[Read] = []
    for part, own in _slices(parts):
        R, X_B, X_A = part.total_rank, _held(part, G_B[own]), _held(part, G_A[own])
        products = (X_B[:, :, R:], X_A[:, :, R:]) if measured else None
        gram = _checked(part, X_B[:, :R, :R].contiguous(), X_A[:, :R, :R].contiguous())
        found.append((gram, Average((B[own], A[own]), products)))
    return found


def _slices(parts: Sequence[Members]) -> Iterator[tuple[Members, slice]]:
    """The parts, and where the modules of each lie among all."""
    start = 0
    for part in parts:
        yield part, slice(start, start := start + len(part.targets))


def _held(members: Members, matrices: list[Tensor]) -> Tensor:
    """Matrices of one shape as one tensor, where they are solved."""
    return stacked(matrices).to(members.device)


def _checked(members: Members, B: Tensor, A: Tensor) -> dict[Side, Tensor]:
    """The Grams with the scalings, from those without: finite, and so small that their products are."""
    gram = _scaled(members, {"B": B, "A": A})
    check_traces(members.targets, gram["B"], gram["A"])
    return gram


def _scaled(members: Members, gram: dict[Side, Tensor]) -> dict[Side, Tensor]:
    """The Grams of the factors with their scalings, in the memory of those without."""
    if members.unscaled:
        return gram
    return {side: g.mul_(members.row_scale[side]).mul_(members.row_scale[side].mT) for side, g in gram.items()}


def stacked(matrices: list[Tensor]) -> Tensor:
    """(L, ...) of matrices of one shape; no copy where they lie one behind the other, as the loops leave them."""
    first, step = matrices[0], matrices[0].nbytes
    storage, begin = first.untyped_storage(), first.data_ptr()
    end = begin + step * len(matrices)
    behind = [m.data_ptr() for m in matrices] == list(range(begin, end, step)) if step else False
    if not behind or end > storage.data_ptr() + storage.nbytes() or not all(m.is_contiguous() for m in matrices):
        return torch.stack(matrices)
    size, stride = (len(matrices), *first.shape), (first.numel(), *first.stride())
    return first.as_strided(size, stride, first.storage_offset())
