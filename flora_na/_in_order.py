"""Tasks worked on side by side whose results come in their order; what they read in turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class InTurn(Mapping[str, T]):
    """A mapping whose values are made by one thread at a time."""

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values, self._lock = values, threading.Lock()

    def __getitem__(self, key: str) -> T:
        with self._lock:
            return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def in_order(
    tasks: Iterable[Callable[[], T]], workers: int, begin: Callable[[], None] | None = None
) -> Generator[T, None, None]:
    """The results of tasks, each in a thread where there are several ``workers``, else where they are asked for.

    Each of these threads calls ``begin`` first.
    No more than ``workers`` are begun and not yet asked for. The first error, in the order of the tasks, ends it; those
    that were begun are waited for, then and when the caller goes.
    """
    if workers < 2:
        for task in tasks:
            yield task()
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="fedgram-portion", initializer=begin) as threads:
        begun: deque[Future[T]] = deque()
        for task in tasks:
            begun.append(threads.submit(task))
            if len(begun) == workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
