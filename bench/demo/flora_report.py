"""The FLoRA-NA demo in words: a line per aggregation, a table per scene, and what the figures do and do not show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from .flora_options import Options
from .flora_results import BASELINE, Outcome, Summary, summarise
from .flora_scenes import APART, SHARED

TITLES = {
    SHARED: "Scene 1: rounds from a shared start",
    APART: "Scene 2: one aggregation of adapters trained apart, each from its own start",
}


def outcome_line(outcome: Outcome) -> str:
    """One aggregation as it happens."""
    ladder = "  ".join(f"{method} {rho:.3f}" for method, rho in outcome.ladder.items())
    return (
        f"round {outcome.round}  {outcome.method:<8}  accuracy {outcome.accuracy:.3f}  "
        f"local {outcome.local_accuracy:.3f}  rho: {ladder}  "
        f"each sends {size(np.mean(outcome.sent_bytes))}, receives {size(outcome.received_bytes)}"
    )


def scene_table(scene: str, outcomes: Sequence[Outcome], options: Options) -> Table:
    """The methods at the end of one scene."""
    table = Table(title=_title(scene, options), title_justify="left", title_style="bold")
    table.add_column("method", no_wrap=True)
    for heading in ("accuracy", "minus fedavg", "local", "rho", "sends", "receives"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summarise(outcomes):
        table.add_row(
            row.method,
            f"{row.accuracy:.3f}",
            _gain(row),
            f"{row.local_accuracy:.3f}",
            f"{row.rho:.3f}",
            size(row.sent_bytes),
            size(row.received_bytes),
        )
    return table


def _title(scene: str, options: Options) -> str:
    many = "" if options.seeds == 1 else f", mean of {options.seeds} seeds"
    when = f", after round {options.rounds}" if scene == SHARED else ""
    return TITLES[scene] + when + many


def _gain(row: Summary) -> str:
    return "" if row.method == BASELINE else f"{row.gain:+.3f} ± {row.gain_error:.3f}"


def findings(scenes: dict[str, list[Outcome]], options: Options) -> list[str]:
    """Sentences about these figures, true of what was measured whatever it was."""
    return [*(_finding(scene, outcomes) for scene, outcomes in scenes.items()), *_caveats(options)]


def _finding(scene: str, outcomes: Sequence[Outcome]) -> str:
    rows = summarise(outcomes)
    rhos, accuracies = [row.rho for row in rows], [row.accuracy for row in rows]
    apart = [f"{row.method} by {_gain(row)}" for row in rows if row.method != BASELINE and row.differs]
    least = rows[0].least_errors
    errors = f"by more than {'two' if least == 2 else f'{least:.1f}'} standard errors"
    verdict = f"{', '.join(apart)} from fedavg {errors}" if apart else f"no method differs from fedavg {errors}"
    number = "Scene 1" if scene == SHARED else "Scene 2"
    return (
        f"{number}: rho from {min(rhos):.3f} to {max(rhos):.3f}, accuracy from "
        f"{min(accuracies):.3f} to {max(accuracies):.3f}; {'different: ' if apart else ''}{verdict}."
    )


def _caveats(options: Options) -> list[str]:
    seeds = ", ".join(map(str, options.all_seeds))
    spread = "over the test messages" if options.seeds == 1 else "over the seeds"
    return [
        "rho is the distance of what is sent back from the exact weighted sum of the clients' updates. It is not "
        "accuracy: the sum itself (rho 0) need not be the best model, and a smaller rho promises nothing.",
        "accuracy: the global model on the test messages; local: each client's own model, before "
        "aggregation, on its own label mix. The head is averaged by weight under every method.",
        f"Seed {seeds}, {options.clients} clients, {options.test_messages:,} of the 7,528 test messages, the first "
        f"{options.max_tokens} tokens of each; ± is one standard error of the paired difference {spread}. "
        "Another seed or task can order the methods otherwise: try --seeds 5.",
    ]


def size(count: float | np.floating) -> str:
    """A number of bytes as people read it."""
    return f"{count / 1000:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.2f} MB"
