"""The GPU script's memory and race checks: every kernel under compute-sanitizer, and a planted fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from glob import glob
from pathlib import Path
from typing import Any

import torch

from .gpu_cases import small_cases
from .gpu_checks import KERNELS
from .gpu_support import Journal

# torch's kernels are not ours to check, and slow. There is no initcheck: it does not see what kernels write that it is
# not to check, and gram_reduce reads whole vectors with what nothing wrote among them, which it does not keep; memory
# poisoned with NaN (correctness) shows what matters
OURS = "regex=^(factor|gram|grad|slot|recentre|lowrank|ghost|descend|planted)_"
LONGEST = 200.0  # seconds of one checker


def sanitizer(journal: Journal, device: torch.device, checker: str, script: Path) -> None:
    """Small cases under one of compute-sanitizer's tools; ``planted`` is a store out of bounds that it must find."""
    tool = _tool()
    if tool is None or device.type != "cuda":
        journal.add(name=checker, ok=None, skipped="not found" if tool is None else "needs a GPU")
        return
    journal.guard(checker, lambda: _run(tool, checker, script, journal.deadline), need_s=20)


def _tool() -> str | None:
    """The path of compute-sanitizer, or None."""
    found = [shutil.which("compute-sanitizer"), *sorted(glob("/usr/local/cuda*/bin/compute-sanitizer"))]
    return next((path for path in found if path), None)


def _run(tool: str, checker: str, script: Path, deadline: float) -> dict[str, Any]:
    planted = checker == "planted"
    what = "memcheck" if planted else checker
    command = [tool, "--tool", what, "--error-exitcode", "99", "--print-limit", "20"]
    command += ["--kernel-name", OURS]
    command += [sys.executable, "-P", str(script), "--section", f"sanitized {'planted' if planted else 'all'}"]
    limit = max(10.0, min(LONGEST, deadline - time.monotonic()))
    # without torch's caching allocator every tensor is an allocation of its own, whose bounds the checker knows
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired as late:
        return {"ok": None, "skipped": f"not done in {limit:.0f} s", "output": _text(late.stdout)[-2000:]}
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    clean = done.returncode == 0 and bool(summary)
    right = done.returncode == 99 and "planted_kernel" in done.stdout if planted else clean
    output = "" if clean else (done.stdout + done.stderr)[-6000:]
    return {"ok": bool(summary) and right, "summary": summary, "exit": done.returncode, "output": output}


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def sanitized(journal: Journal, device: torch.device, what: str) -> None:
    """What runs under a checker: every kernel once, or the planted fault."""
    if what == "planted":
        _plant(device)
    else:
        for case in small_cases(device):
            case.run(KERNELS)
            torch.cuda.synchronize(device)
    journal.add(name="ran", ok=True)


def _plant(device: torch.device) -> None:
    from ._planted_triton import planted_kernel

    planted_kernel[(1,)](torch.zeros(100, device=device), 100_000)
    torch.cuda.synchronize(device)
