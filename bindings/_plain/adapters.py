"""From state dicts to adapters and back: which scaling each layer has, and which one the receivers will use.

A result is used with the receivers' own scaling ``t`` of each module. What is estimated is ``dW / unit``, the unit one
of these scalings: every client's layer carries ``s_u / unit``. Where clients and receivers share one scaling in all
modules, every ratio is 1, and nothing is rounded on its account; in a module with another ``t``, the pair that comes
out is scaled by ``unit / t``, half of it on either factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from fedgram.flora_na import Adapter, LoraLayer, Report

from .._peft.config import LoraSettings, refuse_other_kinds
from .keys import FactorKey, StateKeys, matrices, restored, sort_state

Numbers: TypeAlias = float | Sequence[float] | Tensor | None
Settings: TypeAlias = Any  # a peft.LoraConfig, a mapping, or a sequence of them
Layout: TypeAlias = Mapping[str, Mapping[str, FactorKey]]


@dataclass(frozen=True, eq=False)
class StateDictClients:
    """The clients' state dicts as adapters.

    Attributes:
        adapters: one per client; each layer's scaling is relative to the unit.
        scalings: module -> the output's scaling.
        unit: what the figures of a report are to be multiplied by.
        layout: module -> names and shapes under which the result is written.
    """

    adapters: list[Adapter]
    scalings: dict[str, float]
    unit: float
    layout: Layout

    def earlier(self, state: Mapping[str, Tensor], argument: str) -> Adapter:
        """An earlier result as an adapter: its scaling is the output's."""
        keys = sort_state(state, argument)
        scalings = {module: self.scalings.get(module, self.unit) / self.unit for module in keys.factors}
        return _adapter(state, keys, scalings, argument)

    def clip(self, clip: float | str | None) -> float | str | None:
        """A bound on norms of updates in the unit; multiples of the median norm need none."""
        try:
            return None if clip is None or isinstance(clip, bool) else float(clip) / abs(self.unit)
        except (TypeError, ValueError):
            return clip

    def written(self, adapter: Adapter) -> dict[str, Tensor]:
        """A result under the names that the clients used, to be multiplied by the output's scalings."""
        state = {}
        for module, layer in adapter.modules.items():
            ratio, keys = self.unit / self.scalings[module] * layer.scaling, self.layout[module]
            root = abs(ratio) ** 0.5
            state[keys["A"].key] = restored(_times(layer.A, root), keys["A"])
            state[keys["B"].key] = restored(_times(layer.B, math.copysign(root, ratio)), keys["B"])
        return state | dict(adapter.extras)

    def report(self, report: Report) -> Report:
        """The report with its norms in the units of ``dW``; the divergences and cosines are ratios and stay."""
        unit = abs(self.unit)
        modules = {name: replace(module, norm=module.norm * unit) for name, module in report.modules.items()}
        screening = report.screening
        if screening is not None:
            bound = None if screening.bound is None else screening.bound * unit
            screening = replace(screening, norms=screening.norms * unit, bound=bound)
        return replace(report, modules=modules, screening=screening)


def read_states(
    states: Sequence[Mapping[str, Tensor]],
    labels: Sequence[str],
    took_part: Sequence[bool],
    lora_alpha: Numbers,
    scalings: Numbers,
    config: Settings,
    output_scaling: float | Mapping[str, float] | None,
) -> StateDictClients:
    """Sort the names, find every layer's scaling and the output's, and wrap the tensors.

    Raises:
        ValueError: names the client, module or argument.
    """
    found = [sort_state(state, label) for state, label in zip(states, labels, strict=True)]
    rule = _ScalingRule.make(len(states), lora_alpha, scalings, config)
    own = [
        {module: rule.scaling(u, module, pair["A"].shape[0]) for module, pair in keys.factors.items()}
        for u, keys in enumerate(found)
    ]
    active = [u for u, takes_part in enumerate(took_part) if takes_part]
    layout: dict[str, dict[str, FactorKey]] = {}
    for u in active:
        for module, pair in found[u].factors.items():
            layout.setdefault(module, pair)
    if not rule.known:
        _require_equal_ranks([found[u] for u in active], [labels[u] for u in active])
    common = {m: _output_scaling(m, [(labels[u], own[u][m]) for u in active if m in own[u]], output_scaling)
              for m in layout}  # fmt: skip
    unit = next(iter(common.values()), 1.0)
    adapters = []
    for state, keys, scaling, label in zip(states, found, own, labels, strict=True):
        adapters.append(_adapter(state, keys, {module: s / unit for module, s in scaling.items()}, label))
    return StateDictClients(adapters, common, unit, layout)


@dataclass(frozen=True)
class _ScalingRule:
    """How the scaling of a client's layer is known."""

    alphas: list[float] | None = None
    numbers: list[float] | None = None
    settings: list[LoraSettings] | None = None

    @staticmethod
    def make(count: int, lora_alpha: Numbers, scalings: Numbers, config: Settings) -> _ScalingRule:
        given = [
            n for n, v in (("lora_alpha", lora_alpha), ("scalings", scalings), ("config", config)) if v is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: give this or {given[1]}, not both")
        return _ScalingRule(
            _per_client(lora_alpha, count, "lora_alpha"),
            _per_client(scalings, count, "scalings"),
            None if config is None else [_settings(c, count, u) for u, c in enumerate(_each(config, count))],
        )

    @property
    def known(self) -> bool:
        return not (self.alphas is None and self.numbers is None and self.settings is None)

    def scaling(self, client: int, module: str, rank: int) -> float:
        if self.numbers is not None:
            return self.numbers[client]
        if self.alphas is not None:
            return self.alphas[client] / max(rank, 1)
        if self.settings is not None:
            stated = self.settings[client].ranks(module)
            if rank not in stated:
                raise ValueError(
                    f"{module}: client {client} has rank {rank}, its config {' or '.join(map(str, stated))}: "
                    "the scaling is not known"
                )
            return self.settings[client].scaling(module, rank)
        return 1.0


def _each(config: Settings, count: int) -> list[Any]:
    configs = list(config) if isinstance(config, Sequence) else [config] * count
    if len(configs) != count:
        raise ValueError(f"config: expected one, or {count} (one per client), got {len(configs)}")
    return configs


def _settings(config: Any, count: int, client: int) -> LoraSettings:
    """What a configuration says of ranks and scalings; kinds whose update is not B A are refused."""
    path = Path("config" if count == 1 else f"config of client {client}")
    fields = config if isinstance(config, Mapping) else getattr(config, "to_dict", lambda: None)()
    if not isinstance(fields, Mapping):
        raise ValueError(f"{path}: expected a peft.LoraConfig or a mapping, got {type(config).__name__}")
    plain = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in fields.items()}
    refuse_other_kinds(plain, path)
    return LoraSettings.parse(plain, path)


def _per_client(numbers: Numbers, count: int, argument: str) -> list[float] | None:
    if numbers is None:
        return None
    values = numbers.tolist() if isinstance(numbers, Tensor) else numbers
    values = list(values) if isinstance(values, Sequence) else [values] * count
    if len(values) != count:
        raise ValueError(f"{argument}: expected one number, or {count} (one per client), got {len(values)}")
    for u, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < float("inf"):
            raise ValueError(f"{argument}: client {u} has {value!r}; expected a finite number other than 0")
    return [float(value) for value in values]


def _output_scaling(module: str, own: Sequence[tuple[str, float]], given: float | Mapping[str, float] | None) -> float:
    if given is not None:
        scaling = given.get(module) if isinstance(given, Mapping) else given
        if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 < abs(scaling) < float("inf"):
            raise ValueError(f"output_scaling: {module}: expected a finite number other than 0, got {scaling!r}")
        return float(scaling)
    first_label, first = own[0]
    for label, scaling in own[1:]:
        if scaling != first:
            raise ValueError(
                f"{module}: {label} scales by {scaling:g}, {first_label} by {first:g}: "
                "say in output_scaling by what the receivers will"
            )
    if first == 0:
        raise ValueError(f"{module}: the scaling is 0: say in output_scaling by what the receivers will multiply")
    return first


def _require_equal_ranks(found: Sequence[StateKeys], labels: Sequence[str]) -> None:
    """Without alpha, clients of one rank have one scaling if they share alpha; of different ranks they have not."""
    first: dict[str, tuple[int, str]] = {}
    for keys, label in zip(found, labels, strict=True):
        for module, pair in keys.factors.items():
            rank = pair["A"].shape[0]
            other, whose = first.setdefault(module, (rank, label))
            if rank != other:
                raise ValueError(
                    f"{module}: {label} has rank {rank}, {whose} rank {other}, so their scalings may differ: "
                    "give lora_alpha, scalings or config"
                )


def _times(factor: Tensor, number: float) -> Tensor:
    return factor if number == 1 else (factor.double() * number).to(factor.dtype)


def _adapter(state: Mapping[str, Tensor], keys: StateKeys, scalings: Mapping[str, float], label: str) -> Adapter:
    layers = {}
    for module, pair in keys.factors.items():
        try:
            A, B = matrices(state, pair)
            layers[module] = LoraLayer(A=A, B=B, scaling=scalings[module])
        except ValueError as error:
            raise ValueError(f"{module}: {label}: {error}") from None
    return Adapter(layers, {key: state[key].detach() for key in keys.extras})
