"""``fedgram bench``: every entry checked and timed, a table of ratios, files and pictures."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fedgram.bindings.console import fail, one_line_errors

from .ceilings import Ceilings, measure_ceilings
from .environment import environment
from .files import check_folder
from .memory import RESET, measure_apart
from .registry import Entry, Size, entries
from .run_case import reason, run_case
from .sweeps import SWEEPS
from .table import duration, print_tables, write_files

SCHEMA = 1
# Seconds after which slow contenders, and curves, are left out, on a busy machine.
SLOW_UNTIL, SWEEPS_UNTIL = 360.0, 540.0
BUSY = 0.6  # load per core above which timings are doubtful
WIDTH = 110  # of a line of the table; narrower terminals wrap it
CEILING_SCALE = {"full": 1.0, "quick": 0.5, "tiny": 0.002}
Progress = Callable[[str], None]


def run_benchmarks(
    chosen: Iterable[Entry],
    size: Size,
    device: torch.device,
    *,
    threads: int,
    sweeps: bool = True,
    memory: bool = True,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Run entries and sweeps; returns what ``bench.json`` holds, with the reason for each that ``failed``."""
    start = time.perf_counter()
    torch.set_num_threads(threads)
    where = environment(device, threads)  # first: what is measured raises the load
    progress("ceilings")
    ceilings = measure_ceilings(device, scale=CEILING_SCALE[size], seconds=0.01 if size == "tiny" else 1.0)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "size": size,
        "environment": where,
        "ceilings": ceilings.to_dict(),
        "cases": [],
        "sweeps": [],
        "failed": {},
    }
    for entry in chosen:
        progress(entry.name)
        no_slow = "--quick" if size == "quick" else "out of time" if time.perf_counter() - start > SLOW_UNTIL else ""
        with _told(results["failed"], entry.name):
            results["cases"].append(_run_entry(entry, size, device, ceilings, threads, memory, no_slow))
    for sweep in SWEEPS if sweeps else ():
        name = sweep.__name__.replace("_", " ")
        progress(name)
        if time.perf_counter() - start < SWEEPS_UNTIL:
            with _told(results["failed"], name):
                results["sweeps"].append(sweep(size, device).to_dict())
    results["seconds"] = time.perf_counter() - start
    return results


@contextmanager
def _told(failed: dict[str, str], name: str) -> Iterator[None]:
    """What fails is told under its name; what was measured before, and comes after, is not lost."""
    try:
        yield
    except Exception as error:
        failed[name] = reason(error)


def _run_entry(
    entry: Entry, size: Size, device: torch.device, ceilings: Ceilings, threads: int, memory: bool, no_slow: str
) -> dict[str, Any]:
    start = time.perf_counter()
    # in a fresh process, where the system can tell the peak
    apart = memory and device.type == "cpu" and RESET.exists()
    measure = partial(measure_apart, entry.name, size, threads) if apart else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' deprecations would tear the progress line
        figures = run_case(entry.build(size, device), size, device, ceilings, measure, no_slow=no_slow)
    return {"entry": entry.name, "group": entry.group, **figures, "took_s": round(time.perf_counter() - start, 2)}


def bench_command(
    only: Annotated[list[str] | None, typer.Option(help="Entries by (part of a) name or by group; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes, no slow peers, about a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.csv, bench.md and pictures.")] = Path(
        "out/bench"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads of torch; 0 takes what torch takes.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print bench.json instead of tables.")] = False,
    sweeps: Annotated[bool, typer.Option(help="Also measure curves over clients, length and tasks.")] = True,
    plots: Annotated[bool, typer.Option(help="Draw pictures (needs matplotlib).")] = True,
    list_entries: Annotated[bool, typer.Option("--list", help="List the entries and stop.")] = False,
) -> None:
    """Check and time every operation against its peers on this machine."""
    console, notes = Console(), Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    with one_line_errors():
        where = _device(device)
        chosen = entries(only or (), gpu=where.type == "cuda")
    if list_entries:
        for entry in chosen:
            print(f"{entry.group}  {entry.name}")
        return
    with one_line_errors():
        check_folder(out)
    size: Size = "quick" if quick else "full"
    with notes.status("") as status:
        results = run_benchmarks(
            chosen, size, where, threads=threads or torch.get_num_threads(), sweeps=sweeps and not only,
            progress=lambda name: status.update(f"measuring {name}"),
        )  # fmt: skip
    if as_json:
        print(json.dumps(results, indent=1), flush=True)
    else:
        _show(results, console)
    with one_line_errors():
        paths = write_files(results, out)
        if plots:
            paths += _draw(results, out, notes)
    notes.print(f"wrote {', '.join(str(p) for p in paths)}")
    if results["failed"]:
        fail(f"failed: {', '.join(results['failed'])}")


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch finds no GPU here")
    return torch.device(name)


def _draw(results: dict[str, Any], out: Path, notes: Console) -> list[Path]:
    from .plots import draw

    try:
        return draw(results, out)
    except ImportError as error:
        notes.print(str(error))
        return []


def _show(results: dict[str, Any], console: Console) -> None:
    where, ceilings = results["environment"], results["ceilings"]
    rates = ", ".join(f"{name} {rate / 1e9:.3g} Gflop/s" for name, rate in ceilings["flops"].items())
    console.print(
        f"{where['device']}, {where['threads']} threads, torch {where['versions']['torch']}; "
        f"measured: read {ceilings['read'] / 1e9:.3g} GB/s, copy {ceilings['copy'] / 1e9:.3g} GB/s, {rates}"
    )
    if where["load"] and where["load"][0] > BUSY * where["cores"]:
        console.print(
            f"the machine was busy when this began (load {where['load'][0]}): timings are doubtful", style="red"
        )
    print_tables(results, console)
    for sweep in results["sweeps"]:
        slopes = {name: slope for name, slope in sweep["slopes"].items() if sweep["y"] == "seconds"}
        if slopes:
            told = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
            console.print(f"{sweep['name']}: growth exponents {told}")
    judged = [t["met"] is True for case in results["cases"] for t in case["targets"]]
    judged += [ok for sweep in results["sweeps"] for ok in sweep["linear"].values()]
    told = f"{sum(judged)} of {len(judged)} targets met, " if judged else ""
    console.print(f"{told}in {duration(results['seconds'])}")
