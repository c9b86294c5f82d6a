"""Compile-time choices that are not shipped, for benchmarks to time on a GPU beside those that are.

The ahead-of-time gate compiles them too: what spills is not tried.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FILES = {"ghost_gram": "_ghost_gram_triton", "lowrank_sum": "_lowrank_sum_triton"}


def trials(op: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of what may be tried of an operation (a key of ``FILES``) on inputs of a type.

    Raises:
        ImportError: Triton is not installed.
    """
    return tuple(_file(op).TRIALS.get(dtype, ()))


@contextmanager
def trying(op: str, dtype: torch.dtype, trial: str) -> Iterator[None]:
    """Launch an operation with the choices of a trial within the block, for all threads.

    Raises:
        ImportError: Triton is not installed.
    """
    file = _file(op)
    shipped, file.CHOICE = file.CHOICE, file.TRIALS[dtype][trial]
    try:
        yield
    finally:
        file.CHOICE = shipped


def _file(op: str) -> Any:
    return importlib.import_module(f".{FILES[op]}", __package__)
