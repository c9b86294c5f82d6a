"""Factors that are checked and surveyed once, and a slab that clients' factors are copied into as they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import overload

import numpy as np
import torch
from torch import Tensor

from ._factor_inputs import Factors, check_factors, flat
from ._floats import FLOATS
from ._memory import check_addresses
from ._plan import Layout, survey, unchecked_addresses
from ._stacks import Stacks

SLAB_ALIGN = 128  # bytes: every tensor of a slab starts at a cache line, so that all loads may be wide


class PreparedSide(Sequence[Sequence[Tensor]]):
    """One side of prepared factors: ``side[l][u]`` as in the lists it was made from. See ``prepare``.

    Attributes:
        tensors: all tensors, module by module.
        clients: the number of clients of every module.
        columns: the number of columns of every module's tensors.
        layout: what a plan depends on.
        pointers: the tensors' addresses, int64.
        device: where they lie.
    """

    def __init__(self, name: str, factors: Factors, whole: PreparedSide | None = None) -> None:
        self.name = name
        self._whole = whole
        self._portions: dict[tuple[int, int], PreparedSide] = {}
        # tensors of our own on the same memory: shapes, strides and types can no longer change behind a plan
        self._modules = [[t.detach() for t in clients] for clients in factors] if whole is None else list(factors)
        self.clients = [len(clients) for clients in factors]
        self.columns = [tuple([t.shape[1] for t in clients]) for clients in self._modules]
        self.tensors = [t for clients in self._modules for t in clients]
        layout, self.pointers = survey(self.tensors)
        # their memory is asked about where it is used: fake tensors, say, have none and only give shapes
        self._nowhere = [int(i) for i in np.flatnonzero(self.pointers == 0) if self.tensors[i].numel()]
        self.layout = Layout(layout, tuple(self.clients))
        self.device = self.tensors[0].device if self.tensors else torch.device("cpu")
        first: dict[int, int] = {}
        for i, t in enumerate(self.tensors):
            first.setdefault(t.untyped_storage()._cdata, i)
        self._owners = np.fromiter(first.values(), np.int64, len(first))  # one tensor of every storage
        self._owned = [self.tensors[i] for i in self._owners]
        self._held = 0
        self._stacks: dict[bool, Stacks] = {}

    @overload
    def __getitem__(self, index: int) -> Sequence[Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[Tensor]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[Tensor] | Sequence[Sequence[Tensor]]:
        """The clients' tensors of a module; of a slice of modules a prepared side again, made once."""
        if not isinstance(index, slice):
            return self._modules[index]
        start, stop, step = index.indices(len(self))
        if step != 1 or start >= stop:
            return self._modules[index]
        portion = self._portions.get((start, stop))
        if portion is None:
            whole = self if self._whole is None else self._whole
            portion = self._portions[start, stop] = PreparedSide(self.name, self._modules[start:stop], whole)
        return portion

    def __len__(self) -> int:
        return len(self._modules)

    def stacks(self, transposed: bool) -> Stacks:
        """What the compiled loops must know of the factors, worked out once."""
        if transposed not in self._stacks:
            self._stacks[transposed] = Stacks(self._modules, transposed=transposed)
        return self._stacks[transposed]

    def check(self) -> None:
        """Raise ValueError where a storage has been moved or freed since: one look at each, or none while held."""
        if self._held or (self._whole is not None and self._whole._held):
            return
        moved = np.flatnonzero(unchecked_addresses(self._owned) != self.pointers[self._owners])
        if len(moved):
            raise ValueError(
                f"{self._label(int(self._owners[moved[0]]))}: its memory was moved or freed since the factors were "
                "prepared (a storage was resized); prepare them again"
            )

    def check_memory(self) -> None:
        """Raise ValueError where a factor had no memory when it was prepared."""
        if self._nowhere:
            tensors = [self.tensors[i] for i in self._nowhere]
            check_addresses(tensors, self.pointers[self._nowhere], lambda i: self._label(self._nowhere[i]))

    def _label(self, index: int) -> str:
        """The tensor of that number as the caller knows it."""
        module = next(l for l, end in enumerate(accumulate(self.clients)) if index < end)
        return f"{self.name}[{module}][{index - sum(self.clients[:module])}]"


class PreparedFactors:
    """``B`` and ``A``, to be passed wherever an operation takes factors. See ``prepare``."""

    def __init__(self, B: Factors, A: Factors) -> None:
        check_factors(B, A)
        self.B, self.A = PreparedSide("B", B), PreparedSide("A", A)

    def check(self) -> None:
        """Raise ValueError where memory that was prepared has been moved or freed since."""
        self.B.check()
        self.A.check()

    @contextmanager
    def held(self) -> Iterator[PreparedFactors]:
        """Check once for all the operations within: the caller resizes no storage meanwhile."""
        self.check()
        self.B._held += 1
        self.A._held += 1
        try:
            yield self
        finally:
            self.B._held -= 1
            self.A._held -= 1


def prepare(B: Factors, A: Factors) -> PreparedFactors:
    """Check and survey factors once, for operations that are repeated on them.

    An operation on plain lists reads shape, strides, type and address of every tensor on every call, 20 ms for the
    44,800 tensors of 100 clients' adapters of a 7B model. ``f = prepare(B, A)`` does this once: ``factor_gram(f.B,
    f.A)``, ``factor_cross`` and ``factor_combine`` then take time that grows with the modules only. Numbers written
    into the tensors later are seen, as they share the memory; a tensor that is replaced in the caller's list, or
    given other memory (``t.data = ..``), is not: prepare again. The memory is kept alive. Every operation looks
    whether a storage has moved, and refuses if one has; ``with f.held():`` looks once for a whole block.

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``; any float type, any strides.
        A: ``A[l][u]`` (r_lu, n_l).

    Returns:
        The two sides, as sequences of sequences of tensors.

    Raises:
        ValueError: shapes or types do not fit together; the message names the tensor.
    """
    return PreparedFactors(B, A)


def first(*sides: Factors | Sequence[Tensor] | None) -> list[Tensor]:
    """The first tensor of the sides, by which a backend is chosen; no tensor where there is none."""
    for side in sides:
        if isinstance(side, PreparedSide):
            if side.tensors:
                return side.tensors[:1]
        else:
            for item in () if side is None else side:
                if isinstance(item, Tensor):
                    return [item]
                if len(item):
                    return [item[0]]
    return []


def inventory(*sides: Factors | Sequence[Tensor] | None) -> tuple[Layout, np.ndarray]:
    """Everything a plan over these sides depends on, and the addresses of all their tensors, in order.

    Raises:
        ValueError: as ``check_memory``.
    """
    layouts: list[Layout | None] = []
    pointers: list[np.ndarray] = []
    for side in sides:
        if isinstance(side, PreparedSide):
            side.check()
            side.check_memory()
            layouts.append(side.layout)
            pointers.append(side.pointers)
        elif side is None:
            layouts.append(None)
        else:
            tensors = flat(side)
            layout, where = survey(tensors)
            check_addresses(tensors, where)
            clients = [len(item) for item in side if not isinstance(item, Tensor)]
            layouts.append(Layout(layout, tuple(clients) if clients else len(side)))
            pointers.append(where)
    return Layout(*layouts), np.concatenate(pointers) if pointers else np.zeros(0, np.int64)


class FactorSlab:
    """One buffer for the factors of all clients, written as they arrive: no addresses to collect at all.

    The factors of a client lie side by side (``client_bytes(u)`` is one stretch of memory, module by module, B then
    A, each padded to 128 bytes), so that a client may also be received in one transfer. ``factors`` is prepared: the
    look for moved memory is one comparison.

    Args:
        shapes: (m_l, n_l) of every module.
        ranks: the rank of every client, or ``ranks[u][l]`` of every client and module.
        dtype: of all factors.
        device: where the slab lies.

    Raises:
        ValueError: shapes or ranks are negative or do not fit together, or the type is no float.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        ranks: Sequence[int | Sequence[int]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in FLOATS:
            raise ValueError(f"dtype: expected a float type, got {dtype}")
        if not len(shapes) or not len(ranks):
            raise ValueError(f"shapes and ranks: expected at least one of each, got {len(shapes)} and {len(ranks)}")
        step = SLAB_ALIGN // dtype.itemsize
        offset, bounds = 0, [0]
        places: list[list[tuple[int, int, int, int, int]]] = []  # per client and module: offsets of B and A, m, r, n
        for u, given in enumerate(ranks):
            of_client = [given] * len(shapes) if isinstance(given, int) else list(given)
            if len(of_client) != len(shapes) or min(of_client) < 0:
                raise ValueError(f"ranks[{u}]: expected one rank for each of {len(shapes)} modules, got {given}")
            places.append([])
            for (m, n), r in zip(shapes, of_client, strict=True):
                if m < 0 or n < 0:
                    raise ValueError(f"shapes: expected sizes of at least 0, got {(m, n)}")
                second = offset + -(-m * r // step) * step
                places[u].append((offset, second, m, r, n))
                offset = second + -(-r * n // step) * step
            bounds.append(offset)
        self.buffer = torch.zeros(offset, dtype=dtype, device=device)
        self._bounds = bounds
        self.clients: list[tuple[list[Tensor], list[Tensor]]] = []
        for rows in places:
            B = [self.buffer[b : b + m * r].view(m, r) for b, _, m, r, _ in rows]
            A = [self.buffer[a : a + r * n].view(r, n) for _, a, _, r, n in rows]
            self.clients.append((B, A))
        modules = range(len(shapes))
        self.factors = prepare(
            [[B[l] for B, _ in self.clients] for l in modules], [[A[l] for _, A in self.clients] for l in modules]
        )

    def client(self, u: int) -> Tensor:
        """Everything of client ``u`` as one flat tensor."""
        return self.buffer[self._bounds[u] : self._bounds[u + 1]]

    def put(self, u: int, B: Sequence[Tensor], A: Sequence[Tensor], *, non_blocking: bool = True) -> None:
        """Copy a client's factors, one per module, into their place; from pinned memory the host does not wait.

        Raises:
            ValueError: the number or a shape differs from what the slab was made for; names the tensor.
        """
        for name, given, place in zip("BA", (B, A), self.clients[u], strict=True):
            if len(given) != len(place):
                raise ValueError(f"{name}: {len(given)} modules, the slab has {len(place)}")
            for l, (t, own) in enumerate(zip(given, place, strict=True)):
                if t.shape != own.shape:
                    raise ValueError(f"{name}[{l}] of client {u}: {tuple(t.shape)}, the slab has {tuple(own.shape)}")
        with torch.no_grad():
            for own, t in zip(self.clients[u][0] + self.clients[u][1], [*B, *A], strict=True):
                own.copy_(t, non_blocking=non_blocking)
