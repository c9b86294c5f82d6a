"""Results as a table on the terminal, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .files import written_whole

HEADER = ("contender", "error", "time", "spread", "runs", "vs ours", "x floor", "reads", "memory")
WIDTHS = (36, 8, 8, 6, 4, 8, 7, 6, 8)
CSV_FIELDS = (
    "entry", "group", "workload", "name", "kind", "right", "error", "tolerance", "median_s", "q1_s", "q3_s", "runs",
    "speed_up", "refused", "times_floor", "reads", "peak_bytes", "note",
)  # fmt: skip
STYLE = {"ours": "bold green", "torch": "", "peer": "cyan"}
LEGEND = (
    "error: against float64; spread: half the interquartile range over the median; vs ours: times longer than ours, "
    "median of paired runs; x floor: times the floor; reads: time as reads of the input data"
)


def print_tables(results: Mapping[str, Any], console: Console) -> None:
    """All entries, group by group."""
    console.print(LEGEND, style="dim")
    group = ""
    for case in results["cases"]:
        if case["group"] != group:
            group = case["group"]
            console.rule(group, align="left")
        console.print(heading(case, "[bold]{}[/]"), highlight=False)
        console.print(_rows(case), highlight=False)
        for line in remarks(case):
            console.print(f"  {escape(line)}", style="dim", highlight=False)
        for target in case["targets"]:
            style = {True: "green", False: "red", None: "yellow"}[target["met"]]
            console.print(f"  target: {escape(sentence(target))}", style=style, highlight=False)
    for name, why in results["failed"].items():
        console.print(escape(f"{name} failed: {why}"), style="red", highlight=False)


def heading(case: Mapping[str, Any], name: str) -> str:
    """The entry's name in the style of ``name``, its workload, floor and what its error is."""
    floor = "" if case["floor_s"] is None else f"; floor {duration(case['floor_s'])} ({case['bound']})"
    return f"{name.format(case['entry'])}  {case['workload']}{floor}; error: {case['error_is']}"


def remarks(case: Mapping[str, Any]) -> list[str]:
    """Why some ratio is not told, or some contender not there."""
    refused = [f"no ratio to {row['name']}: {row['refused']}" for row in case["contenders"] if row["refused"]]
    return refused + [f"{name}: {reason}" for name, reason in case["missing"].items()]


def _rows(case: Mapping[str, Any]) -> Table:
    view = Table(box=None, pad_edge=False, padding=(0, 1), show_header=True, header_style="dim")
    for name, width in zip(HEADER, WIDTHS, strict=True):
        left = name == "contender"
        view.add_column(name, min_width=width, justify="left" if left else "right", no_wrap=not left)
    for row in case["contenders"]:
        view.add_row(*(escape(cell) for cell in cells(row)), style=STYLE[row["kind"]])
    return view


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One contender's figures as text, in the order of ``HEADER``."""
    name = row["name"] + (f" ({row['note']})" if row["note"] else "")
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    if row["median_s"] is None:
        return (name, error, "-", "", "0", comparison(row), "", "", "")
    return (
        name,
        error,
        duration(row["median_s"]),
        f"{50 * (row['q3_s'] - row['q1_s']) / row['median_s']:.0f} %",
        str(row["runs"]),
        comparison(row),
        f"{row['times_floor']:.1f}" if row.get("times_floor") else "",
        f"{row['reads']:.1f}" if row.get("reads") else "",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f} MB",
    )


def comparison(row: Mapping[str, Any]) -> str:
    """How much longer it takes than ours, or one word where that is not told."""
    if row["refused"]:
        return "failed" if row["median_s"] is None else "-" if row["right"] else "WRONG"
    if row["speed_up"] is None:
        return "1"
    ratio = row["speed_up"]["median"]
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def sentence(target: Mapping[str, Any]) -> str:
    """A target and what was reached, in words."""
    bounds = {
        "speed-up": "at least {:,.0f}x against {}",
        "memory-ratio": "at least {:,.0f}x less memory than {}",
        "seconds": "at most {:g} s",
        "reads": "at most {:g} reads of the data",
        "memory_mb": "at most {:g} MB of extra memory",
    }
    text = bounds[target["measure"]].format(target["bound"], target["against"])
    if target["met"] is None:
        return f"{text}: not measured"
    return f"{text}: {'met' if target['met'] else 'MISSED'} ({target['reached']:.3g})"


def duration(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def markdown(results: Mapping[str, Any]) -> str:
    """All entries as Markdown tables, for README files."""
    out = io.StringIO()
    for case in results["cases"]:
        out.write(f"\n{heading(case, '**{}**,')}\n\n")
        out.write("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER) + "\n")
        for row in case["contenders"]:
            out.write("| " + " | ".join(cell.replace("|", "/") for cell in cells(row)) + " |\n")
        for line in remarks(case):
            out.write(f"\n{line}\n")
        for target in case["targets"]:
            out.write(f"\nTarget: {sentence(target)}\n")
    for name, why in results["failed"].items():
        out.write(f"\n**{name}** failed: {why}\n")
    return out.getvalue()


def write_files(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``bench.json``, ``bench.csv`` and ``bench.md``, each whole or not at all; returns their paths.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "bench.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "bench.csv": csv_text(results),
        "bench.md": markdown(results),
    }
    for name, text in texts.items():
        with written_whole(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def csv_text(results: Mapping[str, Any]) -> str:
    """One line per contender, with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for case in results["cases"]:
        for row in case["contenders"]:
            ratio = row["speed_up"] and row["speed_up"]["median"]
            writer.writerow({**case, **row, "speed_up": ratio})
    return buffer.getvalue()
