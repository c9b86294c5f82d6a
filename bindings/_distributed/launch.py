"""The command line on several ranks: what torchrun's environment says, and one line from one rank when a run fails."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch import distributed as dist

from ..console import describe, fail, is_input_error, one_line, one_line_errors
from .watch import RankError, Watch

JOINING = 10.0
"""Seconds beyond those that torch is told to wait for the other ranks, after which a rank that still waits ends."""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return all(name in os.environ for name in VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def first_rank() -> bool:
    """Whether this process is the one that speaks and writes."""
    return not launched() or int(os.environ["RANK"]) == 0


def refuse_launched(command: str) -> None:
    """End a command that does not share its work: code 1 and a line from rank 0, silence from the others.

    They end with code 0, since at the first code above it torchrun stops the others before they have spoken.
    """
    if launched() and not first_rank():
        raise SystemExit(0)
    if launched():
        fail(f"{command}: for one process; under torchrun there is aggregate, which starts anew if it was interrupted")


@contextlib.contextmanager
def alone_or_on_ranks(patience: float) -> Iterator[Watch | None]:
    """The watch over the ranks that torchrun started, or None for a process of its own; errors end in one line."""
    with launched_ranks(patience) if launched() else one_line_errors() as watch:
        yield watch


@contextlib.contextmanager
def launched_ranks(patience: float) -> Iterator[Watch]:
    """Join the other ranks over gloo, and keep watch while the block runs.

    An error of any rank ends the process with code 1, after one line on the stderr of one rank: bad input as the
    command line has it, a fault with its traceback. A process that is deep in a computation when another rank fails
    is ended where it is, some seconds later; outputs are renamed into place whole, so none is left in pieces.

    Args:
        patience: seconds without a sign of life after which a rank is given up.
    """
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = _join(rank, count, timedelta(seconds=max(patience, 30.0)))
    speaker = _Speaker()
    watch = Watch(own, rank, count, patience=patience, last_resort=speaker.end)
    speaker.watch = watch
    before = signal.signal(signal.SIGTERM, _told_to_stop)
    try:
        with watch, _claimed(watch):
            yield watch
            watch.ready()
    except Exception as error:
        if not (isinstance(error, RankError) or is_input_error(error)):
            sys.excepthook(type(error), error, error.__traceback__)
        speaker.end(_message(rank, error))
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _join(rank: int, count: int, wait: timedelta) -> dist.Store:
    """Meet the other ranks; a store of this job's own, over a connection of its own.

    The connection comes before the group, which no rank leaves before all have entered it: whoever stops afterwards
    is seen by the watch. A store that stops answering before then would be waited for without end, hence the timer.
    """
    _stay_on_loopback()
    name = f"fedgram/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # a restart must not find what had failed
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    apart = f"the {count} ranks did not meet at {address}:{port}: "
    limit = wait.total_seconds() + JOINING
    timer = threading.Timer(limit, _end, [f"{apart}no answer for {limit:g} s"])
    timer.daemon = True
    timer.start()
    own: dist.Store | None = None
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=wait))
        own = dist.TCPStore(address, port, is_master=False, timeout=wait)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"{name}/group", store), rank=rank, world_size=count, timeout=wait
        )
    except (RuntimeError, ValueError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        if _is_to_tell(own, f"{name}/apart", rank):
            fail(apart + text[0])
        raise SystemExit(1) from None
    finally:
        timer.cancel()
    return dist.PrefixStore(f"{name}/watch", own)


def _is_to_tell(store: dist.Store | None, key: str, rank: int) -> bool:
    """Whether this rank tells why the ranks did not meet: the first one that asks, since any may be the one that is
    missing; without a store that answers, the first rank of every host."""
    if store is not None:
        with contextlib.suppress(RuntimeError):
            return store.compare_set(key, "", str(rank)).decode() == str(rank)
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _end(message: str) -> None:
    """End this process, whatever its other threads are waiting for; the first rank of every host tells why."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"fedgram: {one_line(message)}", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def _claimed(watch: Watch) -> Iterator[None]:
    """Fail the job at the first error here, in the words of the command line."""
    try:
        yield
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, once another rank has ended for this
        watch.claim(_message(watch.rank, error))
        raise


def _message(rank: int, error: Exception) -> str:
    return str(error) if isinstance(error, RankError) else f"rank {rank}: {describe(error)}"


class _Speaker:
    """Ends this process; whichever thread comes first prints the line, if it falls to this rank."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self.lock = threading.Lock()

    def end(self, message: str) -> None:
        with self.lock:
            told = self.watch.claim(message) if self.watch is not None else message
            if told is not None:
                print(f"fedgram: {one_line(told)}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # A group that has lost a rank cannot be taken down in order: its destructors wait for the others.
            os._exit(1)


def _told_to_stop(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise RankError(f"another rank has ended before its work was done (rank {os.environ['RANK']} received {name})")


def _stay_on_loopback() -> None:
    """Ranks that meet on this machine's loopback address also talk over it."""
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1") and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
