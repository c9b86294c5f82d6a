"""The runs of the STAMP demo as figures: mean and deviation over seeds, and what each part of STAMP adds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fedgram.stamp import continual_metrics

from .stamp_run import Run

FULL = "STAMP"
# What the difference between full STAMP and another row shows.
PARTS = {
    "STAMP without temporal": "temporal matching",
    "STAMP without spatial": "spatial matching",
    "STAMP, random samples": "selected instead of random samples",
    "FedAvg + replay": "all of STAMP, over replay",
    "A-GEM": "all of STAMP, over A-GEM",
    "FedAvg": "all of STAMP, over FedAvg",
}
FIGURES = ("class_accuracy", "class_forgetting", "task_accuracy", "task_forgetting")


def figures(run: Run) -> dict[str, float]:
    """Average accuracy and average forgetting of one run, class- and task-incremental."""
    by_class, by_task = continual_metrics(run.class_incremental), continual_metrics(run.task_incremental)
    values = (
        by_class.average_accuracy,
        by_class.average_forgetting,
        by_task.average_accuracy,
        by_task.average_forgetting,
    )
    return dict(zip(FIGURES, values, strict=True))


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in the order of their first appearance."""
    names = list(dict.fromkeys(run.method for run in runs))
    return {name: [run for run in runs if run.method == name] for name in names}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def effects(runs: Sequence[Run]) -> dict[str, list[float]]:
    """What each part adds: per seed, full STAMP's class-incremental accuracy minus that of the row without it."""
    methods = by_method(runs)
    accuracy = {name: {run.seed: figures(run)["class_accuracy"] for run in own} for name, own in methods.items()}
    return {
        part: [accuracy[FULL][seed] - accuracy[name][seed] for seed in accuracy[FULL]]
        for name, part in PARTS.items()
        if FULL in accuracy and name in accuracy
    }


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Per method and figure the mean and deviation over seeds, and the effects with their seeds."""
    methods: dict[str, Any] = {}
    for name, own in by_method(runs).items():
        columns = {key: [figures(run)[key] for run in own] for key in FIGURES}
        methods[name] = {
            key: dict(zip(("mean", "deviation"), mean_and_deviation(v), strict=True)) for key, v in columns.items()
        }
    return {"methods": methods, "effects_on_class_accuracy": effects(runs)}
