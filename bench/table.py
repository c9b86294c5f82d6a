"""Results as a table on the terminal, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

HEADER = ("contender", "error", "time", "quartiles", "runs", "vs ours", "x floor", "reads", "memory")
CSV_FIELDS = (
    "entry", "group", "workload", "name", "kind", "right", "error", "tolerance", "median_s", "q1_s", "q3_s", "runs",
    "speed_up", "refused", "times_floor", "reads", "peak_bytes", "note",
)  # fmt: skip
STYLE = {"ours": "bold green", "torch": "", "peer": "cyan"}


def table(results: Mapping[str, Any], group: str) -> Table:
    """One group's entries, for the terminal."""
    view = Table(title=group, title_justify="left", header_style="bold", expand=False, pad_edge=False)
    for name in HEADER:
        view.add_column(name, justify="left" if name == "contender" else "right", no_wrap=name != "contender")
    for case in results["cases"]:
        if case["group"] != group:
            continue
        floor = "" if case["floor_s"] is None else f"; floor {duration(case['floor_s'])} ({case['bound']})"
        view.add_section()
        view.add_row(f"[bold]{escape(case['entry'])}[/]  {escape(case['workload'])}{floor}; error: {case['error_is']}")
        for row in case["contenders"]:
            view.add_row(*(escape(cell) for cell in cells(row)), style=STYLE[row["kind"]])
        for name, reason in case["missing"].items():
            view.add_row(f"  {escape(name)}: {escape(reason)}", style="dim")
        for target in case["targets"]:
            style = {True: "green", False: "red", None: "yellow"}[target["met"]]
            view.add_row(f"  target: {sentence(target)}", style=style)
    return view


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One contender's figures as text, in the order of ``HEADER``."""
    name = "  " + row["name"] + (f" ({row['note']})" if row["note"] else "")
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    if not row["right"]:
        error += " WRONG"
    if row["median_s"] is None:
        return (name, error, "-", "", "0", row["refused"], "", "", "")
    return (
        name,
        error,
        duration(row["median_s"]),
        f"{duration(row['q1_s'])}-{duration(row['q3_s'])}",
        str(row["runs"]),
        comparison(row),
        f"{row['times_floor']:.1f}" if row.get("times_floor") else "",
        f"{row['reads']:.1f}" if row.get("reads") else "",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f} MB",
    )


def comparison(row: Mapping[str, Any]) -> str:
    """How much longer it takes than ours, or why that is not told."""
    if row["refused"]:
        return f"no ratio: {row['refused']}"
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
        floor = "" if case["floor_s"] is None else f"; floor {duration(case['floor_s'])} ({case['bound']})"
        out.write(f"\n**{case['entry']}**, {case['workload']}{floor}; error: {case['error_is']}\n\n")
        out.write("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER) + "\n")
        for row in case["contenders"]:
            out.write("| " + " | ".join(cell.strip().replace("|", "/") for cell in cells(row)) + " |\n")
        for name, reason in case["missing"].items():
            out.write(f"\n{name}: {reason}\n")
        for target in case["targets"]:
            out.write(f"\nTarget: {sentence(target)}\n")
    return out.getvalue()


def write_files(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``bench.json``, ``bench.csv`` and ``bench.md``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "bench.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "bench.csv": "".join(csv_lines(results)),
        "bench.md": markdown(results),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def csv_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """One line per contender, with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for case in results["cases"]:
        for row in case["contenders"]:
            ratio = row["speed_up"] and row["speed_up"]["median"]
            writer.writerow({**case, **row, "speed_up": ratio})
    yield buffer.getvalue()
