"""What this device can do at most, measured in the same run: read, copy and matrix rates. Floors follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .measure import measure_one

BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}  # far beyond any cache
SIDE = {"cpu": 1536, "cuda": 8192}
RATES = {"cpu": ("float64", "float32"), "cuda": ("float64", "float32", "tf32", "bfloat16")}


@dataclass(frozen=True)
class Cost:
    """What a workload cannot do without.

    Attributes:
        flops: multiplications and additions.
        bytes: bytes that must be read and written once.
        data: bytes of the input data; times are also told in reads of it.
        rate: whose matrix rate bounds the flops.
    """

    flops: float
    bytes: float
    data: float
    rate: str = "float32"


@dataclass(frozen=True)
class Ceilings:
    """Measured rates, in bytes and floating-point operations per second."""

    read: float
    copy: float
    flops: dict[str, float]

    def floor(self, cost: Cost) -> float:
        """Seconds below which the workload cannot be done here."""
        return max(cost.bytes / self.read, cost.flops / self.flops.get(cost.rate, self.flops["float32"]))

    def bound(self, cost: Cost) -> str:
        """Which of the two rates makes the floor."""
        arithmetic = cost.flops / self.flops.get(cost.rate, self.flops["float32"])
        return "memory" if cost.bytes / self.read >= arithmetic else "arithmetic"

    def reads(self, seconds: float, cost: Cost) -> float:
        """Seconds as a number of reads of the input data."""
        return seconds * self.read / cost.data

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def rate_of(dtype: torch.dtype, device: torch.device) -> str:
    """Whose matrix rate a product at the stated precision can reach."""
    if device.type == "cpu":
        return "float32"
    return {torch.float32: "tf32x3", torch.bfloat16: "bfloat16"}.get(dtype, "float64")


def measure_ceilings(device: torch.device, *, scale: float = 1.0, seconds: float = 1.0) -> Ceilings:
    """Measure the rates with the best of what torch has; ``scale`` shrinks the buffers (for quick runs)."""
    count = max(1024, int(BYTES[device.type] * scale) // 4)
    read, copy = _memory_rates(count, device, seconds)
    side = max(64, int(SIDE[device.type] * min(1.0, scale**0.5)))
    flops = {name: _matrix_rate(name, side, device, seconds) for name in RATES[device.type]}
    if "tf32" in flops:
        flops["tf32x3"] = flops["tf32"] / 3  # float32 accuracy from three products
    return Ceilings(read, copy, flops)


def _memory_rates(count: int, device: torch.device, seconds: float) -> tuple[float, float]:
    x = torch.ones(count, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / _best(lambda: y.copy_(x), device, seconds)
    read = max(x.nbytes / _best(run, device, seconds) for run in (lambda: x.sum(), lambda: torch.dot(x, x)))
    # a GPU's reductions need not reach what its copies do
    return max(read, copy), copy


def _matrix_rate(name: str, side: int, device: torch.device, seconds: float) -> float:
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    a = torch.randn(side, side, device=device).to(dtype)
    b, out = a.clone(), torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        return 2 * side**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _best(run: Callable[[], Tensor | None], device: torch.device, seconds: float) -> float:
    return min(measure_one(run, device, budget=seconds).seconds)
