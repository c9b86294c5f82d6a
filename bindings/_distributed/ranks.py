"""A process group seen from one rank: agreement on errors, exchanges of parcels, and where its tensors travel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .parcels import here, pack, unpack
from .watch import RankError, Watch

PIECE = 64 << 20
"""Bytes to one rank that travel in one collective: each must be done within the group's timeout."""


class Ranks:
    """The ranks of one job.

    Attributes:
        rank, count: this one, and how many there are.
        device: where tensors must lie to travel: the CPU if the group's backend carries CPU tensors (gloo), else this
            process's accelerator (nccl).
        sent, received: bytes of the parcels so far, those to itself left out.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, watch: Watch | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("group: no process group: call torch.distributed.init_process_group first")
        self.group, self.watch = group, watch
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks")
        if watch is not None and watch.count != self.count:  # it would wait for those that are not called
            raise ValueError(f"watch: over {watch.count} ranks, and the group has {self.count}: give the group its own")
        self.device = _transport(group)
        self.sent = self.received = 0
        self._told: Exception | None = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank: an error on one of them ends it on all.

        A rank that fails says so in place of the sizes of its next exchange, so that the block may hold exchanges.

        Raises:
            Exception: the block's own, on the ranks where it failed.
            RankError: on the others; names the first rank that failed, and its reason.
        """
        error: Exception | None = None
        try:
            yield
        except RankError:  # all have been told
            raise
        except Exception as failed:
            if failed is self._told:  # by an exchange, or a block, within this one
                raise
            error = failed
        self.agree(error)

    def agree(self, error: Exception | None) -> None:
        """Raise on all ranks if ``error`` is not None on one of them; a wait for all of them otherwise."""
        self._settle([0 if error is None else -1] * self.count, error)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        [own, *_], table = self._announced(lambda: [pack(value, self.device)] * self.count)
        sizes = [row[0] for row in table]
        with self._room(sum(sizes)):
            parcels = [own if k == self.rank else self._empty(size) for k, size in enumerate(sizes)]
        for k, parcel in enumerate(parcels):
            for piece in parcel.split(PIECE):
                with _lost():
                    dist.broadcast(piece, group=self.group, group_src=k)
        self.sent += own.numel() * (self.count - 1)
        self.received += sum(sizes) - own.numel()
        return [unpack(parcel) for parcel in parcels]

    def gather_to(self, roots: Sequence[int], value: Any) -> list[Any]:
        """Every rank's value, on the ranks ``roots``; nothing on the others."""

        def parcels() -> list[Tensor]:
            parcel = pack(value, self.device)
            return [parcel if rank in roots else self._empty(0) for rank in range(self.count)]

        received = self._exchange(parcels)
        return [unpack(one) for one in received] if self.rank in roots else []

    def send_each(self, values: Mapping[int, Any]) -> list[Any]:
        """Send ``values[k]`` to rank k, and return what was sent here, in rank order."""

        def parcels() -> list[Tensor]:
            return [pack(values[k], self.device) if k in values else self._empty(0) for k in range(self.count)]

        return [unpack(parcel) for parcel in self._exchange(parcels) if parcel.numel()]

    def _exchange(self, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """All to all: of the parcels made here, number k goes to rank k; that of every rank for this one comes back."""
        parcels, table = self._announced(make)
        sizes, incoming = table[self.rank], [row[self.rank] for row in table]
        with self._room(max(map(sum, zip(*table, strict=True)))):
            received = [self._empty(size) for size in incoming]
            buffers = [self._empty(sum(min(size, PIECE) for size in side)) for side in (incoming, sizes)]
        for start in range(0, max(map(max, table)), PIECE):
            outgoing, arriving = ([one[start : start + PIECE] for one in side] for side in (parcels, received))
            self._all_to_all(arriving, outgoing, *buffers)
        self.sent += sum(sizes) - sizes[self.rank]
        self.received += sum(incoming) - incoming[self.rank]
        return received

    def _announced(self, make: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[list[int]]]:
        """A parcel for every rank, and all ranks' rows of their sizes; one that cannot make its own says so instead."""
        try:
            parcels = make()
        except Exception as error:
            self.agree(error)
            raise
        return parcels, self._settle([parcel.numel() for parcel in parcels])

    @contextlib.contextmanager
    def _room(self, most: int) -> Iterator[None]:
        """Room is made for what will arrive, ``most`` bytes on one rank: where it lacks on one, none begins to send.

        Small parcels are not worth another wait for each other.
        """
        with self.together() if most > PIECE else contextlib.nullcontext():
            yield

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _all_to_all(
        self, arriving: Sequence[Tensor], outgoing: Sequence[Tensor], inbox: Tensor, outbox: Tensor
    ) -> None:
        """One piece of every parcel, by way of two buffers that are large enough."""
        come, go = [one.numel() for one in arriving], [one.numel() for one in outgoing]
        inbox, outbox = inbox[: sum(come)], torch.cat(list(outgoing), out=outbox[: sum(go)])
        with _lost():
            dist.all_to_all_single(inbox, outbox, come, go, group=self.group)
        for target, source in zip(arriving, inbox.split(come), strict=True):
            target.copy_(source)

    def gather_numbers(self, numbers: Tensor) -> list[Tensor]:
        """A tensor of one shape and dtype from every rank, in rank order, on the device it is on."""
        given = numbers.to(self.device)
        everyone = [torch.empty_like(given) for _ in range(self.count)]
        if self.watch is not None:
            self.watch.ready()
        with _lost():
            dist.all_gather(everyone, given, group=self.group)
        return [one.to(numbers.device) for one in everyone]

    def _settle(self, row: Sequence[int], error: Exception | None = None) -> list[list[int]]:
        """Every rank's row of numbers, once it is known that none has an error, which is a row of -1."""
        self._told = error
        if error is not None and self.watch is not None:
            self.watch.claim(reason(self.rank, error))
            raise error
        table = [one.tolist() for one in self.gather_numbers(torch.tensor(row))]
        failed = [k for k, numbers in enumerate(table) if numbers[0] < 0]
        if failed:
            self._fail(failed[0], error)
        return table

    def _fail(self, first: int, error: Exception | None) -> None:
        """Tell everyone the reason of the first rank that failed, and raise."""
        reasons: list[Any] = [None] * self.count
        with _lost():
            dist.all_gather_object(reasons, None if error is None else reason(self.rank, error), group=self.group)
        raise error if error is not None else RankError(reasons[first])


def reason(rank: int, error: BaseException) -> str:
    """An error as other ranks report it."""
    if isinstance(error, RankError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"rank {rank}: {error.filename}: {error.strerror}"
    return f"rank {rank}: {str(error) or type(error).__name__}"


def check_alike(told: Sequence[Any], what: str) -> None:
    """Raise ValueError, on all ranks alike, where one was called differently."""
    odd = next((k for k, one in enumerate(told) if one != told[0]), None)
    if odd is not None:
        raise ValueError(f"rank {odd} was called with other {what} than rank 0")


def check_options(told: Sequence[Mapping[str, Any]]) -> None:
    """``check_alike`` for every option; what is told by module may lack modules that another rank has."""
    for name in dict.fromkeys(name for options in told for name in options):
        values = [options.get(name) for options in told]
        tables = [value for value in values if isinstance(value, Mapping)]
        if len(tables) < len(values):
            check_alike(values, f"options ({name})")
            continue
        seen: dict[str, tuple[int, Any]] = {}
        for rank, by_module in enumerate(tables):
            for module, mine in by_module.items():
                first, its = seen.setdefault(module, (rank, mine))
                if mine != its:
                    raise ValueError(f"rank {rank} was called with other options ({name}) than rank {first}")


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """A collective that fails has lost another rank."""
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise RankError(f"lost contact with another rank ({text[0]})") from error


def _transport(group: dist.ProcessGroup | None) -> torch.device:
    carried = dict(entry.split(":", 1) for entry in str(dist.get_backend_config(group)).split(",") if ":" in entry)
    if "cpu" in carried or not carried:
        return torch.device("cpu")
    return here(next(iter(carried)))
