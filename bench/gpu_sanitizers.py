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
from .gpu_support import NOT_ENDED, Journal, end_groups

# torch's kernels are not ours to check, and slow. There is no initcheck: it does not see what kernels write that it is
# not to check, and gram_reduce reads whole vectors with what nothing wrote among them, which it does not keep; memory
# poisoned with NaN (correctness) shows what matters
OURS = "regex=^(factor|gram|grad|slot|recentre|lowrank|ghost|descend|planted)_"
SHORTEST, LONGEST = 10.0, 200.0  # seconds of one checker


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
    limit = max(SHORTEST, min(LONGEST, deadline - time.monotonic()))
    # without torch's caching allocator every tensor is an allocation of its own, whose bounds the checker knows
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=limit)
    except BaseException as error:  # also when this section is ended: what the tool has started must not go on
        stuck = end_groups([process], grace=0.0)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        output = "" if stuck else process.communicate()[0][-2000:]
        return {"ok": None, "skipped": f"not done in {limit:.0f} s{NOT_ENDED if stuck else ''}", "output": output}
    summary = [line for line in stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    clean = process.returncode == 0 and bool(summary)
    right = process.returncode == 99 and "planted_kernel" in stdout if planted else clean
    output = "" if clean else (stdout + stderr)[-6000:]
    return {"ok": bool(summary) and right, "summary": summary, "exit": process.returncode, "output": output}


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
