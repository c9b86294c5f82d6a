"""Options of strategies and aggregators, checked where they are made: before any client has worked for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedgram import stamp
from fedgram.flora_na.cohort import MISSING
from fedgram.flora_na.methods import check_method
from fedgram.flora_na.screening import check_screening
from fedgram.kernels import BACKENDS

from .._plain.earlier import GlobalState
from .._plain.keys import factor_modules
from .._plain.scalings import config_fields

ALIGNED = ("als", "svd")
PASSED = ("method", "rank", "shared", "missing", "clip", "min_cosine", "backend")
"""Options of ``flora_na.aggregate``, which all that aggregate round after round have."""
AGGREGATION = (*PASSED, "anchor_previous", "align_previous")
MATCHING = ("c", "lr", "rescale", "precise", "backend")
"""Options of ``stamp.SpatialMatcher``."""
PLAIN: dict[type, Callable[[Any], Any]] = {np.bool_: bool, np.integer: int, np.floating: float}


def check_aggregation(holder: Any) -> None:
    """Check the options of ``AGGREGATION``, which ``holder`` has as attributes.

    Raises:
        ValueError: names the option that is none of these, or does not go with another.
    """
    check_method(holder.method, holder.rank, holder.shared)
    check_screening(holder.clip, holder.min_cosine)
    _check_choice("missing", holder.missing, MISSING)
    _check_choice("backend", holder.backend, BACKENDS)
    if holder.align_previous and holder.method not in ALIGNED:
        raise ValueError(f"align_previous: only {' and '.join(ALIGNED)} can be aligned, not {holder.method!r}")


def passed(holder: Any, previous: Any, scalings: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The options that ``holder`` has of a round's aggregation.

    ``previous`` is the global adapter before it; ``scalings`` are those of earlier results, of a state dict.
    """
    previous = GlobalState(previous, scalings or {}) if isinstance(previous, Mapping) else previous
    return {name: getattr(holder, name) for name in PASSED} | {
        "anchor": previous if holder.anchor_previous else None,
        "align_to": previous if holder.align_previous else None,
    }


def unaligned(holder: Any, previous: Any, modules: Iterable[str]) -> list[str]:
    """Of a round's modules those that ``align_previous`` found nothing earlier of in ``previous``, if it was to."""
    if not holder.align_previous or previous is None:
        return []
    known = factor_modules(previous) if isinstance(previous, Mapping) else previous.modules
    return [module for module in modules if module not in known]


def shown(holder: Any, names: Sequence[str]) -> str:
    """The options of these names, as ``print`` shows them."""
    return ", ".join(f"{name}={getattr(holder, name)!r}" for name in names)


def check_matching(holder: Any) -> None:
    """Check the options of ``MATCHING``, which ``holder`` has as attributes.

    Raises:
        ValueError: names the option that is out of range.
    """
    stamp.SpatialMatcher({"x": torch.zeros(1)}, **matching(holder))  # made to be thrown away
    _check_choice("backend", holder.backend, BACKENDS)


def matching(holder: Any) -> dict[str, Any]:
    """The options that ``holder`` has of a round's matching."""
    return {name: getattr(holder, name) for name in MATCHING}


def plain_value(value: Any) -> Any:
    """Numpy's numbers and bools, and arrays and tensors of one, as Python's, which JSON has; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: plain_value(one) for name, one in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    return next((plain(value) for kind, plain in PLAIN.items() if isinstance(value, kind)), value)


def plain_config(config: Any) -> dict[str, Any]:
    """LoRA settings in what JSON has: sets of names in order, everything else that it has no form for as its text.

    Args:
        config: a ``peft.LoraConfig``, or the mapping in ``adapter_config.json``.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(json.dumps(config_fields(config, "config"), default=_plain_or_text))
    except TypeError as error:
        raise ValueError(f"config: {error}") from None


def _plain_or_text(value: Any) -> Any:
    plain = plain_value(value)
    return str(value) if plain is value else plain


def _check_choice(option: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{option}: expected one of {', '.join(choices)}, got {value!r}")
