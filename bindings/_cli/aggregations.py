"""The ways in which ``fedgram aggregate`` works: one result alone or on ranks, or a result for every client."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from fedgram import flora_na
from fedgram.flora_na import Adapter, Report
from fedgram.flora_na.report import SCHEMA_VERSION

from .._distributed.watch import Watch
from ..console import progress_bar
from ..distributed import aggregate_sharded
from ..files.staging import reserved_output
from ..peft import OUTPUT_FILES, save_adapter, save_residual
from ..streaming import aggregate_to_directory
from .clients import client_outputs
from .tables import aggregate_table, per_client_table, screening_text

Progress = Callable[[int, int, str], None]


class Findings(NamedTuple):
    """What a command has to tell: JSON-ready, and for people part by part."""

    document: dict[str, Any]
    parts: Sequence[Table | Text]


def aggregate_per_client(
    dirs: Sequence[Path],
    output: Path,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    *,
    shown: bool,
    **options: Any,
) -> Findings:
    """Aggregate, and write every client's result; each appears whole or not at all.

    Args:
        dirs: the clients' directories.
        output: the directory of the outputs.
        adapters, weights: the clients' in the same order.
        shown: whether to show a progress bar.
        options: of ``flora_na.aggregate_for_clients``.

    Returns:
        Every client's output and report, and what screening did.
    """
    outputs = client_outputs(output, dirs, adapters)
    with progress_bar("aggregating", shown=shown) as progress:
        results = flora_na.aggregate_for_clients(adapters, weights, progress=progress, **options)
    for result, path in zip(results, outputs, strict=True):
        save_adapter(result.adapter, path)
    reports = [result.report for result in results]
    document = {
        str(client): {"output": str(path), **report.to_dict()}
        for client, path, report in zip(dirs, outputs, reports, strict=True)
    }
    parts: list[Table | Text] = [per_client_table(reports, outputs)]
    if reports[0].screening is not None:  # one and the same for all
        parts.append(screening_text(reports[0].screening))
    return Findings({"schema_version": SCHEMA_VERSION, "clients": document}, parts)


def aggregate_alone(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    output: Path,
    residual: Path | None,
    *,
    resume: bool,
    progress: Progress,
    **options: Any,
) -> Findings:
    """Aggregate and write in this process, from the files module by module (``aggregate_to_directory``)."""
    streamed = aggregate_to_directory(
        adapters, output, weights, residual=residual, resume=resume, progress=progress, **options
    )
    found = _findings(streamed.report, output, residual)
    if not streamed.resumed:
        return found
    text = f"{streamed.resumed} of {len(streamed.report.modules)} modules were done by an interrupted run"
    return found._replace(parts=[Text(text), *found.parts])


def aggregate_on_ranks(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    output: Path,
    residual: Path | None,
    *,
    watch: Watch,
    progress: Progress,
    **options: Any,
) -> Findings:
    """Take this rank's part in ``aggregate_sharded``; the first rank writes, and has something to tell."""
    keep = residual is not None
    with contextlib.ExitStack() as held:
        for path in (output, residual):
            if path is not None and watch.rank == 0:
                held.enter_context(reserved_output(path, OUTPUT_FILES))
        result = aggregate_sharded(adapters, weights, residual=keep, progress=progress, watch=watch, **options)
        if watch.rank != 0:
            return Findings({}, [])
        if residual is not None and result.residual is not None:
            save_residual(result.residual, residual)
        save_adapter(result.adapter, output)
        return _findings(result.report, output, residual)


def _findings(report: Report, output: Path, residual: Path | None) -> Findings:
    parts: list[Table | Text] = [aggregate_table(report)]
    if report.screening is not None:
        parts.append(screening_text(report.screening))
    parts.append(Text(f"wrote {output}" if residual is None else f"wrote {output} and {residual}"))
    document = {"output": str(output), "residual": residual and str(residual), **report.to_dict()}
    return Findings(document, parts)
