"""One streamed aggregation, or one way of only reading the same files, in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BUFFER = 8 << 20
Work = Callable[[], dict[str, Any]]


def main(task: str, method: str, root: str) -> None:
    """Do ``task`` on the directories ``client-*`` under ``root``; one line of JSON after every module and at the end.

    What is imported is imported before the clock starts.
    """
    work = TASKS[task](sorted(Path(root).glob("client-*")), method)
    start, ticks = time.perf_counter(), time.process_time()
    found = work()
    facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - ticks, **found}
    print(json.dumps({**facts, "read_bytes": _from_storage(), "peak_bytes": _peak()}), flush=True)


def read_plainly(dirs: Sequence[Path], _: str) -> Work:
    """Every file from one end to the other into one buffer: nothing that uses the bytes can be faster."""

    def work() -> dict[str, Any]:
        buffer = memoryview(bytearray(BUFFER))
        for directory in dirs:
            with open(directory / "adapter_model.safetensors", "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return {}

    return work


def read_tensors(dirs: Sequence[Path], _: str) -> Work:
    """Every tensor as the aggregation reads it, module by module over all clients, and dropped."""
    from fedgram.bindings.files.read_behind import reading_once
    from fedgram.bindings.peft import load_adapters

    def work() -> dict[str, Any]:
        adapters = load_adapters(dirs)
        with reading_once(sum(path.stat().st_size for folder in dirs for path in folder.iterdir())):
            for module in adapters[0].modules:
                for adapter in adapters:
                    adapter.modules[module]
        return {}

    return work


def read_safetensors(dirs: Sequence[Path], _: str) -> Work:
    """Every tensor with the format's own library, which maps the file, and copied."""
    import torch  # noqa: F401 - what it would import when the clock runs
    from safetensors import safe_open

    def work() -> dict[str, Any]:
        for directory in dirs:
            with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    file.get_tensor(key).clone()
        return {}

    return work


def aggregate(dirs: Sequence[Path], method: str) -> Work:
    """Aggregate beside the clients, and say after every module how many are done."""
    from fedgram.bindings.streaming import aggregate_directories

    def progress(done: int, total: int, module: str) -> None:
        print(json.dumps({"done": done, "of": total}), flush=True)

    def work() -> dict[str, Any]:
        found = aggregate_directories(dirs, dirs[0].parent / "global", method=method, progress=progress)
        return {"rho": found.report.rho, "resumed": found.resumed, "modules": len(found.report.modules)}

    return work


TASKS: dict[str, Callable[[Sequence[Path], str], Work]] = {
    "read plainly": read_plainly,
    "read tensors": read_tensors,
    "read with safetensors": read_safetensors,
    "aggregate": aggregate,
}


def _from_storage() -> int | None:
    """Bytes that this process made the storage deliver (the page cache not counted), where the system tells."""
    return _number(Path("/proc/self/io"), "read_bytes", 1)


def _peak() -> int | None:
    """The high-water mark of resident memory, everything included: interpreter, libraries, mapped files."""
    return _number(Path("/proc/self/status"), "VmHWM", 1024)


def _number(path: Path, field: str, unit: int) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(field + ":")), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
