"""Everything that only a GPU can show, in one call under ten minutes: ``python -P bench/gpu.py [--out FILE]``.

Correctness of every operation on the device against float64 (types, ragged and misaligned inputs, sentinels, poisoned
outputs), bit-identical repeats, graph replay, compilation, sanitisers; then timings against measured ceilings and
peers, compile-time choices on trial, and whole workloads end to end. Each section is a process of its own and writes as
it goes: one that crashes or hangs leaves the others. Where the script is interrupted, the JSON has what was found until
then; where it is killed, a folder beside the JSON has. Needs torch and triton, no network; works on a checkout that is
not installed. ``--dry-run`` goes through the sections on tiny inputs in Triton's interpreter, without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

SCRIPT = Path(__file__).resolve()
PARTS = ("bf16", "fp32", "fp16", "fp64", "subset", "estimates")  # of the correctness checks, by type and kind
CHECKERS = ("memcheck", "racecheck", "planted")  # the last one must find a fault that was put there
CHECKS = (  # side by side: they only need to be right
    *(f"correctness {part}" for part in PARTS),
    "repeats",
    "graphs",
    "compiled",
    *(f"sanitizer {checker}" for checker in CHECKERS),
)
TIMINGS = {"timings": 5, "choices": 2, "end_to_end": 5}  # one after the other, alone on the device; shares of the time
SECTIONS = (*CHECKS, *TIMINGS)
CHECK_SHARE = 0.45  # of the time limit that the checks may take
LIMIT = 560.0  # seconds in all


class Section(NamedTuple):
    """A section that runs: its process, the rows that it has written, and what it prints."""

    process: subprocess.Popen[bytes]
    part: Path
    log: Path


def use_checkout() -> None:
    """Let ``fedgram.X`` be the folder ``X`` beside this one, where this file is run as a script."""
    if __package__ and importlib.util.find_spec("fedgram") is not None:
        return
    package = ModuleType("fedgram")
    package.__path__ = [str(SCRIPT.parents[1])]
    sys.modules["fedgram"] = package


def run_section(name: str, part: Path | None, deadline: float) -> list[dict[str, Any]]:
    """Run one section here; its rows, an error of the section itself among them."""
    import torch

    support = importlib.import_module("fedgram.bench.gpu_support")
    kind, *which = name.split()
    room = {"sanitizer": "sanitizers", "sanitized": "sanitizers"}.get(kind, kind if kind in TIMINGS else "checks")
    module = importlib.import_module(f"fedgram.bench.gpu_{room}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    journal = support.Journal(part, deadline)
    try:
        arguments = (SCRIPT,) if kind == "sanitizer" else ()
        getattr(module, kind)(journal, device, *which, *arguments)
    except Exception as error:
        journal.add(name=name, ok=False, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        if kind == "sanitized":
            raise
    return journal.rows


def start(name: str, folder: Path, seconds: float) -> Section:
    """Start a section as a process that knows how long it has, and leads a group of all that it starts itself."""
    part, log = (folder / f"{name.replace(' ', '-')}.{ending}" for ending in ("json", "log"))
    command = [sys.executable, "-P", str(SCRIPT), "--section", name, "--part", str(part), "--limit", str(seconds)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    return Section(process, part, log)


def finish(sections: Mapping[str, Section], seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each section left, one after the other as they end; those that are not done in time are ended together."""
    support = importlib.import_module("fedgram.bench.gpu_support")
    until = time.monotonic() + max(1.0, seconds)
    late: list[subprocess.Popen[bytes]] = []
    stuck: list[subprocess.Popen[bytes]] = []
    for name, (process, _, _) in sections.items():
        begin = time.monotonic()
        if process not in late:
            try:
                process.wait(max(0.0, until - begin))
            except subprocess.TimeoutExpired:  # for all that still run
                late = [s.process for s in sections.values() if s.process.poll() is None]
                stuck = support.end_groups(late)
        code: int | str | None = process.returncode
        if process in late:
            code = "out of time" + (support.NOT_ENDED if process in stuck else "")
        yield name, left_by(sections[name], code, time.monotonic() - begin)


def left_by(section: Section, code: int | str | None, waited: float) -> dict[str, Any]:
    """What a section has found, and what it printed where it did not end well."""
    rows = json.loads(section.part.read_text()) if section.part.exists() else []
    left = {} if code == 0 else {"log": section.log.read_text(errors="replace")[-8000:]}
    return {"exit": code, "waited_s": round(waited, 1), "rows": rows, **left}


def run_all(out: Path, limit: float, begin: float) -> dict[str, Any]:
    """All sections as processes, within ``limit`` seconds of ``begin``: checks side by side, then timings in turn."""
    report = new_report(dry_run=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as folder:
        seconds = limit * CHECK_SHARE
        running: dict[str, Section] = {}
        try:
            running |= {name: start(name, Path(folder), seconds) for name in CHECKS}
            for name, found in finish(running, begin + seconds + 10 - time.monotonic()):
                report["sections"][name] = found
                write(report, out)
            for i, name in enumerate(TIMINGS):
                left = limit - (time.monotonic() - begin)
                seconds = left * TIMINGS[name] / sum(list(TIMINGS.values())[i:])
                running[name] = start(name, Path(folder), seconds - 5)
                report["sections"] |= finish({name: running[name]}, seconds)
                write(report, out)
        except BaseException:
            interrupted(report, out, {name: s for name, s in running.items() if name not in report["sections"]})
            raise
    report["seconds"] = round(time.monotonic() - begin, 1)
    write(report, out)
    return report


def interrupted(report: dict[str, Any], out: Path, left: Mapping[str, Section]) -> None:
    """Write what the sections that are left have found, at once, since a kill may follow; then end them."""
    running = {name: s.process for name, s in left.items() if s.process.poll() is None}
    for name, section in left.items():
        report["sections"][name] = left_by(section, "interrupted" if name in running else section.process.poll(), 0.0)
    try:
        write(report, out)
    finally:  # what runs in groups of its own would go on
        importlib.import_module("fedgram.bench.gpu_support").end_groups(running.values())


def dry_run(out: Path) -> dict[str, Any]:
    """All sections in this process, on tiny inputs, in the interpreter."""
    begin = time.monotonic()
    report = new_report(dry_run=True)
    for name in SECTIONS:
        report["sections"][name] = {"exit": 0, "rows": run_section(name, None, float("inf"))}
        write(report, out)
    report["seconds"] = round(time.monotonic() - begin, 1)
    write(report, out)
    return report


def new_report(*, dry_run: bool) -> dict[str, Any]:
    """The frame of the JSON."""
    import torch

    environment = importlib.import_module("fedgram.bench.environment").environment
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = environment(device, torch.get_num_threads())
    return {"schema": 1, "dry_run": dry_run, "environment": where, "sections": {}}


def write(report: Mapping[str, Any], out: Path) -> None:
    """Write the JSON by rename; numbers that JSON does not have become null."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(report), indent=1, default=str, allow_nan=False) + "\n"
    with importlib.import_module("fedgram.bench.files").written_whole(out) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with NaN and Inf replaced by None, all the way down."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def summary(report: Mapping[str, Any]) -> str:
    """One line per check section and per timing, and every failure by name."""
    lines = [f"{report['environment']['device']}, torch {report['environment']['versions']['torch']}"]
    for name, section in report["sections"].items():
        rows = section["rows"]
        good, bad = (sum(row.get("ok") is value for row in rows) for value in (True, False))
        ended = "" if section["exit"] == 0 else f"; ended: {section['exit']}"
        lines.append(f"{name:22} {good} ok, {bad} failed, {len(rows) - good - bad} skipped{ended}")
        lines += [f"  FAILED {row['name']}: {failure(row)}" for row in rows if row.get("ok") is False]
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.get("skipped"):
                reasons.setdefault(row["skipped"][:100], []).append(row["name"])
        # what a timing lacks is told by name
        lines += [f"  skipped {why}{': ' + ', '.join(n) if name in TIMINGS else ''}" for why, n in reasons.items()]
        if name in TIMINGS:
            lines += [line for row in rows if (line := timing_line(row))]
    return "\n".join(lines)


def failure(row: Mapping[str, Any]) -> str:
    """Why a row failed, in a line."""
    if isinstance(row.get("error"), str):
        return row["error"].splitlines()[0][:160]
    return ", ".join(
        f"{k} {row[k]}" for k in ("error", "tolerance", "untouched", "different", "largest_gap") if k in row
    )


def timing_line(row: Mapping[str, Any]) -> str:
    """A row's time, its kernels' time, floors and peers, or nothing where it has no times."""
    mine = row["contenders"][0] if row.get("contenders") else row
    took = mine.get("median_s") or row.get("seconds")
    if not took:
        return ""
    parts = [f"  {row['name'][:34]:34} {took * 1e3:9.3f} ms"]
    for key, label in (("kernels_s", "kernels"), ("host_s", "host"), ("floor_s", "floor")):
        parts.append(f"{label} {row[key] * 1e3:8.3f}" if row.get(key) else " " * (len(label) + 9))
    if row.get("copy_share"):
        parts.append(f"{100 * row['copy_share']:4.0f} % of copy")
    told = [r for r in row.get("contenders", [])[1:] if r["speed_up"]]
    parts += [f"{r['name'][:18]} {r['speed_up']['median']:.2g}x" for r in told]
    return " ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; 0 where nothing failed."""
    begin = time.monotonic()  # before torch is imported, which takes long on a machine that has just started
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"), help="the JSON to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny inputs in Triton's interpreter, no GPU")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all")
    parser.add_argument("--section", choices=(*SECTIONS, "sanitized all", "sanitized planted"), help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    use_checkout()
    import torch

    if options.section:
        run_section(options.section, options.part, begin + options.limit)
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("fedgram: torch finds no GPU here; --dry-run goes through the script without one", file=sys.stderr)
        return 1
    report = dry_run(options.out) if options.dry_run else run_all(options.out, options.limit, begin)
    print(summary(report))
    print(f"wrote {options.out} in {report['seconds']} s")
    failed = any(s["exit"] != 0 or any(r.get("ok") is False for r in s["rows"]) for s in report["sections"].values())
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    sys.exit(main())
