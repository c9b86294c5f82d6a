"""The long run over damaged adapters: ``make fuzz``. Exit code 1 if a promise was broken; a summary as JSON.

A case is named by its seed and number: ``--first 4711 --cases 1`` makes it again.
"""

import argparse
import faulthandler
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from fedgram_testing.fuzzing import SECONDS, Fuzzer, Hang, Outcome

KEPT = 50
HEADROOM = 2 << 30
"""Address space beyond what is mapped after the first cases."""


def main() -> int:
    options = _options()
    faulthandler.enable()
    torch.set_num_threads(1)
    base = options.folder or Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="fedgram-fuzz-", dir=base))
    try:
        report = _run(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    return 1 if report["broken"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--every", type=int, default=20, help="every so many cases, the command line too")
    parser.add_argument("--seed", default="long")
    parser.add_argument("--folder", type=Path, help="where to work; by default in memory")
    parser.add_argument("--json", type=Path, help="also write the summary here")
    return parser.parse_args()


def _run(options: argparse.Namespace, folder: Path) -> dict:
    fuzzer = Fuzzer(folder)
    _limit_memory()
    outcomes: list[Outcome] = []
    broken: list[dict] = []
    begin = time.perf_counter()
    numbers = range(options.first, options.first + options.cases)
    for i in track(numbers, "damaged adapters", console=Console(stderr=True)):
        faulthandler.dump_traceback_later(10 * SECONDS, exit=True)  # for a loop that no signal ends
        (folder / "current").write_text(str(i))
        try:
            outcomes.append(fuzzer.case(f"{options.seed}-{i}", cli=i % options.every == 0))
        except KeyboardInterrupt:
            break  # what was done until now is told
        except (Exception, Hang) as error:
            broken.append(_told(i, error))
    faulthandler.cancel_dump_traceback_later()
    return _summary(options, outcomes, broken, time.perf_counter() - begin)


def _limit_memory() -> None:
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _told(number: int, error: BaseException) -> dict:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return {"case": number, "error": type(error).__name__, "told": str(error)[:300], "at": place}


def _summary(options: argparse.Namespace, outcomes: list[Outcome], broken: list[dict], seconds: float) -> dict:
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    hungriest = max(outcomes, key=lambda outcome: outcome.memory)
    return {
        "cases": len(outcomes) + len(broken),
        "seed": options.seed,
        "first": options.first,
        "accepted": sum(outcome.accepted for outcome in outcomes),
        "refused": sum(not outcome.accepted for outcome in outcomes),
        "command_line": {
            f"exit {code}": count
            for code, count in sorted(Counter(o.exit_code for o in outcomes if o.exit_code is not None).items())
        },
        "kinds": dict(sorted(Counter(outcome.label.split()[0] for outcome in outcomes).items())),
        "slowest": {"seconds": round(slowest.seconds, 3), "case": slowest.label},
        "most_memory": {"MiB": round(hungriest.memory / 2**20, 1), "case": hungriest.label},
        "seconds": round(seconds, 1),
        "peak_resident_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "python": platform.python_version(),
        "broken": broken[:KEPT],
        "broken_in_all": len(broken),
    }


if __name__ == "__main__":
    sys.exit(main())
