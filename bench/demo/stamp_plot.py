"""Pictures of the STAMP demo: accuracy matrices, and accuracy over the rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; pictures need: pip install 'fedgram[plot]'", name=error.name) from error

from .stamp_run import Run
from .stamp_summary import by_method


def save_matrices(runs: Sequence[Run], path: Path) -> None:
    """Heat maps, one per method: class-incremental accuracy of task i after task t, mean over the seeds."""
    methods = by_method(runs)
    columns = min(4, len(methods))
    lines = -(-len(methods) // columns)
    figure = Figure(figsize=(3 * columns + 1.2, 3.3 * lines))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    figure.subplots_adjust(left=0.06, right=0.9, bottom=0.15 / lines, top=1 - 0.12 / lines, hspace=0.35, wspace=0.3)
    for ax in axes[len(methods) :]:
        ax.set_axis_off()
    for ax, (name, own) in zip(axes, methods.items(), strict=False):
        a = np.mean([run.class_incremental for run in own], axis=0)
        image = ax.imshow(a, vmin=0, vmax=1, cmap="viridis")
        for t, i in zip(*np.tril_indices(len(a)), strict=True):
            ax.text(i, t, f"{100 * a[t, i]:.0f}", ha="center", va="center", color="white" if a[t, i] < 0.6 else "black")
        ticks = range(len(a))
        ax.set(title=name, xlabel="task", ylabel="after task", xticks=ticks, yticks=ticks)
        ax.set_xticklabels([t + 1 for t in ticks])
        ax.set_yticklabels([t + 1 for t in ticks])
    bar = figure.add_axes((0.92, 0.15, 0.015, 0.7))
    figure.colorbar(image, cax=bar, label="accuracy among all classes seen")
    figure.savefig(path, format="png", dpi=110)


def save_curves(runs: Sequence[Run], path: Path) -> None:
    """Mean class-incremental accuracy over the tasks seen so far, after every round, with the seeds' deviation."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    for name, own in by_method(runs).items():
        curves = np.array([run.curve for run in own])
        rounds, mean = np.arange(1, curves.shape[1] + 1), curves.mean(0)
        deviation = curves.std(0, ddof=min(1, len(curves) - 1))
        (line,) = ax.plot(rounds, mean, label=name, linewidth=2.5 if name == "STAMP" else 1.3)
        ax.fill_between(rounds, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.12, linewidth=0)
    per_task = len(runs[0].curve) // len(runs[0].class_incremental)
    for t in range(1, len(runs[0].class_incremental)):
        ax.axvline(t * per_task + 0.5, color="grey", linewidth=0.6, linestyle=":")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="round (dotted: a new task)", ylabel="accuracy over the tasks seen so far", ylim=(0, 1.02))
    ax.legend(loc="lower left", fontsize=8, ncols=2)
    figure.savefig(path, format="png", dpi=110)
