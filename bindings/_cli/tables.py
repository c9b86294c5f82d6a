"""Reports as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedgram.flora_na import Inspection, Report, Screening

from ..console import one_line

SHOWN = 24


def console() -> Console:
    """Standard output; into a file or a pipe, lines are not folded at a terminal's width."""
    out = Console()
    return out if out.is_terminal else Console(width=200)


def aggregate_table(report: Report) -> Table:
    """Every module's divergence beside its two yardsticks; of many modules, those that are worst approximated."""
    shown = _worst({name: module.rho for name, module in report.modules.items()})
    stem = _stem(shown)
    table = _table(_heading(stem), "rank", "‖dW‖", f"rho {report.method}", "rho fedavg", "rho optimum", "status")
    for name in shown:
        m = report.modules[name]
        _row(
            table,
            name[len(stem) :],
            [str(m.rank), _number(m.norm), _rho(m.rho), _rho(m.rho_fedavg), _rho(m.rho_optimal), m.status],
        )
    _rest(table, len(report.modules) - len(shown))
    total = [_rho(report.rho), _rho(report.rho_fedavg), _rho(report.rho_optimal)]
    _total(table, f"all {len(report.modules)}", ["", _number(_norm(report)), *total, ""])
    return table


def per_client_table(reports: Sequence[Report], outputs: Sequence[object]) -> Table:
    """Every client's output with its ranks and divergence."""
    table = _table("written", "modules", "ranks", *(["rho " + reports[0].method] if reports else []), "rho optimum")
    for report, path in zip(reports, outputs, strict=True):
        ranks = sorted({m.rank for m in report.modules.values()})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}" if ranks else "-"
        _row(table, str(path), [str(len(report.modules)), shown, _rho(report.rho), _rho(report.rho_optimal)])
    return table


def ladder_table(inspection: Inspection) -> Table:
    """The divergence of every method, per module and in all."""
    ladder = inspection.ladder
    shown = _worst({name: m.rho["svd"] for name, m in inspection.modules.items()})
    stem = _stem(shown)
    table = _table(_heading(stem), "rank", "effective", "‖dW‖", *(f"rho {method}" for method in ladder))
    for name in shown:
        m = inspection.modules[name]
        cells = [str(m.rank), "-" if math.isnan(m.effective_rank) else f"{m.effective_rank:.1f}", _number(m.norm)]
        _row(table, name[len(stem) :], [*cells, *(_rho(m.rho[method]) for method in ladder)])
    _rest(table, len(inspection.modules) - len(shown))
    norm = math.hypot(*(m.norm for m in inspection.modules.values()))
    _total(table, f"all {len(inspection.modules)}", ["", "", _number(norm), *(_rho(rho) for rho in ladder.values())])
    return table


def clients_table(inspection: Inspection) -> Table:
    """Weight, norm, cosine to the mean update and outlier score of every client, and what screening makes of it."""
    screening = inspection.screening
    extra = () if screening is None else ("factor", "aggregated with")
    table = _table("client", "weight", "‖update‖", "cosine to mean", "outlier score", *extra)
    columns = (inspection.weights, inspection.client_norms, inspection.cosines_to_mean, inspection.outlier_scores)
    others = () if screening is None else (screening.factors, screening.weights)
    rows = zip(inspection.names, *(c.tolist() for c in (*columns, *others)), strict=True)
    for name, weight, norm, cosine, score, *screened in rows:
        cells = [f"{x:.3f}" for x in screened]
        _row(table, name, [f"{weight:.3f}", _number(norm), f"{cosine:.3f}", f"{score:.1f}", *cells])
    return table


def screening_text(screening: Screening) -> Text:
    """One line on what clipping and filtering did."""
    parts = []
    if screening.bound is not None:
        parts.append(f"clipped to norm {_number(screening.bound)}: {_names(screening.clipped)}")
    if screening.min_cosine is not None:
        parts.append(f"dropped for a cosine below {screening.min_cosine:g}: {_names(screening.dropped)}")
    if screening.doubtful:
        parts.append(f"warning: that is {screening.dropped_weight:.0%} of the weight")
    return Text("; ".join(parts))


def warning_texts(inspection: Inspection) -> list[Text]:
    """The warnings, one line each."""
    return [Text(f"warning: {one_line(warning['message'])}", style="yellow") for warning in inspection.warnings]


def _names(names: Sequence[str]) -> str:
    return ", ".join(one_line(name) for name in names) or "none"


def curve_table(ranks: Sequence[int], rhos: Sequence[float]) -> Table:
    """rho of the optimum, over all modules, at a few output ranks."""
    table = _table("output rank", *map(str, ranks))
    _row(table, "rho optimum", [_rho(rho) for rho in rhos])
    return table


def rank_curve(inspection: Inspection) -> tuple[list[int], list[float]]:
    """rho over all modules at the ranks 1, 2, 4, .. and the last; empty without curves."""
    curve = inspection.rank_curve
    ranks = [rank for rank in (2**i for i in range(len(curve).bit_length())) if rank < len(curve)]
    ranks += [len(curve)] if curve else []
    return ranks, [curve[rank - 1] for rank in ranks]


def _table(first: str | Text, *others: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table


def _row(table: Table, name: str, cells: Iterable[str]) -> None:
    table.add_row(Text(one_line(name)), *cells)


def _stem(names: Sequence[str]) -> str:
    """The leading components that all names share, with the dot."""
    parents = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, parents))


def _heading(stem: str) -> Text:
    return Text(f"module of {one_line(stem[:-1])}" if stem else "module")


def _rest(table: Table, count: int) -> None:
    if count:
        table.add_row(Text(f"({count} more, better approximated; --json has all)", style="dim"))


def _total(table: Table, name: str, cells: Iterable[str]) -> None:
    table.add_section()
    table.add_row(Text(name), *cells, style="bold")


def _worst(rhos: Mapping[str, float]) -> list[str]:
    """All modules in their own order, or of many the ones of largest rho."""
    if len(rhos) <= SHOWN:
        return list(rhos)
    return sorted(rhos, key=lambda name: -1.0 if math.isnan(rhos[name]) else rhos[name], reverse=True)[: SHOWN // 2]


def _norm(report: Report) -> float:
    return math.hypot(*(m.norm for m in report.modules.values()))


def _rho(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def _number(value: float) -> str:
    return f"{value:.4g}"
