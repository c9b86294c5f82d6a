"""Aggregation in portions: a thread reads the next modules while the present ones are worked on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ._read_ahead import ReadAhead
from .aggregation import Aggregation, Progress, aggregate_cohort
from .cohort import Cohort, check_anchor, make_cohort
from .inner_products import screen_cohort
from .layer import AdapterLike
from .methods import check_method
from .report import ModuleReport, Report
from .screening import Clip, Screening
from .weights import Weights


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
    not beyond two and a half portions. Full tensors beside the factors (``Adapter.extras``) are left to the caller.

    Args:
        adapters: as in ``aggregate``; their mappings should be lazy, and are read from another thread.
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

    def parts(self, skip: Collection[str] = ()) -> Iterator[Aggregation]:
        """The portions, without modules to ``skip``: those of the first portions of an earlier run."""
        left = [module for module in self.cohort.modules if module not in skip]
        before = len(self.cohort.modules) - len(left)
        with ReadAhead(self.cohort, left) as portions:
            for portion in portions:
                options = {**self.options, "progress": self._progress(before)}
                done = self._settled(aggregate_cohort(portion.cohort, **options))
                before += len(portion.cohort.modules)
                del portion  # freed before more is read
                yield done
                del done

    def _progress(self, before: int) -> Progress | None:
        """The caller's, told of all modules where a portion's are counted."""
        tell, total = self.options.get("progress"), len(self.cohort.modules)
        return None if tell is None else lambda done, _, name: tell(before + done, total, name)

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
        check_anchor(options.get(argument), cohort, argument)
    return Stream(cohort, screening, {"backend": backend, **options})
