"""The server: Flower's loop with a strategy of fedgram."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedgram.bindings.flower import FloraNA, Stamp, to_arrays, to_state_dict

from .task import Task, load_task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds, judge the global adapter after each, and leave the figures behind."""
    run = context.run_config
    strategy = make_strategy(run)
    task = load_task("test", *(int(run[key]) for key in ("test-messages", "rank", "max-tokens", "seed")))
    result = strategy.start(
        grid=grid,
        initial_arrays=to_arrays(task.adapter()),
        num_rounds=int(run["num-server-rounds"]),
        evaluate_fn=_judge(task, str(run["output"])),
    )
    if run["output"]:
        figures = {
            "train": result.train_metrics_clientapp,
            "own": result.evaluate_metrics_clientapp,
            "global": result.evaluate_metrics_serverapp,
            "reports": getattr(strategy, "reports", {}),
        }
        path = Path(str(run["output"])) / "figures.json"
        path.write_text(json.dumps(figures, default=dict, indent=2) + "\n", encoding="utf-8")


def make_strategy(run: Any) -> FedAvg:
    """The strategy that the run's configuration names.

    Raises:
        ValueError: there is none of that name.
    """
    fedavg = {"fraction_train": float(run["fraction-train"])}
    if run["strategy"] == "flora-na":
        return FloraNA(method=str(run["method"]), align_previous=bool(run["align-previous"]), **fedavg)
    if run["strategy"] == "stamp":
        return Stamp(c=float(run["c"]), **fedavg)
    if run["strategy"] == "fedavg":
        return FedAvg(**fedavg)
    raise ValueError(f"strategy: expected flora-na, stamp or fedavg, got {run['strategy']!r}")


def _judge(task: Task, output: str) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Accuracy on the test messages, with the adapter saved on the way."""

    def judge(round_: int, arrays: ArrayRecord) -> MetricRecord:
        task.load(to_state_dict(arrays))
        if output:
            task.model.save_pretrained(str(Path(output) / f"round-{round_}" / "global"))
        return MetricRecord({"accuracy": task.accuracy(np.arange(len(task.messages.texts)))})

    return judge
