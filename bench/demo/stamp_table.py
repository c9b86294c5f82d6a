"""The STAMP demo on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from .stamp_run import Run
from .stamp_summary import FIGURES, by_method, effects, figures, mean_and_deviation


def table(runs: Sequence[Run], title: str) -> Table:
    """One row per method: accuracies and forgetting in percent, mean and deviation over the seeds, and the costs."""
    seeds = len({run.seed for run in runs})
    shown = Table(
        title=f"{escape(title)}\n5 tasks of 2 classes, after the last task; percent, {seeds} seed{'s' * (seeds > 1)}",
        title_justify="left",
    )
    shown.add_column("method")
    for heading in ("accuracy\nclass-inc.", "forgetting\nclass-inc.", "accuracy\ntask-inc.", "forgetting\ntask-inc."):
        shown.add_column(heading, justify="right")
    for heading in ("memory\nKB/client", "upload\nMB/client", "gradients\n1000 images", "time\ns/run"):
        shown.add_column(heading, justify="right")
    for name, own in by_method(runs).items():
        columns = [[100 * figures(run)[key] for run in own] for key in FIGURES]
        shown.add_row(name, *map(_with_deviation, columns), *_costs(own))
    return shown


def effects_lines(runs: Sequence[Run]) -> list[str]:
    """What each part of STAMP adds to the class-incremental accuracy, as it is, seed by seed."""
    lines = ["What it adds to the class-incremental accuracy, in points, same seed against same seed:"]
    for part, differences in effects(runs).items():
        mean, _ = mean_and_deviation(differences)
        seeds = " ".join(f"{100 * d:+.1f}" for d in differences)
        lines.append(f"  {part}: {100 * mean:+.1f} ({seeds}: {verdict(differences)})")
    if len(lines) == 1:
        return []
    count = len({run.seed for run in runs})
    chance = f"  (Without any effect, {count} seeds agree in 1 of {2 ** (count - 1)} cases.)"
    return [*lines, chance] if count > 1 else lines


def verdict(differences: Sequence[float]) -> str:
    """In words: whether the seeds agree."""
    if len(differences) < 2:
        return "one seed shows nothing"
    if all(d > 0 for d in differences):
        return "better with every seed"
    if all(d < 0 for d in differences):
        return "worse with every seed"
    return "the seeds disagree: no effect shown"


def notes(runs: Sequence[Run]) -> list[str]:
    """Where the methods are not on equal terms."""
    gap = max(run.worst_gap for run in runs)
    return [
        "All methods take the same steps on the same batches from the same first model.",
        "Those with a memory keep as many bytes and compute gradients of as many images; plain FedAvg keeps none.",
        "Choosing prototypes and solving the matchings cost time, which the last column holds, but no gradients.",
        f"Largest gap of the server's matchings, relative: {gap:.0e}.",
    ]


def _with_deviation(values: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"


def _costs(own: Sequence[Run]) -> list[str]:
    first = own[0]
    return [
        f"{first.memory_bytes / 1e3:.0f}",
        f"{first.upload_bytes / 1e6:.1f}",
        f"{first.sample_gradients / 1e3:.0f}",
        f"{mean_and_deviation([run.seconds for run in own])[0]:.1f}",
    ]
