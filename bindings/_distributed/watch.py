"""Ranks that keep an eye on each other: one that fails, dies or stops answering ends the others in stated time.

A collective tells of a dead rank only when it is next called, and a rank may compute for minutes in between. So every
rank beats in a store that all of them reach, listens to the rank before it, and looks for the message of a rank that
has failed. The first to write such a message is the one that speaks; all others end in silence.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from torch import distributed as dist

T = TypeVar("T")
POLL = 0.02
"""Seconds between two looks while waiting for the others; grows to ten times that."""
FAREWELL = 2.0
"""Seconds that a rank stays at the end, at most, for the others to read what is in the store."""


class RankError(RuntimeError):
    """Another rank failed, died, or no longer answers; the message says which and what is known."""


class Watch:
    """The watch of one rank over a job; a context manager around the work.

    Args:
        store: reached by all ranks and used by nobody else, such as ``dist.PrefixStore("watch", dist.TCPStore(...))``
            with a client of its own: a store's blocking calls would hold up the beats.
        rank, count: this process, and how many there are.
        patience: seconds without a beat after which a rank is given up.
        last_resort: called with the message when this process has not ended ``grace`` seconds after the job failed,
            for example because it is deep in a computation; None leaves it to the next look.
        grace: seconds.

    Raises:
        ValueError: patience is not above zero.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        count: int,
        *,
        patience: float = 30.0,
        last_resort: Callable[[str], None] | None = None,
        grace: float = 10.0,
    ) -> None:
        if not patience > 0:
            raise ValueError(f"patience: expected seconds above 0, got {patience}")
        store.set_timeout(timedelta(seconds=patience))
        self.rank, self.count, self.patience = rank, count, patience
        self.failure: str | None = None
        self._store, self._last_resort, self._grace = store, last_resort, grace
        self._phase, self._tells, self._lost, self._answers = 0, rank == 0, False, 0
        self._pause = min(1.0, patience / 5)
        self._stop, self._done = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._listen, self._guard)]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.claim(f"rank {self.rank}: {' '.join(str(error).split()) or type(error).__name__}")
        self._stop.set()
        self._threads[0].join(self.patience)
        self._leave()
        self._done.set()

    def check(self) -> None:
        """Raise RankError if the job has failed elsewhere."""
        if self.failure is not None:
            raise RankError(self.failure)

    def claim(self, message: str) -> str | None:
        """Fail the job for this reason, unless it has failed already.

        Returns:
            On one rank, what the job failed of: that rank is to tell the user. None on the others. Where the store
            cannot be reached nothing can be agreed on, and it is the first rank of every host.
        """
        try:
            kept = self._ask(lambda: self._store.compare_set("failed", "", f"{self.rank}\n{message}"))
        except RankError:
            return message if os.environ.get("LOCAL_RANK", "0") == "0" else None
        rank, self.failure = kept.decode().split("\n", 1)
        self._tells = self._tells or int(rank) == self.rank
        return self.failure if int(rank) == self.rank else None

    def ready(self) -> None:
        """Wait until every rank has come this far; unlike a collective's, the wait is as long as all are alive.

        Raises:
            RankError: the job has failed.
        """
        self._look()
        self.check()
        self._phase += 1
        key = f"ready/{self._phase}"
        come = self._ask(lambda: self._store.add(key, 1))
        pause = POLL
        while come < self.count:
            self._look()
            self.check()
            time.sleep(pause)
            pause = min(1.2 * pause, 10 * POLL)
            come = self._ask(lambda: self._store.add(key, 0))

    def _ask(self, question: Callable[[], T]) -> T:
        """A question to the store, whose own errors mean that the job has lost it."""
        cause: RuntimeError | None = None
        try:
            if not self._lost:
                answer = question()
                self._answers += 1
                return answer
        except RankError:  # of a signal's handler, which came while the store was asked
            raise
        except RuntimeError as error:
            cause = error
        self._lost = True  # asking again would only make torch warn again
        self.failure = self.failure or "the store of the job cannot be reached: the process that holds it has ended"
        raise RankError(self.failure) from cause

    def _guard(self) -> None:
        """See that the store answers, whose calls wait without end for a host that is gone, and that a job that has
        failed ends. Silence is counted in looks, so that a process that was suspended does not blame the others."""
        heard, silent = -1, 0
        while self.failure is None and not self._done.wait(self._pause):
            heard, silent = self._answers, silent + 1 if self._answers == heard else 0
            if silent * self._pause > self.patience:
                self._lost = True
                self.failure = f"the store of the job has not answered for {self.patience:g} s"
        if self.failure is not None and self._last_resort is not None and not self._done.wait(self._grace):
            self._last_resort(self.failure)

    def _listen(self) -> None:
        """Beat, listen and look, until the work ends or the job fails."""
        before = (self.rank - 1) % self.count
        heard, silent, beats = -1, 0, 0
        with contextlib.suppress(RankError):  # it is kept in self.failure
            while not self._stop.wait(self._pause) and self.failure is None:
                beats += 1
                self._beat(beats)
                now = self._beats_of(before)
                heard, silent = now, silent + 1 if now == heard else 0
                if silent * self._pause > self.patience:
                    self.claim(f"rank {before} of {self.count} has not been heard of for {self.patience:g} s")
                self._look()

    def _beat(self, number: int) -> None:
        self._ask(lambda: self._store.set(f"beat/{self.rank}", str(number)))

    def _beats_of(self, rank: int) -> int:
        """The latest beat of a rank; one that has left is never late, so that every look at it is news."""
        if self._ask(lambda: self._store.check([f"left/{rank}"])):
            return time.monotonic_ns()
        key = f"beat/{rank}"
        return int(self._ask(lambda: self._store.get(key))) if self._ask(lambda: self._store.check([key])) else 0

    def _look(self) -> None:
        if self._ask(lambda: self._store.check(["failed"])):
            self.failure = self._ask(lambda: self._store.get("failed")).decode().split("\n", 1)[1]

    def _leave(self) -> None:
        """Say farewell. Rank 0, whose process may hold the store, and the one that tells what failed, whose end may
        end the store's, stay until the others have read what is there."""
        with contextlib.suppress(RankError):
            here = self._ask(lambda: self._store.add("left", 1))
            self._ask(lambda: self._store.set(f"left/{self.rank}", "1"))
            deadline = time.monotonic() + FAREWELL
            while self._tells and here < self.count and time.monotonic() < deadline:
                time.sleep(POLL)
                here = self._ask(lambda: self._store.add("left", 0))
