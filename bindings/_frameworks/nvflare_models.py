"""What arrives at a FLARE server in one round, as state dicts; and what goes back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
import torch
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from .._plain.keys import completed
from .._plain.scalings import is_number
from .arrays import from_numpy, to_numpy

StateDict = Mapping[str, Tensor]


class Collected:
    """The models accepted so far, as they came."""

    def __init__(self) -> None:
        self._models: dict[str, FLModel] = {}
        self._doubles: list[str] = []

    def add(self, model: FLModel, sender: str | None = None) -> None:
        """Keep a model under its client's name: that in its meta, else ``sender``."""
        name = str((model.meta or {}).get("client_name") or sender or f"client {len(self._models)}")
        if name in self._models:
            self._doubles.append(name)
        self._models[name] = model

    def round(self, weighted_by: str | None, global_params: Mapping[str, Any] | None) -> Round:
        """Those that have a weight, in the order of the clients' names, checked.

        Raises:
            ValueError: there is none, one client sent two, they are of different kinds, or weights are missing.
        """
        if not self._models:
            raise ValueError("no client's model arrived in this round")
        if self._doubles:
            raise ValueError(f"{self._doubles[0]}: sent more than one model in this round")
        names = sorted(self._models)
        models = [self._models[name] for name in names]
        weights = _weights(names, [model.meta or {} for model in models], weighted_by)
        if weights is not None and any(weights):
            names, models, weights = ([*compress(each, weights)] for each in (names, models, weights))
        kinds = {model.params_type for model in models if model.params is not None}
        if len(kinds) > 1:
            raise ValueError("params_type: some clients sent whole models and others differences")
        return Round(names, models, weights, kinds == {ParamsType.DIFF}, global_params)


@dataclass(frozen=True, eq=False)
class Round:
    """The models of one round.

    Attributes:
        names: the clients, sorted.
        models: theirs, in that order.
        weights: likewise, or None for equal ones.
        differences: they sent differences from the global model.
        global_params: what the clients started from, where the server knows it.
    """

    names: list[str]
    models: list[FLModel]
    weights: list[float] | None
    differences: bool
    global_params: Mapping[str, Any] | None

    @property
    def number(self) -> int:
        """The round's number, from 0."""
        return self.models[0].current_round or 0

    @cached_property
    def sent(self) -> list[StateDict]:
        """The clients' params as tensors, in place where they are tensors or arrays."""
        return [_tensors(model.params, name) for name, model in zip(self.names, self.models, strict=True)]

    def states(self) -> list[StateDict]:
        """The clients' whole states: the global one is added to differences, in the wider of both dtypes.

        Raises:
            ValueError: as ``base``, or a client's difference has another shape than what it is to be added to.
        """
        if not self.differences:
            return self.sent
        base = self.base()
        return [
            {key: _sum(base[key], value, f"{key}: {name}") for key, value in state.items()}
            for name, state in zip(self.names, self.sent, strict=True)
        ]

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes that entries go back in: where differences came, those of the global model."""
        return {key: value.dtype for key, value in self.base().items()} if self.differences else {}

    def base(self) -> StateDict:
        """The global state as far as any of the clients sent it.

        Raises:
            ValueError: the server does not know it, or a client sent what is not in it.
        """
        known, sent = self._global(), set[str]()
        for name, state in zip(self.names, self.sent, strict=True):
            for key in state:
                if key not in known:
                    raise ValueError(f"{key}: {name} sent it, and the global model has no such entry")
            sent |= state.keys()
        return {key: value for key, value in known.items() if key in sent}

    def earlier(self) -> StateDict:
        """The global state, for anchor and alignment."""
        return self._global()

    def completed(self, state: StateDict) -> dict[str, Any]:
        """The new global params: what the clients did not send stays as it was."""
        return completed(self.global_params or {}, state)

    def stated(self, key: str) -> list[Any]:
        """What each client's meta says under ``key``."""
        return [(model.meta or {}).get(key) for model in self.models]

    def mean_metrics(self) -> dict[str, float] | None:
        """The weighted mean of every numeric metric that all clients report."""
        reported = [model.metrics or {} for model in self.models]
        weights = self.weights or [1.0] * len(reported)
        shared = [key for key in reported[0] if all(is_number(metrics.get(key)) for metrics in reported)]
        means = {
            key: sum(w * float(metrics[key]) for w, metrics in zip(weights, reported, strict=True)) / sum(weights)
            for key in shared
        }
        return means or None

    def _global(self) -> StateDict:
        if not self.global_params:
            raise ValueError("the server has no global model to start from: give the recipe a model")
        return _tensors(self.global_params, "the global model")


def global_params(fl_ctx: FLContext | None) -> Mapping[str, Any] | None:
    """The params of the global model that the clients of this round started from, or None."""
    learnable = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL) if fl_ctx is not None else None
    return None if learnable is None else learnable.get(ModelLearnableKey.WEIGHTS)


def like_sent(params: Mapping[str, Any], current: Round) -> dict[str, Any]:
    """The params as numpy arrays where the clients sent arrays; bfloat16 then as float32."""
    sent: Mapping[str, Any] = next((model.params for model in current.models if model.params), {})
    arrays = not any(isinstance(value, Tensor) or _offloaded(value) for value in sent.values())
    return {k: to_numpy(v) if arrays and isinstance(v, Tensor) else v for k, v in params.items()}


def write_report(fl_ctx: FLContext | None, current: Round, evidence: Mapping[str, Any]) -> None:
    """Write the round's evidence into the server's app folder, where there is one; whole or not at all."""
    folder = fl_ctx.get_prop(FLContextKey.APP_ROOT) if fl_ctx is not None else None
    if folder and os.path.isdir(folder):
        path = os.path.join(folder, f"fedgram_round_{current.number}.json")
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(evidence, file, indent=2)
            file.write("\n")
        os.replace(f"{path}.part", path)


def _tensors(params: Any, label: str) -> StateDict:
    if not isinstance(params, Mapping):
        raise ValueError(f"params: {label} has a {type(params).__name__}; expected a state dict")
    for key in params:
        if not isinstance(key, str):
            raise ValueError(f"params: {label} has the key {key!r}; expected names")
    return {key: _tensor(value, key, label) for key, value in params.items()}


def _tensor(value: Any, key: str, label: str) -> Tensor:
    if _offloaded(value):
        value = value.materialize()
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic | float | int):
        try:
            return from_numpy(np.asarray(value))
        except TypeError as error:
            raise ValueError(f"{key}: {label} has an array that is no tensor ({error})") from None
    raise ValueError(f"{key}: {label} has a {type(value).__name__}; expected a tensor or an array")


def _offloaded(value: Any) -> bool:
    """Whether it is a tensor that FLARE's offload has left on disk."""
    return hasattr(value, "materialize")


def _sum(start: Tensor, difference: Tensor, label: str) -> Tensor:
    if difference.shape != start.shape:
        shapes = tuple(difference.shape), tuple(start.shape)
        raise ValueError(f"{label} sent a difference of shape {shapes[0]}; the global model has {shapes[1]}")
    return start + difference


def _weights(names: Sequence[str], metas: Sequence[Mapping[str, Any]], key: str | None) -> list[float] | None:
    stated = [None if key is None else meta.get(key) for meta in metas]
    if all(weight is None for weight in stated):
        return None
    return [_weight(weight, name, str(key)) for name, weight in zip(names, stated, strict=True)]


def _weight(stated: Any, name: str, key: str) -> float:
    if not is_number(stated):
        raise ValueError(f"{key}: {name} states {stated!r} in its meta; expected a number, as other clients have")
    if stated < 0:
        raise ValueError(f"{key}: {name} states {stated!r} in its meta; expected a number of at least 0")
    return float(stated)
