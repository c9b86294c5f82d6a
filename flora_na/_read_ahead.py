"""A thread that reads the clients' next modules, within a budget of memory, while the present ones are worked on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import portions
from .cohort import Cohort
from .layer import Adapter, LoraLayer

HELD = 1.5
"""Factors held at most, those being worked on and those read ahead, in units of the largest portion."""
LEAST_HELD = 1 << 24
"""Bytes that may be held in any case: small portions need not wait for each other."""
SPARE = 1 << 23
"""Bytes that may be held beyond ``HELD``, at most a portion's: the second is then ready when the first is done."""
READY = 2
"""Portions that may be ready at a time: more of small modules are mostly what every tensor takes beside its numbers."""


@dataclass(frozen=True, eq=False)
class Portion:
    """Some modules of every client, in memory, and their bytes."""

    cohort: Cohort
    nbytes: int


class _Module(NamedTuple):
    """One module's layers, of every client or None, and their bytes."""

    name: str
    layers: list[LoraLayer | None]
    nbytes: int


class _StoppedError(Exception):
    """The consumer has gone."""


class ReadAhead:
    """Portions of the clients' modules, read by a thread within a budget of bytes.

    The thread waits for room only while a portion is worked on or ready, so that a module of any size gets through. A
    portion that was taken counts until it is given back, by any thread. The reading thread ends with the block.
    """

    def __init__(self, cohort: Cohort, modules: Sequence[str]) -> None:
        self._cohort, self._modules = cohort, modules
        self._change = threading.Condition()
        self._ready: deque[Portion | BaseException | None] = deque()
        # bytes: all that the thread has read, and all that it was given back; portions: those taken, not yet given back
        self._read_bytes = self._given_back = self._taken = 0
        self._layer = self._largest = 0
        self._spare = SPARE
        self._wanted, self._closed = False, False
        self._thread = threading.Thread(target=self._run, name="fedgram-read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        self._ready.clear()

    def take(self) -> Portion | BaseException | None:
        """The next portion when it is read, what kept it from being read, or None after the last."""
        with self._change:
            self._wanted = True
            self._change.notify_all()
            while not self._ready:
                self._change.wait()
            self._wanted = False
            self._taken += 1  # before it is no longer ready: the other thread looks without the lock
            portion = self._ready.popleft()
            self._change.notify_all()  # there is room for another one to be ready
            return portion

    def give_back(self, nbytes: int) -> None:
        """A portion that was taken is done with, and nobody holds it."""
        with self._change:
            self._given_back += nbytes
            self._taken -= 1
            self._change.notify_all()

    @property
    def _held(self) -> int:
        return self._read_bytes - self._given_back

    @property
    def _starving(self) -> bool:
        return self._wanted and not self._ready and not self._taken

    def _run(self) -> None:
        try:
            for portion in self._read():
                self._hand_over(portion)
                del portion  # it is to be freed where it is worked on
        except _StoppedError:
            return
        except BaseException as error:  # raised where the portion would be worked on
            self._hand_over(error)
        self._hand_over(None)

    def _hand_over(self, item: Portion | BaseException | None) -> None:
        with self._change:
            if isinstance(item, Portion):
                self._largest = max(self._largest, item.nbytes)
            self._ready.append(item)
            self._change.notify_all()

    def _read(self) -> Iterator[Portion]:
        """Modules put together as ``portions.chunks`` does it."""
        for modules in portions.together(map(self._module, self._modules), _bytes_and_limit):
            portion = self._portion(modules)
            del modules
            yield portion
            del portion

    def _portion(self, modules: Sequence[_Module]) -> Portion:
        if len(modules) == 1 and self._cohort.exceeds_a_side(modules[0].name):
            self._spare = 0  # its decomposition takes as much and more
        layers: list[dict[str, LoraLayer]] = [{} for _ in self._cohort.adapters]
        for module in modules:
            for mine, layer in zip(layers, module.layers, strict=True):
                if layer is not None:
                    mine[module.name] = layer
        cohort = replace(self._cohort, adapters=tuple(map(Adapter, layers)), modules=tuple([m.name for m in modules]))
        return Portion(cohort, sum(module.nbytes for module in modules))

    def _module(self, name: str) -> _Module:
        layers: list[LoraLayer | None] = []
        total = 0
        for client, adapter in enumerate(self._cohort.adapters):
            self._wait_for_room()
            layer = self._cohort.layer(client, name) if name in adapter.modules else None
            layers.append(layer)
            total += self._count(0 if layer is None else layer.A.nbytes + layer.B.nbytes)
            del layer
        return _Module(name, layers, total)

    def _wait_for_room(self) -> None:
        """Wait while another layer (as large as the last) were too much and some will be given back."""
        if not self._must_wait() and not self._closed:  # seldom is anything to be waited for
            return
        with self._change:
            while not self._closed and self._must_wait():
                self._change.wait()
            if self._closed:
                raise _StoppedError

    def _must_wait(self) -> bool:
        return not self._starving and (len(self._ready) >= READY or self._held + self._layer > self._limit())

    def _limit(self) -> float:
        return max(LEAST_HELD, HELD * self._largest + min(self._largest, self._spare))

    def _count(self, nbytes: int) -> int:
        """Count a layer as held."""
        self._read_bytes += nbytes
        self._layer = nbytes
        return nbytes


def _bytes_and_limit(module: _Module) -> tuple[int, int]:
    layers = [layer for layer in module.layers if layer is not None]
    return portions.module_bytes([layer.B for layer in layers], [layer.A for layer in layers]), portions.CHUNK_BYTES
