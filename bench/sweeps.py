"""Curves: time against clients, against gradient length and against tasks; error against time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from fedgram import flora_na, kernels, stamp

from .measure import measure_one, seconds
from .peers import adamw, conic, dense, operations, softmax_sgd
from .reference import dense_update, dual_objective, matching_excess, rho, scalar_rho
from .registry import MissingPeerError, Size
from .workloads import Lora, factors, gradients, sample_weights, task_gramian

C = 0.25
BUDGETS = {"full": 0.2, "quick": 0.05, "tiny": 0.002}  # seconds per point
LINEAR = 1.15  # a slope in log-log above this is not linear any more


@dataclass
class Sweep:
    """Curves over one axis.

    Attributes:
        name: of the file and in tables.
        x: label of the axis.
        y: label of the values.
        curves: contender -> points (x, y).
        linear: contenders whose cost must grow no faster than linearly.
        missing: contenders that cannot run here, with the reason.
    """

    name: str
    x: str
    y: str
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    linear: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the slope of every curve and whether the promised ones are linear."""
        slopes = {name: slope(points) for name, points in self.curves.items() if len(points) > 2}
        linear = {name: slopes[name] <= LINEAR for name in self.linear if name in slopes}
        return asdict(self) | {"slopes": slopes, "linear": linear}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent of growth: the slope of a line through the logarithms, without the smallest third of the points."""
    upper = sorted(points)[len(points) // 2 - 1 :]
    x, y = ([math.log(p[i]) for p in upper] for i in (0, 1))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def time_against_clients(size: Size, device: torch.device) -> Sweep:
    """One module of 1024 x 1024, rank 8."""
    counts = {"full": (5, 10, 20, 40, 80, 160, 320), "quick": (5, 10, 20, 40), "tiny": (2, 4, 8)}[size]
    side = 24 if size == "tiny" else 1024
    methods = ("fedavg", "flora-na", "als", "svd")
    sweep = Sweep("time against clients", "clients U", "seconds", linear=("fedavg", "flora-na", "als"))
    for U in counts:
        (B,), (A,) = factors(Lora(1, U, side, side, 8), device)
        w = sample_weights(U)
        for method in methods:
            _add(sweep, method, U, partial(flora_na.estimate, B, A, w, method=method), device, size)
        _add(sweep, "cat + QR + svd", U, partial(dense.qr_svd, B, A, w, 8), device, size)
    return sweep


def time_against_length(size: Size, device: torch.device) -> Sweep:
    """K = 20 lists of tensors (3 in the tests)."""
    lengths = {
        "full": (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7),
        "quick": (10**4, 10**5, 10**6),
        "tiny": (50, 100, 200),
    }
    sweep = Sweep("time against length", "numbers in a gradient d", "seconds", linear=("grad_gram", "match"))
    for d in lengths[size]:
        lists = gradients(3 if size == "tiny" else 20, d, device)
        _add(sweep, "grad_gram", d, partial(kernels.grad_gram, lists), device, size)
        _add(sweep, "match", d, partial(stamp.match, lists, c=C), device, size)
        _add(sweep, "stack + mm", d, partial(operations.stack_gram, lists), device, size)
    return sweep


def time_against_tasks(size: Size, device: torch.device) -> Sweep:
    """The dual by itself, on the CPU."""
    counts = {"full": (2, 4, 8, 16, 32, 64, 128, 256, 512), "quick": (2, 8, 32, 128), "tiny": (2, 4)}[size]
    sweep = Sweep("time against tasks", "tasks K", "seconds")
    cpu = torch.device("cpu")
    solvers: dict[str, tuple[Callable[..., Any], int]] = {
        "solve_dual": (partial(stamp.solve_dual, c=C), 10**9),
        "100 softmax-SGD steps": (partial(softmax_sgd.softmax_weights, c=C), 10**9),
    }
    for name, make in ((conic.CVXPY, conic.cvxpy_solver), (conic.TORCHJD, conic.torchjd_cagrad)):
        try:
            solvers[name] = (make(C), 128)  # beyond it they take seconds
        except MissingPeerError as error:
            sweep.missing[name] = error.reason
    for K in counts:
        G = task_gramian(K)
        for name, (solve, most) in solvers.items():
            if most >= K:
                _add(sweep, name, K, partial(solve, G), cpu, size)
    return sweep


def matching_error_against_time(size: Size, device: torch.device) -> Sweep:
    """How near gradient loops of rising length come to the optimum of the dual, K = 32."""
    steps = {"full": (1, 3, 10, 30, 100, 300, 1000, 3000), "quick": (1, 10, 100, 1000), "tiny": (1, 10)}[size]
    G = task_gramian(32)
    upper = dual_objective(stamp.solve_dual(G, C).weights, G, C)
    sweep = Sweep("matching error against time", "seconds", "below the optimum")

    def sgd(n: int) -> torch.Tensor:
        return softmax_sgd.coefficients(softmax_sgd.softmax_weights(G, C, steps=n), G, C)

    def add(name: str, run: Callable[[], torch.Tensor]) -> None:
        took = measure_one(run, torch.device("cpu"), budget=2 * BUDGETS[size]).median
        _add_error(sweep, name, took, matching_excess(run(), G, upper, C), 1e-16)

    add("solve_dual", lambda: stamp.solve_dual(G, C).coefficients)
    for n in steps:
        add("softmax-SGD, 1 to 3000 steps", partial(sgd, n))
    try:
        add(conic.CVXPY, partial(conic.cvxpy_solver(C), G))
    except MissingPeerError as error:
        sweep.missing[error.name] = error.reason
    return sweep


def estimate_error_against_time(size: Size, device: torch.device) -> Sweep:
    """How near AdamW loops of rising length come to the least-squares optimum."""
    steps = {"full": (10, 30, 100, 200, 400), "quick": (10, 50), "tiny": (2, 5)}[size]
    side = 24 if size == "tiny" else 512
    (B,), (A,) = factors(Lora(1, 10, side, side, 8), device)
    w = sample_weights(10)
    dW, truth = dense_update(B, A, w), scalar_rho(B, A, w)
    sweep = Sweep("estimate error against time", "seconds", "rho over the float64 optimum")

    def add(name: str, run: Callable[[], Any], took: float) -> None:
        result = run()
        pair = (result.B, result.A) if isinstance(result, flora_na.Estimate) else result
        _add_error(sweep, name, took, rho(pair, dW) / truth - 1, 1e-12)

    ours = partial(flora_na.estimate, B, A, w, method="flora-na")
    add("estimate(flora-na)", ours, measure_one(ours, device, budget=2 * BUDGETS[size]).median)
    for n in steps:
        loop = partial(adamw.adamw_scalars, B, A, w, steps=n)
        add("AdamW, 10 to 400 steps", loop, seconds(loop, device))
    return sweep


SWEEPS: tuple[Callable[[Size, torch.device], Sweep], ...] = (
    time_against_clients,
    time_against_length,
    time_against_tasks,
    matching_error_against_time,
    estimate_error_against_time,
)


def _add_error(sweep: Sweep, name: str, took: float, error: float, least: float) -> None:
    """A point of error against time; the axes are logarithmic, so that an error is drawn as ``least`` at the least."""
    if math.isfinite(error):
        sweep.curves.setdefault(name, []).append((took, max(error, least)))
    else:
        sweep.missing[name] = "a result is not finite"


def _add(sweep: Sweep, name: str, x: float, run: Callable[[], Any], device: torch.device, size: Size) -> None:
    took = measure_one(run, device, budget=BUDGETS[size], least=2, most=15).median
    sweep.curves.setdefault(name, []).append((x, took))
