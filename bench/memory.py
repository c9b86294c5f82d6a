"""Peak memory of one contender beyond its inputs: in a process of its own, by the system's high-water mark."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of ``run()`` above what was held before it, result included.

    Raises:
        OSError: on a CPU, where the system does not keep a resettable high-water mark (it does on Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # freed inputs must not serve the run for nothing
    RESET.write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure_apart(entry: str, size: str, threads: int, contender: str) -> int:
    """``peak_bytes`` of one contender on the CPU, in a fresh process.

    Raises:
        RuntimeError: the process failed; its last line is told.
    """
    command = [sys.executable, "-P", "-m", "fedgram.bench.memory", entry, size, str(threads), contender]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"the process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def _main(name: str, size: str, threads: str, contender: str) -> None:
    from .registry import entries

    torch.set_num_threads(int(threads))
    device = torch.device("cpu")
    [entry] = [e for e in entries() if e.name == name]
    for warm in entry.build("tiny", device).contenders:
        warm.run()  # code, libraries and their buffers are loaded before the mark is reset
    case = entry.build(size, device)  # type: ignore[arg-type]
    [chosen] = [c for c in case.contenders if c.name == contender]
    peak = peak_bytes(chosen.run, device)
    print(json.dumps({"peak_bytes": peak}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
