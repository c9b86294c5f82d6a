"""Adapters that exceed memory, aggregated from their files module by module into an adapter directory.

While a few modules are worked on, a thread reads the next; what is finished goes to a journal beside the output at
once, and a run that was killed goes on from there (``_streaming.journal``). The output then appears by one rename.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgram import flora_na, kernels
from fedgram.flora_na import Adapter, Aggregation, ModuleReport, Report
from fedgram.flora_na.cohort import extra_roles
from fedgram.flora_na.layer import AdapterLike, as_adapter
from fedgram.flora_na.streamed import Stream, stream
from fedgram.flora_na.weights import Weights

from ._peft.files import check_kept, check_separate, size_of
from ._peft.layout import check_rank
from ._peft.lazy_tensors import LazyMapping
from ._peft.merging import check_residual
from ._streaming.extras import extra_pieces, extra_shapes
from ._streaming.identity import run_identity
from ._streaming.journal import Journal, open_journal
from ._streaming.results import EXTRA, LAYER, RESIDUAL, JournalLayers, layer_result, report_of
from .files.buffers import Trimmer
from .files.linked_file import header_room
from .files.read_behind import reading_once
from .files.staging import reserved_output
from .peft import (
    OUTPUT_FILES,
    PathLike,
    load_adapters,
    load_global,
    save_adapter,
    save_residual,
)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Streamed:
    """What a streamed aggregation leaves besides its files.

    Attributes:
        report: as ``flora_na.aggregate`` gives it; it holds no tensors.
        resumed: how many modules were taken over from a run that was interrupted.
    """

    report: Report
    resumed: int


def aggregate_directories(
    paths: Sequence[PathLike],
    output: PathLike,
    weights: Weights = None,
    *,
    residual: PathLike | None = None,
    anchor: PathLike | None = None,
    align_to: PathLike | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Streamed:
    """Aggregate the clients' adapter directories into ``output`` without holding the adapters in memory.

    Args:
        paths: one adapter directory of PEFT per client.
        output, residual, resume, progress: as in ``aggregate_to_directory``.
        weights: as in ``flora_na.aggregate``.
        anchor, align_to: directories of earlier global adapters. Unless ``missing`` allows it, the anchor may have no
            module that no client has.
        options: all others of ``flora_na.aggregate``.

    Raises:
        ValueError, OSError: as ``load_adapters``, ``load_global`` and ``aggregate_to_directory``.
    """
    adapters = load_adapters(paths)
    covered = options.get("missing", "error") == "error"
    return aggregate_to_directory(
        adapters,
        output,
        weights,
        residual=residual,
        resume=resume,
        progress=progress,
        names=[str(path) for path in paths],
        anchor=None if anchor is None else load_global(anchor, adapters, str(paths[0]), covered=covered),
        align_to=None if align_to is None else load_global(align_to, adapters, str(paths[0])),
        **options,
    )


def aggregate_to_directory(
    adapters: Sequence[AdapterLike],
    output: PathLike,
    weights: Weights = None,
    *,
    residual: PathLike | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    names: Sequence[str] | None = None,
    anchor: AdapterLike | None = None,
    align_to: AdapterLike | None = None,
    **options: Any,
) -> Streamed:
    """Aggregate adapters that are read lazily, and write the result as it goes.

    Peak memory is 1.5 times the factors of the largest module of all clients (those being worked on and those read
    ahead), and what the interpreter and torch take; ``stack`` and ``residual`` hold one module's result beside. With
    ``shared`` one solve spans all modules, which are then all in memory.

    Args:
        adapters: as ``load_adapters`` returns them.
        output: directory of the result: a new one, or one that holds nothing but an earlier output.
        weights, names, anchor, align_to, options: as in ``flora_na.aggregate``.
        residual: directory for the factored residual, or None.
        resume: whether finished modules of an interrupted run are used. They are if place, size and times of every
            file that a client, the anchor or align_to reads are the same, and so are the order of the clients, their
            names and weights, options and versions; never where one of the adapters was not loaded from files.
        progress: called with (modules done, modules in all, module name).

    Raises:
        ValueError: as ``flora_na.aggregate`` and ``save_adapter``; or an output is a directory that the clients are
            read from, or lies in the other; or a residual of DoRA.
        OSError: a file cannot be read or written, or another run is writing this output.
    """
    clients = [as_adapter(adapter) for adapter in adapters]
    named = {"anchor": anchor, "align_to": align_to, "residual": residual is not None, **options}
    if residual is not None:
        check_residual(adapter.config for adapter in clients)
    check_kept([path for path in (output, residual) if path is not None], clients)
    check_separate(output, residual)
    identity = run_identity(clients, weights, names, named)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kernels.spread_over_jobs())  # a core is busy with reading ahead
        for path in (output, residual):
            if path is not None:
                stack.enter_context(reserved_output(path, OUTPUT_FILES))
        room = header_room(_names(clients))
        journal = stack.enter_context(open_journal(Path(output), identity, resume=resume, room=room))
        run = _Run(journal, clients, weights, names, named)
        resumed = run.layers()
        with reading_once(size_of([*clients, *(x for x in (anchor, align_to) if x is not None)])):
            run.average()  # first: what is wrong with them is found before the long work
            run.solve(progress)
        if residual is not None:
            save_residual(run.adapter(RESIDUAL), residual)
        save_adapter(run.adapter(LAYER), output)
        return Streamed(run.report(), len(resumed))


def _names(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Of the tensors of the result, about: in the file they are longer by less than ``header_room`` allows for."""
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        yield from (name, name)
    yield from dict.fromkeys(name for adapter in adapters for name in adapter.extras)


class _Run:
    """One aggregation, as far as its journal has it."""

    def __init__(
        self,
        journal: Journal,
        adapters: Sequence[Adapter],
        weights: Weights,
        names: Sequence[str] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.journal, self.options = journal, dict(options)
        self.adapters, self.weights, self.names = adapters, weights, names
        self.whole = bool(self.options.pop("shared", False))
        self.stream: Stream = stream(adapters, weights, names=names, **self.options)

    def layers(self) -> list[str]:
        """Modules that are done."""
        return [key.removeprefix(LAYER) for key in self.journal.records if key.startswith(LAYER)]

    def solve(self, progress: Progress | None) -> None:
        """Aggregate the modules that are not done; a thread writes them to the journal, a portion behind."""
        done, trim = self.layers(), Trimmer()
        total = len(self.stream.cohort.modules)

        def told(written: Future[list[str]]) -> None:
            for module in written.result():
                done.append(module)
                if progress is not None:
                    progress(len(done), total, module)

        with ThreadPoolExecutor(1, thread_name_prefix="fedgram-journal") as thread:
            written: Future[list[str]] | None = None
            for part in self._parts(set(done)):
                if written is not None:
                    told(written)
                written = thread.submit(self._keep, [part])
                del part  # its tensors are the journal's to let go
                trim()
            if written is not None:
                told(written)

    def average(self) -> None:
        """Average the tensors beside the factors that are not done."""
        cohort = self.stream.cohort
        for name, shape in extra_shapes(cohort).items():
            if EXTRA + name not in self.journal.records:
                self.journal.append_pieces(EXTRA + name, {}, shape, extra_pieces(cohort, name))
        Trimmer()()  # what was freed is not to be held beside the modules

    def adapter(self, kind: str) -> Adapter:
        """The result, read from the journal when it is asked for."""
        cohort, modules = self.stream.cohort, JournalLayers(self.journal, kind, self.layers())
        extras: Mapping[str, Tensor] = {}
        if kind == LAYER:
            names = [key.removeprefix(EXTRA) for key in self.journal.records if key.startswith(EXTRA)]
            extras = LazyMapping(names, lambda name: self.journal.read(EXTRA + name))
        return Adapter(modules, extras, cohort.config, extra_roles(cohort) if extras else {})

    def report(self) -> Report:
        """The report of all modules, of those that an earlier run did too."""
        records = self.journal.records
        return self.stream.report({name: report_of(records[LAYER + name].facts) for name in self.layers()})

    def _parts(self, done: set[str]) -> Any:
        if not self.whole:
            return self.stream.parts(done)
        return iter([self._all_at_once()] if not done else [])

    def _all_at_once(self) -> Aggregation:
        bare = [Adapter(adapter.modules, {}, adapter.config) for adapter in self.adapters]
        return flora_na.aggregate(bare, self.weights, names=self.names, shared=True, **self.options)

    def _keep(self, parts: list[Aggregation]) -> list[str]:
        """Put a portion, the list's one, into the journal; the modules that are then done."""
        part, results = parts.pop(), {}
        for name, layer in part.adapter.modules.items():
            report: ModuleReport = part.report.modules[name]
            check_rank(name, layer.rank, *layer.shape)
            results[LAYER + name] = layer_result(layer, report)
        for name, layer in (part.residual.modules if part.residual is not None else {}).items():
            check_rank(f"{name} (residual)", layer.rank, *layer.shape)
            results[RESIDUAL + name] = layer_result(layer)
        self.journal.append(results)
        return list(part.adapter.modules)
