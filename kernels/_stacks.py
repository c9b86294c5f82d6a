"""Modules' factors of one side, checked and described once for the compiled loops."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from itertools import accumulate, chain
from operator import attrgetter
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from ._factor_inputs import Factors, check_factors
from ._floats import FLOATS
from ._memory import check_memory
from .native_calls import TYPES

WIDTH = 5  # numbers of a row of the table, which are (struct member of native.c)
ADDRESS, RANK, TYPE, ALONG, ACROSS = range(WIDTH)
_SHAPE, _TYPE, _ON_CPU = attrgetter("shape"), attrgetter("dtype"), attrgetter("is_cpu")


class _Facts(NamedTuple):
    """What is known of the modules: lists with a number for each, see ``Stacks``."""

    counts: list[int]
    ranks: list[int]
    lengths: list[int]
    widest: list[int]
    dtypes: list[torch.dtype]
    mixable: list[bool]


class Stacks(Sequence[Sequence[Tensor]]):
    """Modules' factors of one side as stacks of tall factors (length, r_u), described for the loops.

    They are the factors too, ``stacks[l][u]``, so that they can be passed on in their place. What is described may not
    change meanwhile: shape, strides and memory of the tensors (their numbers may).

    Args:
        factors: ``factors[l][u]`` (length_l, r_lu), or (r_lu, length_l) where ``transposed``.
        transposed: whether they are the A side.

    Attributes:
        table: for every factor a row of its address, rank, type, and strides along and across its length, int64.
        at: addresses of the rows of ``table`` where each module begins.
        counts, ranks, lengths: of every module, its factors, their ranks together, and their length.
        widest, dtypes: of every module, the largest rank of a factor, and the type that all promote to.
        mixable: of every module, whether its factors have one rank and type and lie as a contiguous output does.
        on_cpu: whether all are on the CPU.

    Raises:
        ValueError: a factor is no float matrix, has another length than the first of its module, or has no memory.
    """

    def __init__(self, factors: Factors, *, transposed: bool) -> None:
        self.transposed = transposed
        self.factors = factors  # keeps the memory
        self._hold(_Facts([len(clients) for clients in factors], [], [], [], [], []))
        self.on_cpu = True
        self.table = array("q")
        checked = False
        for clients in factors:
            if not self._add_alike(clients):
                if not checked:
                    check_factors(*((None, factors) if transposed else (factors, None)))
                    checked = True
                self._add(clients)
        if self.table and not np.frombuffer(self.table, np.int64)[ADDRESS::WIDTH].all():
            self._check_memory()
        self._place()

    def _check_memory(self) -> None:
        """Raise ValueError where a factor has numbers and no memory."""
        side = "BA"[self.transposed]
        for l, clients in enumerate(self.factors):
            check_memory(clients, lambda u, l=l: f"{side}[{l}][{u}]")  # type: ignore[misc]

    def _add_alike(self, clients: Sequence[Tensor]) -> bool:
        """Describe a module's factors if they have one shape, layout and type; whether they have."""
        if isinstance(clients, Tensor) or not len(clients):
            return False
        first = clients[0]
        shape, steps, dtype, count = first.shape, first.stride(), first.dtype, len(clients)
        if len(shape) != 2 or dtype not in FLOATS or any(map(Tensor.is_neg, clients)):
            return False
        if count > 1:
            shapes, strides = list(map(_SHAPE, clients)), list(map(Tensor.stride, clients))
            if shapes.count(shape) < count or strides.count(steps) < count:
                return False
            if list(map(_TYPE, clients)).count(dtype) < count:
                return False
        rank, length = shape[not self.transposed], shape[self.transposed]
        kind = (rank, TYPES[dtype], steps[self.transposed], steps[not self.transposed])
        rows = array("q", (0, *kind)) * count
        rows[ADDRESS::WIDTH] = array("q", map(Tensor.data_ptr, clients))
        self.table += rows
        self.on_cpu = self.on_cpu and all(map(_ON_CPU, clients))
        self._note(rank * count, length, rank, dtype, mixable=self._is_dense(length, *kind))
        return True

    def _add(self, clients: Sequence[Tensor]) -> None:
        """Describe a module's factors one by one."""
        long, across = int(self.transposed), int(not self.transposed)
        rows = [(t.data_ptr(), t.shape[across], TYPES[t.dtype], t.stride(long), t.stride(across)) for t in clients]
        length, kinds = clients[0].shape[long], [row[1:] for row in rows]
        self.table.extend(chain.from_iterable(rows))
        mixable = kinds.count(kinds[0]) == len(kinds) and self._is_dense(length, *kinds[0])
        ranks, dtype = [kind[0] for kind in kinds], reduce(torch.promote_types, {t.dtype for t in clients})
        self.on_cpu = self.on_cpu and all(map(_ON_CPU, clients))
        self._note(sum(ranks), length, max(ranks), dtype, mixable=mixable)

    def _note(self, rank: int, length: int, widest: int, dtype: torch.dtype, *, mixable: bool) -> None:
        """One more module."""
        self.ranks.append(rank)
        self.lengths.append(length)
        self.widest.append(widest)
        self.dtypes.append(dtype)
        self.mixable.append(mixable)

    def _is_dense(self, length: int, rank: int, _: int, along: int, across: int) -> bool:
        if self.transposed:
            return along == 1 and (across == length or rank == 1)
        return across == 1 and (along == rank or length == 1)

    def _place(self) -> None:
        start = self.table.buffer_info()[0]
        self.at = [start + 8 * WIDTH * before for before in accumulate(self.counts, initial=0)]

    @cached_property
    def addresses(self) -> array:
        """Of all factors, module by module."""
        return self.table[ADDRESS::WIDTH]

    def rows(self, module: int) -> array:
        """The rows of the table of one module."""
        first = (self.at[module] - self.at[0]) // 8
        return self.table[first : first + WIDTH * self.counts[module]]

    @overload
    def __getitem__(self, index: int) -> Sequence[Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[Tensor]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[Tensor] | Sequence[Sequence[Tensor]]:
        return self.factors[index]

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.counts)

    def pick(self, modules: Sequence[int]) -> Stacks:
        """Some of the modules."""
        if list(modules) == list(range(len(self))):
            return self
        facts = _Facts._make([of[l] for l in modules] for of in self._facts())
        return self._derived([self.rows(l) for l in modules], [self.factors[l] for l in modules], facts)

    def joined(self, others: Sequence[Stacks]) -> Stacks:
        """The modules of this and of others, one after the other."""
        if not others:
            return self
        every = [self, *others]
        facts = _Facts._make(list(chain.from_iterable(of)) for of in zip(*(s._facts() for s in every), strict=True))
        return self._derived([s.table for s in every], list(chain.from_iterable(every)), facts)

    def _facts(self) -> _Facts:
        return _Facts(self.counts, self.ranks, self.lengths, self.widest, self.dtypes, self.mixable)

    def _hold(self, facts: _Facts) -> None:
        self.counts, self.ranks, self.lengths = facts.counts, facts.ranks, facts.lengths
        self.widest, self.dtypes, self.mixable = facts.widest, facts.dtypes, facts.mixable

    def _derived(self, parts: Sequence[array], factors: Factors, facts: _Facts) -> Stacks:
        found = Stacks.__new__(Stacks)
        found.transposed, found.on_cpu = self.transposed, self.on_cpu
        found.factors = factors
        found._hold(facts)
        found.table = array("q")
        for part in parts:
            found.table += part
        found._place()
        return found
