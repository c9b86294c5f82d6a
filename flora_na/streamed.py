"""Aggregation in portions: a thread reads the next modules while one or two portions are worked on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from fedgram.kernels.native_calls import join_spread, width_within

from ._in_order import InTurn, in_order
from ._read_ahead import Portion, ReadAhead
from .aggregation import Aggregation, aggregate_cohort
from .cohort import Cohort, check_anchor, make_cohort
from .inner_products import screen_cohort
from .layer import AdapterLike
from .methods import check_method
from .report import ModuleReport, Report
from .screening import Clip, Screening
from .weights import Weights

WORKERS = 2
"""Portions of lazily read adapters that are worked on at a time, at most."""


def iter_aggregate(
    adapters: Sequence[AdapterLike],
    weights: Weights = None,
    *,
    names: Sequence[str] | None = None,
    missing: str = "error",
    clip: Clip = None,
    min_cosine: float | None = None,
    **options: Any,
) -> Iterator[Aggregation]:
    """``aggregate`` (arXiv:2509.26399) for adapters larger than memory: yields the result a few modules at a time.

    Portions come in the order of the modules, each as ``aggregate`` returns it for those modules alone, with reports
    whose yardsticks are numbers. On the CPU modules are put together up to 16 MiB of factors and Grams (``aggregate``
    puts those that lie in memory together up to 64 MiB): all portions together have the bits that it returns, but
    for modules that take the general path, whose iterations end together and so may differ by their tolerance: where
    Grams leave doubt or are not formed, and ``flora-na`` with an anchor or a rank that is not the clients'. Meanwhile a
    thread reads ahead: the factors held are at most 1.5 times the largest portion (or 16 MiB), and up to 8 MiB more,
    not beyond two and a half portions. Within ``kernels.spread_over_jobs()``, two portions of lazily read factors are
    worked on at a time where that bound has room for both, each is one module, and none is known to have fewer rows or
    columns than ranks together (mappings may tell a layer's m, n and r by ``sizes(module)``). Full tensors beside the
    factors (``Adapter.extras``) are left to the caller.

    Args:
        adapters: as in ``aggregate``; their mappings should be lazy, and are read from another thread (those of
            ``anchor`` and ``align_to`` from several, one at a time).
        weights, names, missing, clip, min_cosine: as in ``aggregate``; with one of the last two the adapters are read
            once more before the first portion.
        options: as in ``aggregate``, but for ``shared``, which solves for all modules at once.

    Raises:
        ValueError: as ``aggregate``; or ``shared``.
    """
    settings = {"missing": missing, "clip": clip, "min_cosine": min_cosine, **options}
    return stream(adapters, weights, names=names, **settings).parts()


@dataclass(frozen=True, eq=False)
class Stream:
    """An aggregation about to be done in portions.

    Attributes:
        cohort: the clients, screened.
        screening: what clipping and filtering did, or None.
        options: of ``aggregate``.
    """

    cohort: Cohort
    screening: Screening | None
    options: Mapping[str, Any]
    _several: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def parts(self, skip: Collection[str] = ()) -> Iterator[Aggregation]:
        """The portions, without modules to ``skip``: those of the first portions of an earlier run."""
        left = [module for module in self.cohort.modules if module not in skip]
        before = len(self.cohort.modules) - len(left)
        with ReadAhead(self.cohort, left) as ahead:
            first = ahead.take()
            if first is None:
                return
            workers, tasks = self._workers(first), [self._task(ahead, first)]
            del first  # it is to be freed where it is worked on
            rest = map(partial(self._task, ahead), iter(ahead.take, None))
            with contextlib.closing(in_order(chain(tasks, rest), workers, join_spread)) as parts:
                for part in parts:
                    self._tell(before, part.adapter.modules)
                    before += len(part.adapter.modules)
                    yield part
                    del part

    def _tell(self, before: int, modules: Collection[str]) -> None:
        """Tell the caller's ``progress`` of modules that are done."""
        if (tell := self.options.get("progress")) is not None:
            for done, module in enumerate(modules, before + 1):
                tell(done, len(self.cohort.modules), module)

    def _workers(self, first: Portion | BaseException) -> int:
        """Portions worked on at a time: two, within ``spread_over_jobs``, where they are modules that come from files.

        The second has its factors multiplied, which takes all cores, while the first is solved, which takes one. The
        factors of both count for the bound of what is held. Several modules are solved side by side, and take more
        memory, as does a module whose ranks together exceed a side: each thread would keep what that takes. Tensors
        that are there already may be a GPU's: one stream's work.
        """
        if self.cohort.held or isinstance(first, BaseException) or len(first.cohort.modules) > 1:
            return 1
        if width_within() == 1 or any(map(self.cohort.exceeds_a_side, self.cohort.modules)):
            return 1
        return min(WORKERS, width_within())

    def _task(self, ahead: ReadAhead, read: Portion | BaseException) -> Callable[[], Aggregation]:
        return partial(self._part, ahead, [read])

    def _part(self, ahead: ReadAhead, read: list[Portion | BaseException]) -> Aggregation:
        """The aggregation of the list's one portion, which is then freed and given back, or its error.

        Portions of several modules that come among larger ones are worked on one at a time.
        """
        portion = read.pop()
        if isinstance(portion, BaseException):
            raise portion
        nbytes = portion.nbytes
        try:
            with self._several if len(portion.cohort.modules) > 1 else contextlib.nullcontext():
                return self._settled(aggregate_cohort(portion.cohort, **{**self.options, "progress": None}))
        finally:
            del portion
            ahead.give_back(nbytes)

    def report(self, modules: Mapping[str, ModuleReport]) -> Report:
        """The report of all portions together."""
        clients = dict(zip(self.cohort.names, self.cohort.weights.tolist(), strict=True))
        return Report(self.options.get("method", "als"), clients, dict(modules), self.screening)

    def _settled(self, done: Aggregation) -> Aggregation:
        """The aggregation with all yardsticks computed: its reports then hold no factors."""
        return replace(done, report=replace(done.report.settled(), screening=self.screening))


@torch.no_grad()
def stream(
    adapters: Sequence[AdapterLike],
    weights: Weights = None,
    *,
    names: Sequence[str] | None = None,
    missing: str = "error",
    clip: Clip = None,
    min_cosine: float | None = None,
    backend: str = "auto",
    shared: bool = False,
    **options: Any,
) -> Stream:
    """Check the clients, and screen them where that is asked for; see ``iter_aggregate``."""
    if shared:
        raise ValueError("shared: one solve spans all modules, so none is ready before all are read: not streamed")
    check_method(options.get("method", "als"), options.get("rank"), shared)
    cohort = make_cohort(adapters, weights, names=names, missing=missing)
    cohort, screening = screen_cohort(cohort, clip, min_cosine, backend)
    for argument in ("anchor", "align_to"):  # no portion is done before the last one's modules are known to be there
        if (adapter := check_anchor(options.get(argument), cohort, argument)) is not None:
            options[argument] = replace(adapter, modules=InTurn(adapter.modules))
    return Stream(cohort, screening, {"backend": backend, **options})
