"""What a launch over many tensors needs beside them: their layout, the plan made from it once, and their addresses.

A plan (work list, strides, variants) depends on shapes, strides, types, device and on how the addresses are aligned,
so it is cached on exactly these; the addresses themselves are read anew on every call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import attrgetter
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._dispatch import interpreting, resolve
from ._memory import check_addresses

WIDEST = 16  # bytes of the widest load of a GPU thread
T = TypeVar("T")
Key = tuple  # of a place and what else a plan depends on
# What captured graphs read, kept for good, each once: kilobytes for a call, megabytes for one on 40,000 tensors.
READ_BY_GRAPHS: dict[int, object] = {}
NOTHING = nullcontext()
_TYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


class Layout:
    """Everything a plan depends on, as a key: equal for lists of tensors that one plan serves.

    Its hash is computed once: with tens of thousands of tensors that takes longer than a lookup may.
    """

    __slots__ = ("hash", "items")

    def __init__(self, *items: Hashable) -> None:
        self.items = items
        self.hash = hash(items)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Layout) and self.hash == other.hash and self.items == other.items


def describe(tensors: Sequence[Tensor]) -> Layout:
    """Shape, strides, type and devices of the tensors: equal for two lists of tensors of one layout.

    Lists with a view that negates its memory have another, so that no kept plan skips the check that refuses it.
    Passes in C over flat numbers: with tens of thousands of tensors the time goes into reaching them in memory.
    """
    sizes, strides = (np.fromiter(chain.from_iterable(map(f, tensors)), np.int64) for f in (Tensor.size, Tensor.stride))
    dimensions, types = np.fromiter(map(Tensor.dim, tensors), np.int64), tuple(map(_TYPE, tensors))
    numbers = (a.tobytes() for a in (sizes, strides, dimensions))
    return Layout(*numbers, types, frozenset(map(_DEVICE, tensors)), any(map(Tensor.is_neg, tensors)))


def unchecked_addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """The tensors' addresses, int64; zero for one that has no memory."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """The tensors' addresses, int64, which may be followed.

    Raises:
        ValueError: as ``check_memory``.
    """
    pointers = unchecked_addresses(tensors)
    check_addresses(tensors, pointers)
    return pointers


def survey(tensors: Sequence[Tensor]) -> tuple[Layout, np.ndarray]:
    """Everything a plan depends on, hashable, and the tensors' addresses, int64; zero for one that has no memory."""
    pointers = unchecked_addresses(tensors)
    return Layout(describe(tensors), alignments(pointers)), pointers


def check_one_device(tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless all tensors lie on one device that kernels can follow addresses on."""
    resolve("auto", tensors)
    check_runnable(tensors[0].device)


def alignments(pointers: np.ndarray) -> bytes:
    """How every address lies within the widest load: the part of an address that a variant depends on."""
    return (pointers & (WIDEST - 1)).astype(np.uint8).tobytes()


def power_of_two_divisor(number: int, cap: int) -> int:
    """The largest power of two, at most ``cap`` (one itself), that divides ``number``; ``cap`` for 0."""
    return min(number & -number, cap) if number else cap


def place(device: torch.device) -> tuple[torch.device, Hashable]:
    """What device tables belong to: the device, and the stream whose order protects their memory."""
    if device.type != "cuda":
        return (device, None)
    return (device, torch.cuda.current_stream(device).cuda_stream)


def capturing(device: torch.device) -> bool:
    """Whether what is queued now goes into a CUDA graph: then no device table may be kept for later calls.

    A table made within a capture lies in the graph's memory and is filled by its replays only.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def kept_for_graphs(item: T) -> T:
    """``item``, whose memory a graph will read at every replay, whatever else lets go of it."""
    READ_BY_GRAPHS[id(item)] = item
    return item


def launching_on(device: torch.device) -> AbstractContextManager:
    """Make a device the current one: Triton launches there, on its stream. Where it is that already nothing happens."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return NOTHING
    return torch.cuda.device(device)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a host array to the device without making the host wait for the work queued there."""
    return host_to_device(torch.from_numpy(np.ascontiguousarray(array)), device)


def host_to_device(host: Tensor, device: torch.device) -> Tensor:
    """The same of a tensor on the CPU.

    Within a capture the copy becomes part of the graph, whose replays read the pinned memory again: it is kept.
    """
    if device.type == "cpu":
        return host
    host = host.contiguous().pin_memory()
    if capturing(device):
        kept_for_graphs(host)
    return host.to(device, non_blocking=True)


def moved(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on ``device``, without making the host wait for the work that is queued there."""
    if t.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        return host_to_device(t, device)
    return t.to(device)


def check_runnable(device: torch.device) -> None:
    """Raise where kernels cannot follow addresses: Triton's interpreter reads them on the host."""
    if interpreting() and device.type != "cpu":
        raise RuntimeError(f"TRITON_INTERPRET=1 follows addresses on the host only; the tensors are on {device}")


class PlanCache(Generic[T]):
    """The most recently used plans, by layout. The first item of every key is a ``place``."""

    def __init__(self, size: int = 32) -> None:
        self.size = size
        self.plans: OrderedDict[Key, T] = OrderedDict()
        self.lock = Lock()

    def get(self, key: Key, build: Callable[[], T]) -> T:
        """The plan stored under ``key``, built where there is none.

        Within a capture that of any stream serves (a capture begins when the device is idle), and is kept for the
        graph; none is stored.
        """
        with self.lock:
            if capturing(key[0][0]):
                found = self._of_any_stream(key)
                return build() if found is None else kept_for_graphs(found)
            plan = self.plans.get(key)
            if plan is None:
                plan = self.plans[key] = build()
                while len(self.plans) > self.size:
                    self.plans.popitem(last=False)
            self.plans.move_to_end(key)
        return plan

    def _of_any_stream(self, key: Key) -> T | None:
        for stored, plan in self.plans.items():
            if stored[0][0] == key[0][0] and stored[1:] == key[1:]:
                return plan
        return None


class AddressTable:
    """Addresses ``pointers[source] + offset`` on the device, copied again only when the tensors have moved."""

    def __init__(self, source: np.ndarray, offset: np.ndarray, device: torch.device) -> None:
        self.source, self.offset, self.device = source, offset, device
        self.latest: tuple[bytes, Tensor] | None = None

    def of(self, pointers: np.ndarray) -> Tensor:
        """The int64 table for tensors that now lie at ``pointers``."""
        now, latest = pointers.tobytes(), self.latest
        if latest is None or latest[0] != now:
            # a new table, never an overwritten one: a kernel still queued may be reading the old one
            latest = (now, to_device(pointers[self.source] + self.offset, self.device))
            if not capturing(self.device):
                self.latest = latest  # in one step: another thread finds either pair whole
        elif capturing(self.device):
            kept_for_graphs(latest[1])
        return latest[1]
