"""Packages that a peer needs and a machine may lack."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ..environment import compiler
from ..registry import MissingPeerError

PIP = "pip install 'fedgram[bench]'"


def need(peer: str, *modules: str) -> list[ModuleType]:
    """Import the modules of a peer.

    Raises:
        MissingPeerError: one of them is not there.
    """
    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as error:
        raise MissingPeerError(peer, f"{error}; {PIP}") from None


def compiled_name(plain: str) -> str:
    """How tables call ``torch.compile`` of the contender ``plain``."""
    return f"torch.compile of {plain}"


def compiled(peer: str, function: Callable[..., Any], device: torch.device, *arguments: Any) -> Callable[[], Any]:
    """``torch.compile`` of a plain function for these arguments, compiled already: only its runs are to be timed.

    Raises:
        MissingPeerError: nothing can be compiled for this device; the reason says what is missing.
    """
    if (reason := compile_missing(device.type)) is not None:
        raise MissingPeerError(peer, reason)
    run = partial(torch.compile(function, dynamic=False), *arguments)
    run()
    return run


@functools.cache
def compile_missing(device_type: str) -> str | None:
    """Why ``torch.compile`` cannot work here, or None: found by compiling an addition."""
    if device_type == "cpu" and compiler() is None:
        return "torch.compile needs a C++ compiler, and none is here"
    try:
        x = torch.ones(8, device=device_type)
        torch.compile(lambda a: a + a, dynamic=False)(x)
    except Exception as error:  # whatever the compiler's tool chain raises: the table tells it
        return f"torch.compile fails here: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}"
    return None
