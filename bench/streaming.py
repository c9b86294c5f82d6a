"""Streaming, measured: adapters written for the purpose, aggregated from disk, killed and resumed, then removed.

Every figure comes from a process of its own that finds none of the files in the page cache. Peak memory is the
process's whole resident set (interpreter and torch included); its anonymous and its file-mapped part are also told.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; pip install 'fedgram[cli]'", name=error.name) from error

from fedgram.bindings.console import describe, fail, one_line, one_line_errors
from fedgram.flora_na import METHODS

from .environment import environment
from .files import check_folder
from .streaming_clients import DTYPES, Written, drop_cached, write_clients

SCHEMA = 1
MODELS = {
    "7b": {"q_proj": (4096, 4096), "up_proj": (11008, 4096)},
    "405b": {"q_proj": (16384, 16384), "up_proj": (53248, 16384)},
}
"""Shapes (m, n) of the modules of a layer, by the size of the language model that has them."""
READERS = ("read plainly", "read tensors", "read with safetensors")
PEAK_MODULES, PEAK_BYTES, SHARE = 1.5, 300e6, 0.5
SAMPLE_SECONDS = 0.02


def measure(root: Path, task: str, method: str = "", *, kill_at: float | None = None) -> dict[str, Any]:
    """Run one task in a fresh process on cold files, sampling its memory; ``kill_at`` is a share of the modules.

    Raises:
        RuntimeError: the process failed; its last line is told.
    """
    for path in root.glob("client-*/*.safetensors"):
        drop_cached(path)
    command = [sys.executable, "-P", "-m", "fedgram.bench._streaming_run", task, method, str(root)]
    facts: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            with sampled(child.pid) as peaks:
                for line in child.stdout:
                    facts |= json.loads(line)
                    if kill_at is not None and facts.get("done", 0) >= kill_at * facts.get("of", 1e9):
                        return {"killed_after": facts["done"], "of": facts["of"]}
            errors = child.stderr.read().strip().splitlines()
            child.wait()
        finally:
            child.kill()  # SIGKILL: on purpose, or because this process is told to stop
    if child.returncode:
        raise RuntimeError(f"{task} {method}: {errors[-1] if errors else f'ended with {child.returncode}'}")
    facts |= {"peak_anonymous_bytes": peaks["RssAnon"], "peak_file_bytes": peaks["RssFile"]}
    return {key: value for key, value in facts.items() if key not in ("done", "of")}


@contextlib.contextmanager
def sampled(pid: int) -> Iterator[dict[str, int]]:
    """The largest anonymous and file-mapped resident memory of a process, as seen at intervals while the block runs."""
    peaks = {"RssAnon": 0, "RssFile": 0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            _sample(pid, peaks)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _sample(pid: int, peaks: dict[str, int]) -> None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name = line.split(":")[0]
        if name in peaks:
            peaks[name] = max(peaks[name], int(line.split()[1]) * 1024)


def _faster(before: Mapping[str, dict[str, Any]], root: Path) -> dict[str, dict[str, Any]]:
    """Every way of only reading once more: of both times the faster, since a system's first pages can be slow ones."""
    again = {task: measure(root, task) for task in READERS}
    return {task: min(before.get(task, read), read, key=lambda one: one["seconds"]) for task, read in again.items()}


def run(root: Path, written: Written, methods: list[str]) -> dict[str, Any]:
    """Write the adapters under ``root``, read and aggregate them, kill and resume; JSON-ready.

    Raises:
        OSError: there is not enough room.
        RuntimeError: a process failed.
    """
    nbytes = written.nbytes
    if (free := shutil.disk_usage(root).free) < 1.3 * nbytes:
        raise OSError(
            f"{root}: {nbytes / 1e9:.1f} GB of adapters need {1.3 * nbytes / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        )
    write_clients(root, written)
    module = max(map(written.module_bytes, written.shapes.values()))
    bound = PEAK_MODULES * module + PEAK_BYTES
    reads = _faster({}, root)
    results = {}
    for method in methods:
        results[method] = measure(root, "aggregate", method)
        shutil.rmtree(root / "global")
    reads = _faster(reads, root)
    best = min(read["seconds"] for read in reads.values())
    for found in results.values():
        share = best / found["seconds"]
        found |= {"bytes_per_second": nbytes / found["seconds"], "share_of_reading": share}
        found |= {"share_of": {task: read["seconds"] / found["seconds"] for task, read in reads.items()}}
        found |= {"peak_met": (found["peak_bytes"] or 0) <= bound, "share_met": share >= SHARE}
    killed = measure(root, "aggregate", methods[0], kill_at=0.5)
    resumed = measure(root, "aggregate", methods[0])
    return {
        "schema": SCHEMA,
        "environment": environment(torch.device("cpu"), torch.get_num_threads()),
        "clients": written.clients,
        "rank": written.rank,
        "dtype": written.dtype,
        "layers": written.layers,
        "shapes": {name: list(shape) for name, shape in written.shapes.items()},
        "bytes": nbytes,
        "module_bytes": module,
        "peak_bound_bytes": bound,
        "reading": {task: {**read, "bytes_per_second": nbytes / read["seconds"]} for task, read in reads.items()},
        "methods": results,
        "resume": {**killed, "resumed": resumed["resumed"], "seconds": resumed["seconds"]},
    }


def streaming_command(
    gigabytes: Annotated[float, typer.Option(min=0.001, help="Size of all adapters together, in 10^9 bytes.")] = 8.0,
    clients: Annotated[int, typer.Option(min=1, help="How many adapters share it.")] = 20,
    rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = 16,
    model: Annotated[str, typer.Option(help=f"Whose modules' shapes: {' or '.join(MODELS)}.")] = "7b",
    dtype: Annotated[str, typer.Option(help=f"Of the factors: {' or '.join(DTYPES)}.")] = "float32",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "fedavg,flora-na,als,svd",
    folder: Annotated[Path, typer.Option(help="Where the adapters are written, in a folder of their own.")] = Path(
        "out"
    ),
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Aggregate adapters larger than a budget of memory from disk; needs Linux. The adapters are removed at the end."""
    choices: list[tuple[str, str, Collection[str]]] = [("--model", model, MODELS), ("--dtype", dtype, DTYPES)]
    choices += [("--methods", method, METHODS) for method in methods.split(",")]
    for option, given, known in choices:
        if given not in known:
            fail(f"{option}: expected one of {', '.join(known)}, got {given!r}")
    written = Written.of_size(gigabytes, clients, rank, MODELS[model], dtype)
    with one_line_errors():
        if out is not None:
            check_folder(out.parent)
            if out.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(out))
        check_folder(folder)
        root = Path(tempfile.mkdtemp(prefix="streaming-", dir=folder))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the adapters are removed then too
    try:
        results = run(root, written, methods.split(","))
    except (OSError, RuntimeError) as error:
        print(f"fedgram: {one_line(describe(error))}", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        shutil.rmtree(root, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    console = Console()
    console.width = max(console.width, 110)
    show(results, console)
    if out is not None:
        with one_line_errors():
            out.write_text(json.dumps(results, indent=1) + "\n")


def show(results: dict[str, Any], console: Console) -> None:
    """The figures as a table, and what was promised."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(("task", "seconds", "GB/s", "of reading", "CPU s", "peak", "anonymous", "files")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for task, row in (results["reading"] | results["methods"]).items():
        share = f"{row['share_of_reading']:.2f}" if "share_of_reading" in row else ""
        table.add_row(
            task, f"{row['seconds']:.1f}", f"{row['bytes_per_second'] / 1e9:.2f}", share, f"{row['cpu_seconds']:.1f}",
            *(f"{(row[key] or 0) / 1e6:.0f} MB" for key in ("peak_bytes", "peak_anonymous_bytes", "peak_file_bytes")),
        )  # fmt: skip
    size = f"{results['bytes'] / 1e9:.2f} GB, {results['clients']} clients, rank {results['rank']}, {results['dtype']}"
    console.print(f"{size}, {len(results['shapes']) * results['layers']} modules", highlight=False)
    console.print(table)
    for method, row in results["methods"].items():
        peak = f"peak {'met' if row['peak_met'] else 'MISSED'} ({row['peak_bytes'] / results['peak_bound_bytes']:.2f})"
        shares = (f"{task} {_half(share)}" for task, share in row["share_of"].items())
        console.print(f"{method}: {peak}; half of: {', '.join(shares)}", highlight=False, soft_wrap=True)
    resume = results["resume"]
    console.print(
        f"killed after {resume['killed_after']} of {resume['of']} modules; resumed with {resume['resumed']} done, "
        f"{resume['seconds']:.1f} s",
        highlight=False,
    )


def _half(share: float) -> str:
    return f"{'met' if share >= SHARE else 'MISSED'} ({share:.2f})"


if __name__ == "__main__":
    typer.run(streaming_command)
