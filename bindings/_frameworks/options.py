"""Options of strategies and aggregators, checked where they are made: before any client has worked for nothing."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import torch

from fedgram import stamp
from fedgram.flora_na.cohort import MISSING
from fedgram.flora_na.methods import check_method
from fedgram.flora_na.screening import Clip, check_screening
from fedgram.kernels import BACKENDS

from .._plain.scalings import config_fields
from ..modules import ALIGNED


def check_aggregation(
    *,
    method: str,
    rank: int | str | None,
    shared: bool,
    missing: str,
    align_previous: bool,
    backend: str,
    clip: Clip = None,
    min_cosine: float | None = None,
) -> None:
    """Options of ``flora_na.aggregate``.

    Raises:
        ValueError: names the option that is none of these, or does not go with another.
    """
    check_method(method, rank, shared)
    check_screening(clip, min_cosine)
    _check_choice("missing", missing, MISSING)
    _check_choice("backend", backend, BACKENDS)
    if align_previous and method not in ALIGNED:
        raise ValueError(f"align_previous: only {' and '.join(ALIGNED)} can be aligned, not {method!r}")


def check_matching(*, backend: str, **options: Any) -> None:
    """Options of ``stamp.SpatialMatcher``: ``c``, ``lr``, ``rescale``, ``precise``, ``backend``.

    Raises:
        ValueError: names the option that is out of range.
    """
    stamp.SpatialMatcher({"x": torch.zeros(1)}, **options)  # made to be thrown away
    _check_choice("backend", backend, BACKENDS)


def plain_config(config: Any, option: str = "config") -> dict[str, Any]:
    """LoRA settings in what JSON has: sets of names in order, everything else that it has no form for as its text.

    Args:
        config: a ``peft.LoraConfig``, or the mapping in ``adapter_config.json``.
        option: what messages call it.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(json.dumps(config_fields(config, option), default=str))
    except TypeError as error:
        raise ValueError(f"{option}: {error}") from None


def _check_choice(option: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{option}: expected one of {', '.join(choices)}, got {value!r}")
