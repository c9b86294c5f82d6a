"""Reports as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedgram.flora_na import Inspection, Report

from ._cli_support import one_line

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


def ladder_table(inspection: Inspection) -> Table:
    """The divergence of every method, per module and in all."""
    ladder = inspection.ladder
    shown = _worst({name: m.rho["svd"] for name, m in inspection.modules.items()})
    stem = _stem(shown)
    table = _table(_heading(stem), "rank", "‖dW‖", *(f"rho {method}" for method in ladder))
    for name in shown:
        m = inspection.modules[name]
        _row(table, name[len(stem) :], [str(m.rank), _number(m.norm), *(_rho(m.rho[method]) for method in ladder)])
    _rest(table, len(inspection.modules) - len(shown))
    norm = math.sqrt(sum(m.norm**2 for m in inspection.modules.values()))
    _total(table, f"all {len(inspection.modules)}", ["", _number(norm), *(_rho(rho) for rho in ladder.values())])
    return table


def clients_table(inspection: Inspection) -> Table:
    """Weight, norm, cosine to the mean update and outlier score of every client."""
    table = _table("client", "weight", "‖update‖", "cosine to mean", "outlier score")
    columns = (inspection.weights, inspection.client_norms, inspection.cosines, inspection.outlier_scores)
    for name, weight, norm, cosine, score in zip(inspection.names, *(c.tolist() for c in columns), strict=True):
        _row(table, name, [f"{weight:.3f}", _number(norm), f"{cosine:.3f}", f"{score:.1f}"])
    return table


def curve_table(ranks: Sequence[int], rhos: Sequence[float]) -> Table:
    """rho of the optimum, over all modules, at a few output ranks."""
    table = _table("output rank", *map(str, ranks))
    _row(table, "rho optimum", [_rho(rho) for rho in rhos])
    return table


def rank_curve(inspection: Inspection) -> tuple[list[int], list[float]]:
    """rho over all modules at the ranks 1, 2, 4, .. and the last that still errs; empty without curves.

    A module whose updates span fewer dimensions than a rank has no error at that rank.
    """
    modules = [m for m in inspection.modules.values() if m.norm > 0]
    longest = max((len(m.rank_curve) for m in modules), default=0)
    if not longest or not all(len(m.rank_curve) for m in modules):
        return [], []
    ranks = [rank for rank in (2**i for i in range(longest.bit_length())) if rank < longest] + [longest]
    energy = sum(m.norm**2 for m in modules)
    return ranks, [math.sqrt(sum(_error(m.rank_curve, r) ** 2 * m.norm**2 for m in modules) / energy) for r in ranks]


def _error(curve: Sequence[float], rank: int) -> float:
    return curve[rank - 1] if rank <= len(curve) else 0.0


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
    return math.sqrt(sum(m.norm**2 for m in report.modules.values()))


def _rho(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def _number(value: float) -> str:
    return f"{value:.4g}"
