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

    The thread waits for room only while the consumer works on a portion, or has one more ready, so that a module of
    any size gets through; what the consumer holds counts as given back when it asks for the next. The thread ends with
    the block.
    """

    def __init__(self, cohort: Cohort, modules: Sequence[str]) -> None:
        self._cohort, self._modules = cohort, modules
        self._change = threading.Condition()
        self._ready: deque[Portion | BaseException | None] = deque()
        # bytes: all that the thread has read, and all that the consumer has given back; each is written by one of them
        self._read_bytes = self._given_back = 0
        self._layer = self._largest = 0
        self._starving, self._closed = False, False
        self._thread = threading.Thread(target=self._run, name="fedgram-read-ahead", daemon=True)

    def __enter__(self) -> Iterator[Portion]:
        self._thread.start()
        return self._consume()

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        self._ready.clear()

    def _consume(self) -> Iterator[Portion]:
        nbytes = 0
        while True:
            portion = self._next(nbytes)
            if portion is None:
                return
            nbytes = portion.nbytes
            yield portion
            del portion

    @property
    def _held(self) -> int:
        return self._read_bytes - self._given_back

    def _next(self, given_back: int) -> Portion | None:
        with self._change:
            self._given_back += given_back
            self._starving = not self._ready
            self._change.notify_all()
            while not self._ready:
                self._change.wait()
            item = self._ready.popleft()
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            for portion in self._read():
                self._hand_over(portion)
                del portion  # it is the consumer's to free
            self._hand_over(None)
        except _StoppedError:
            pass
        except BaseException as error:  # raised where the portions are taken
            self._hand_over(error)

    def _hand_over(self, item: Portion | BaseException | None) -> None:
        with self._change:
            if isinstance(item, Portion):
                self._largest = max(self._largest, item.nbytes)
            self._ready.append(item)
            self._starving = False
            self._change.notify_all()

    def _read(self) -> Iterator[Portion]:
        """Modules put together as ``portions.chunks`` does it."""
        for modules in portions.together(map(self._module, self._modules), _bytes_and_limit):
            portion = self._portion(modules)
            del modules
            yield portion
            del portion

    def _portion(self, modules: Sequence[_Module]) -> Portion:
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
        """Wait while another layer (as large as the last) were too much and the consumer will give some back."""
        if not self._must_wait() and not self._closed:  # seldom is anything to be waited for
            return
        with self._change:
            while not self._closed and self._must_wait():
                self._change.wait()
            if self._closed:
                raise _StoppedError

    def _must_wait(self) -> bool:
        return not self._starving and self._held + self._layer > self._limit()

    def _limit(self) -> float:
        return max(LEAST_HELD, HELD * self._largest + min(self._largest, SPARE))

    def _count(self, nbytes: int) -> int:
        """Count a layer as held."""
        self._read_bytes += nbytes
        self._layer = nbytes
        return nbytes


def _bytes_and_limit(module: _Module) -> tuple[int, int]:
    layers = [layer for layer in module.layers if layer is not None]
    return portions.module_bytes([layer.B for layer in layers], [layer.A for layer in layers]), portions.CHUNK_BYTES
