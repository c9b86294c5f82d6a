"""The GPU script's checks: right, repeatable to the bit, capturable, compilable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fedgram import flora_na, kernels, stamp

from .gpu_cases import OpCase, all_cases, small_cases
from .gpu_estimates import estimates, unequal_factors
from .gpu_support import Journal, poisoned
from .reference import list_error
from .workloads import TINY, adapters, gradients, name_of

KERNELS = "triton"
REPEATS = 20
NOT_FINITE = (torch.bfloat16, torch.float32)  # types whose products are taken of two parts


def correctness(journal: Journal, device: torch.device, part: str) -> None:
    """Every operation against float64, its outputs poisoned and guarded; the torch twin on the device beside it.

    A part is one type, or ``subset``, or ``estimates``: each compiles kernels of its own: they run side by side.
    """
    if part == "estimates":
        estimates(journal, device)
        return
    for case in all_cases(device, part):
        journal.guard(case.name, partial(_check, case))
    sizes = (5, 16, 70) if device.type == "cuda" else (5,)
    for dtype, value, K in product(NOT_FINITE, (torch.nan, torch.inf), sizes):
        if name_of(dtype) == part:
            work = partial(_not_finite, device, dtype, K, value)
            journal.guard(f"grad_gram K={K} {part} with one {value}", work)


def _check(case: OpCase) -> dict[str, Any]:
    with poisoned():
        error = list_error(case.run(KERNELS), case.truths)
    untouched = all(g.untouched() for g in case.guards)
    twin = list_error(case.run("torch"), case.truths)
    right = error <= case.tolerance and untouched
    return {
        "op": case.op,
        "ok": right,
        "error": error,
        "twin_error": twin,
        "tolerance": case.tolerance,
        "untouched": untouched,
    }


def _not_finite(device: torch.device, dtype: torch.dtype, K: int, value: float) -> dict[str, Any]:
    """NaN and Inf reach every entry: GPUs return a NaN of their own, which must not be rounded to a number."""
    lists = gradients(K, 3000 if device.type == "cuda" else 200, device, dtype=dtype)
    lists[1][0].view(-1)[0] = value
    finite = sum(int(t.isfinite().sum()) for t in kernels.grad_gram(lists, backend=KERNELS))
    return {"op": "grad_gram", "ok": finite == 0, "error": finite, "tolerance": 0}


def repeats(journal: Journal, device: torch.device) -> None:
    """The same bits on every one of 20 runs, other work running in between."""
    count = REPEATS if device.type == "cuda" else 2
    for case in small_cases(device):
        journal.guard(case.name, partial(_repeat, case, count, device))


def _repeat(case: OpCase, count: int, device: torch.device) -> dict[str, Any]:
    first = [t.clone() for t in case.run(KERNELS)]
    different = 0
    for _ in range(count - 1):
        torch.rand(257, 129, device=device).square_().sum()  # moves allocations and schedules
        different += not _same(first, case.run(KERNELS))
    return {"op": case.op, "ok": different == 0, "runs": count, "different": different}


def _same(x: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def graphs(journal: Journal, device: torch.device) -> None:
    """Capture each operation, change its inputs, replay: the replay must do what a fresh call does.

    What cannot be captured (the host waits for a value) is told as skipped, with the reason.
    """
    with _on_one_stream(device):
        _graphs(journal, device)


@contextmanager
def _on_one_stream(device: torch.device) -> Iterator[None]:
    """Everything on one stream beside the default one, which no capture may follow; only captures have their own.

    Plans with their tables are kept per stream, and memory returns to the stream that it was allocated for: what a
    capture has read can be let go of, and its place taken, on the stream of the calls before it only.
    """
    if device.type != "cuda":
        yield
        return
    stream, outside = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


def _graphs(journal: Journal, device: torch.device) -> None:
    for case in small_cases(device):
        if case.inputs:
            journal.guard(case.name, partial(_replay_case, case, device))
    lists = gradients(4, 3000, device)
    flat = [t for one in lists for t in one]

    def matched() -> list[Tensor]:
        m = stamp.match(lists, c=0.25)
        return [*m.direction, m.coefficients]

    # eager calls solve on the host: what solves on the device must set its libraries up before a capture
    stamp.solve_dual(stamp.gramian(lists), 0.25, method="batched")
    journal.guard("match", lambda: _replay(matched, flat, device, required=True))
    B, A = unequal_factors(device)
    f = kernels.prepare(B, A)
    for method in flora_na.batched.METHODS:
        for kind, b, a in (("lists", B, A), ("prepared", f.B, f.A)):

            def aggregated(method: str = method, b: Any = b, a: Any = a) -> list[Tensor]:
                e = flora_na.estimate_modules(b, a, method=method, sweeps=8)
                return [*e.B, *e.A, e.rho]

            inputs = [t for side in (B, A) for module in side for t in module]
            name = f"estimate_modules({method}) {kind}"
            journal.guard(name, partial(_replay, aggregated, inputs, device, required=True))
    clients = adapters(TINY, device)
    factors = [t for client in clients for layer in client.values() for t in (layer.A, layer.B)]

    def whole() -> list[Tensor]:
        result = flora_na.aggregate(clients, method="als").adapter.modules
        return [t for layer in result.values() for t in (layer.A, layer.B)]

    journal.guard("aggregate(als)", lambda: _replay(whole, factors, device))


def _replay_case(case: OpCase, device: torch.device) -> dict[str, Any]:
    return _replay(partial(case.run, KERNELS), case.inputs, device) | {"op": case.op}


def _replay(
    run: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], device: torch.device, *, required: bool = False
) -> dict[str, Any]:
    """Capture, replay between other calls, compare; the current stream must not be the default one.

    ``required``: a capture that fails is a fault, not a limitation. Such calls hold products and solves of cuBLAS and
    cuSOLVER, which may choose otherwise within a graph: they are held to 1e-6 where the kernels alone are held to the
    bit.
    """
    if device.type != "cuda":
        return {"ok": None, "skipped": "needs a GPU"}
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except Exception as error:  # a value the host waits for, say: a limitation, to be told as such
        torch.cuda.synchronize(device)
        reason = f"no capture: {type(error).__name__}: {str(error)[:500]}"
        return {"ok": False, "error": reason} if required else {"ok": None, "skipped": reason}
    for t in inputs:
        t.copy_(t.flatten().flip(0).view(t.shape) * 0.75)
    graph.replay()
    taken = _displace(run, inputs)
    graph.replay()
    torch.cuda.synchronize(device)
    replayed = [t.clone() for t in outputs]
    del taken
    fresh = [t.to(r.device) for t, r in zip(run(), replayed, strict=True)]  # a plain call's dual is solved on the host
    apart = list_error(replayed, fresh)
    right = apart <= 1e-6 if required else _same(replayed, fresh)
    return {"ok": right, "error": apart, "tolerance": 1e-6 if required else 0.0, "same_bits": _same(replayed, fresh)}


def _displace(run: Callable[[], Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run on other tensors of the layout, so that what the last call alone needs is let go of; what takes its place.

    That is full of addresses that can be read: a graph that still reads there is wrong, and does not end the process.
    """
    own = [t.data for t in inputs]
    for t in inputs:
        t.data = _elsewhere(t)
    run()
    for t, data in zip(inputs, own, strict=True):
        t.data = data
    address, device = own[0].data_ptr(), own[0].device
    return [torch.full((n,), address, device=device) for n in (64, 512, 8192, 1 << 17) for _ in range(32)]


def _elsewhere(t: Tensor) -> Tensor:
    """The same numbers in other memory, laid out and aligned alike."""
    memory = t.untyped_storage().clone()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, t.storage_offset(), t.shape, t.stride())


def compiled(journal: Journal, device: torch.device) -> None:
    """``torch.compile(fullgraph=True)`` of calls of every registered operation: the bits of a plain call."""
    B, A = ([[torch.randn(s, device=device) for _ in range(3)]] for s in ((64, 8), (8, 48)))
    lists = gradients(4, 3000, device)
    v = torch.full((4,), 0.25, dtype=torch.float64, device=device)
    P = [torch.randn(24, 8, dtype=torch.float64, device=device)]
    rows = torch.randn(32, 16, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "factor_gram": lambda: kernels.factor_gram(B, A),
        "factor_cross": lambda: kernels.factor_cross(B, A, [B[0][0]], [A[0][0]]),
        "factor_combine": lambda: kernels.factor_combine(B, A, P, [P[0].T.contiguous()]),
        "lowrank_sum": lambda: kernels.lowrank_sum(None, B[0], A[0], v[:3]),
        "grad_gram": lambda: tuple(kernels.grad_gram(lists)),
        "grad_combine": lambda: kernels.grad_combine(lists, v),
        "ghost_gram": lambda: kernels.ghost_gram(rows, rows, [0, 10, 32]),
    }
    few, (fB, fA) = lists[:2], unequal_factors(device)
    whole: dict[str, Callable[[], Any]] = {
        "match": lambda: _matched(few),
        "estimate_modules(als)": lambda: tuple(flora_na.estimate_modules(fB, fA, sweeps=1)),
    }
    for name, call in calls.items():
        journal.guard(name, partial(_compile, call), need_s=5)
    for name, call in whole.items():
        journal.guard(f"whole {name}", partial(_compile, call, 1e-5), need_s=40)


def _matched(lists: list[list[Tensor]]) -> tuple[Any, Tensor]:
    m = stamp.match(lists, c=0.25)
    return m.direction, m.coefficients


def _compile(call: Callable[[], Any], tolerance: float = 0.0) -> dict[str, Any]:
    """Equal bits, or with a tolerance equal up to it: on the CPU a trace takes the path of a device."""
    from torch.utils._pytree import tree_leaves

    torch._dynamo.reset()
    plain = tree_leaves(call())
    found = tree_leaves(torch.compile(call, fullgraph=True, backend="aot_eager")())
    traced = [t.to(p.device) for p, t in zip(plain, found, strict=True)]  # a dual is solved on the host in plain calls
    if not tolerance:
        return {"ok": _same(plain, traced)}
    error = list_error(traced, plain)
    return {"ok": error <= tolerance, "error": error, "tolerance": tolerance}
