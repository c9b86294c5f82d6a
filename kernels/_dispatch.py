"""One place decides which implementation of an operation runs: ``auto``, ``triton`` or ``torch``."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable
from typing import Literal

from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")


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


def resolve(backend: str, tensors: Iterable[Tensor]) -> Literal["triton", "torch"]:
    """Return the implementation to run on ``tensors``.

    ``auto`` takes Triton on GPUs where it is installed and the torch twin everywhere else. ``triton`` and
    ``torch`` are orders.

    Raises:
        ValueError: ``backend`` is not one of ``BACKENDS``, or the tensors lie on more than one device.
        RuntimeError: ``triton`` is ordered and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on several devices: {', '.join(sorted(map(str, devices)))}")
    on_gpu = bool(devices) and next(iter(devices)).type == "cuda"
    if backend == "auto":
        return "triton" if on_gpu and triton_missing() is None else "torch"
    if backend == "triton":
        if (reason := triton_missing()) is not None:
            raise RuntimeError(f"backend='triton': {reason}")
        if not on_gpu and not interpreting():
            where = next(iter(devices)).type if devices else "cpu"
            raise RuntimeError(f"backend='triton': tensors are on {where}; use a GPU, or set TRITON_INTERPRET=1")
    return backend  # type: ignore[return-value]
