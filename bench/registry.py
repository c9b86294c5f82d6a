"""What is measured: entries, each with workload, costs, contenders, and the check that every contender must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .ceilings import Cost

Kind = Literal["ours", "torch", "peer"]
Size = Literal["full", "quick", "tiny"]
GROUPS = ("flora_na", "stamp", "kernels")


class MissingPeerError(RuntimeError):
    """A contender cannot run here: its name, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def same(result: Any) -> Any:
    """The result as it is."""
    return result


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: as tables show it.
        run: does the work and returns its result; may be called any number of times.
        kind: ``ours``, ``torch`` (what one would write in PyTorch) or ``peer`` (another package, a paper's loop).
        tolerance: the largest error that counts as right, derived where the entry is defined.
        output: turns the result into what the case's ``error`` looks at; not timed.
        note: what a reader must know.
        memory: measure its peak memory as well (in a process of its own).
        slow: do not run under ``--quick``.
    """

    name: str
    run: Callable[[], Any]
    kind: Kind
    tolerance: float
    output: Callable[[Any], Any] = same
    note: str = ""
    memory: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Target:
    """A figure that the project is held to.

    Attributes:
        measure: ``speed-up`` (over ``against``, at least), ``seconds``, ``reads`` or ``memory_mb`` (at most), or
            ``memory-ratio`` (``against`` needs at least so many times more).
        value: the bound.
        against: the other contender's name.
    """

    measure: Literal["speed-up", "seconds", "reads", "memory_mb", "memory-ratio"]
    value: float
    against: str = ""


@dataclass(frozen=True)
class Case:
    """An entry at one size, ready to run.

    Attributes:
        workload: sizes in words.
        contenders: ours first.
        error: deviation of an output from float64 (or from the certified optimum); NaN and Inf count as wrong.
        measures: what ``error`` is, in words.
        cost: what the work cannot do without; None where arithmetic and traffic say nothing (small solves).
        targets: figures to be held to, at full size.
        missing: contenders that cannot run here, with the reason.
    """

    workload: str
    contenders: Sequence[Contender]
    error: Callable[[Any], float]
    measures: str
    cost: Cost | None = None
    targets: Sequence[Target] = ()
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> Contender:
        """The contender that the others are compared with."""
        return self.contenders[0]


Build = Callable[[Size, torch.device], Case]


@dataclass(frozen=True)
class Entry:
    """A named operation and the way to build its case."""

    name: str
    group: str
    build: Build
    gpu: bool


ENTRIES: dict[str, Entry] = {}


def entry(name: str, group: str, *, gpu: bool = False) -> Callable[[Build], Build]:
    """Register a case's builder under a name; ``gpu`` says that it is worth measuring on one too."""

    def register(build: Build) -> Build:
        if name in ENTRIES or group not in GROUPS:
            raise ValueError(f"entry {name!r}: registered twice, or in an unknown group {group!r}")
        ENTRIES[name] = Entry(name, group, build, gpu)
        return build

    return register


def entries(only: Iterable[str] = (), *, gpu: bool = False) -> list[Entry]:
    """All entries, or those whose name or group contains one of the given words.

    Raises:
        ValueError: a word that matches nothing.
    """
    from . import entries_flora_na, entries_kernels, entries_solvers, entries_stamp  # noqa: F401  they register themselves

    chosen = [e for e in ENTRIES.values() if e.gpu or not gpu]
    words = list(only)
    for word in words:
        if not any(word in e.name or word == e.group for e in chosen):
            raise ValueError(f"only: no entry matches {word!r}; there are {', '.join(e.name for e in chosen)}")
    found = [e for e in chosen if not words or any(w in e.name or w == e.group for w in words)]
    return sorted(found, key=lambda e: GROUPS.index(e.group))


def with_peers(ours: Sequence[Contender], *peers: Callable[[], Contender]) -> tuple[list[Contender], dict[str, str]]:
    """Contenders with those peers that can be had, and the reasons for those that cannot."""
    found, missing = list(ours), {}
    for make in peers:
        try:
            found.append(make())
        except MissingPeerError as error:
            missing[error.name] = error.reason
        except Exception as error:  # whatever another package raises: the table tells it
            missing[make.__name__] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, missing
