"""One place decides which implementation of an operation runs: ``auto``, ``triton``, ``native`` or ``torch``."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable
from typing import Literal

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import native_calls

Backend = Literal["auto", "triton", "native", "torch"]
Chosen = Literal["triton", "native", "torch"]
BACKENDS = ("auto", "triton", "native", "torch")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None where it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"the package triton cannot be imported ({error}); pip install 'fedgram[triton]'"
    return None


def resolve(backend: str, tensors: Iterable[Tensor], *, native: bool = False) -> Chosen:
    """Return the implementation to run on ``tensors``; ``native`` says whether the operation has compiled CPU loops.

    ``auto`` takes Triton on GPUs where it is installed, the compiled loops on CPUs where the extension is built and the
    operation has them, and the torch twin everywhere else, for fake tensors too. The three others are orders.

    Raises:
        ValueError: ``backend`` is not one of ``BACKENDS``, the tensors lie on more than one device, or one of them is
            made of others, as a ``DTensor`` is.
        RuntimeError: ``triton`` or ``native`` is ordered and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    tensors = list(tensors)
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on several devices: {', '.join(sorted(map(str, devices)))}")
    device = next(iter(devices)).type if devices else "cpu"
    kinds = set(map(type, tensors))
    refuse_composed(kinds)
    fake = any(issubclass(kind, FakeTensor) for kind in kinds)
    if backend == "auto" and not fake:
        if device == "cuda" and triton_missing() is None:
            return "triton"
        return "native" if native and device == "cpu" and native_calls.missing() is None else "torch"
    if backend in ("auto", "torch"):
        return "torch"
    if (reason := "a FakeTensor has no memory" if fake else _unable(backend, device, native)) is not None:
        raise RuntimeError(f"backend={backend!r}: {reason}")
    return backend  # type: ignore[return-value]


def refuse_composed(kinds: set[type[Tensor]]) -> None:
    """Raise ValueError for tensors made of others: they have no memory of their own to take an address of."""
    for kind in kinds:
        if hasattr(kind, "__tensor_flatten__"):
            raise ValueError(f"expected plain tensors, got a {kind.__name__} (of a DTensor, its full_tensor())")


def _unable(backend: str, device: str, native: bool) -> str | None:
    """Why the ordered backend cannot run, or None where it can."""
    if backend == "triton":
        if (reason := triton_missing()) is not None:
            return reason
        if device != "cuda" and not interpreting():
            return f"tensors are on {device}; use a GPU, or set TRITON_INTERPRET=1"
    if backend == "native":
        if not native:
            return "this operation has no compiled CPU loops"
        return native_calls.missing() or (
            None if device == "cpu" else f"tensors are on {device}; the loops run on a CPU"
        )
    return None
