"""The FLoRA-NA demo as one picture: accuracy and rho, round by round and for the adapters trained apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .flora_options import Options
from .flora_results import BASELINE, Outcome, by_method, summarise
from .flora_scenes import APART, SHARED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind safe (Okabe and Ito), with a marker and dash of its own each: als and svd lie on top of each other.
STYLES = {
    "fedavg": ("#E69F00", "o", "-"),
    "flora-na": ("#0072B2", "s", "-"),
    "als": ("#009E73", "^", "-"),
    "svd": ("#CC79A7", "D", (0, (2, 2))),
    "stack": ("#7F7F7F", "P", "-"),
}
INK, GRID = "#333333", "#DDDDDD"


def draw(scenes: dict[str, list[Outcome]], options: Options, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the line that installs it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; the picture needs: pip install 'fedgram[plot]'", name=error.name
        ) from error

    figure = Figure(figsize=(11, 8.6), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.12, wspace=0.04))
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, hspace=0.05)  # type: ignore[misc]
    _heading(top, "Rounds from a shared start")
    _rounds(top.subplots(1, 2), scenes[SHARED])
    _heading(bottom, f"One aggregation of {options.clients} adapters trained apart, each from its own start")
    _bars(bottom.subplots(1, 2), scenes[APART])
    figure.supxlabel(_footer(options), fontsize=9, color=INK, x=0.012, ha="left")
    figure.savefig(path)


def _footer(options: Options) -> str:
    many = options.seeds > 1
    return (
        f"MiniLM on 20 Newsgroups, {options.clients} clients, Dirichlet {options.concentration:g}, "
        f"seed{'s' * many} {', '.join(map(str, options.all_seeds))}; {options.test_messages:,} test messages. "
        f"Whiskers: ± 1 s.e. of the difference to {BASELINE} over the {'seeds' if many else 'messages'}."
    )


def _heading(part: object, text: str) -> None:
    part.suptitle(text, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)  # type: ignore[attr-defined]


def _rounds(axes: Sequence[Axes], outcomes: Sequence[Outcome]) -> None:
    _lines(axes[0], outcomes, lambda o: o.accuracy)
    _lines(axes[1], outcomes, lambda o: o.rho)
    _dress(axes[0], "accuracy of the global model")
    _dress(axes[1], "rho of each method in its own rounds")
    axes[0].legend(frameon=False, loc="lower right", fontsize=9.5)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.set_xlabel("round", color=INK)
        axis.set_xticks(sorted({o.round for o in outcomes}))


def _lines(axis: Axes, outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> None:
    for method, own in by_method(outcomes).items():
        color, marker, dash = STYLES[method]
        rounds = sorted({o.round for o in own})
        values = [[value(o) for o in own if o.round == r] for r in rounds]
        if len(values[0]) > 1:
            axis.fill_between(rounds, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12, lw=0)
        means = [float(np.mean(v)) for v in values]
        filled = "white" if method == "svd" else color
        axis.plot(rounds, means, color=color, marker=marker, ls=dash, lw=2, ms=6.5, mfc=filled, label=method)


def _bars(axes: Sequence[Axes], outcomes: Sequence[Outcome]) -> None:
    rows = summarise(outcomes)
    colors = [STYLES[row.method][0] for row in rows]
    tops = [row.accuracy + row.gain_error for row in rows]
    axes[0].bar(range(len(rows)), [row.accuracy for row in rows], color=colors, width=0.62)
    axes[1].bar(range(len(rows)), [row.rho for row in rows], color=colors, width=0.62)
    for x, row in enumerate(rows):
        if row.method != BASELINE:
            axes[0].errorbar(x, row.accuracy, yerr=row.gain_error, capsize=4, color=INK, lw=1.3)
        _label(axes[0], x, tops[x], f"{row.accuracy:.3f}")
        _label(axes[1], x, row.rho, f"{row.rho:.3f}")
    axes[0].set_ylim(0, max(tops) * 1.14 or 1)
    axes[1].set_ylim(0, max(row.rho for row in rows) * 1.14 or 1)
    _dress(axes[0], "accuracy of the global model")
    _dress(axes[1], "rho (0: the exact weighted sum of the clients' updates)")
    axes[0].set_xticks(range(len(rows)), [f"{row.method}\n" for row in rows])
    axes[1].set_xticks(range(len(rows)), [f"{row.method}\n{row.received_bytes / 1000:,.0f} kB down" for row in rows])


def _label(axis: Axes, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9.5, color=INK)


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, color=INK)
    axis.grid(axis="y", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(INK)
