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
from typing import TypeAlias

from torch import Tensor

from fedgram.flora_na import Adapter, LoraLayer, Report

from .keys import FactorKey, StateKeys, matrices, restored, same_layer, sort_state
from .scalings import Numbers, ScalingRule, Settings, output_scaling_of, require_equal_ranks

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
        for module, pair in keys.factors.items():
            if module in self.layout:
                same_layer(pair, argument, self.layout[module], "the clients")
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
    rule = ScalingRule.make(labels, lora_alpha, scalings, config)
    own = [
        {module: rule.scaling(u, module, pair["A"].shape[0]) for module, pair in keys.factors.items()}
        for u, keys in enumerate(found)
    ]
    active = [u for u, takes_part in enumerate(took_part) if takes_part]
    layout = _layout([found[u] for u in active], [labels[u] for u in active])
    if not rule.known:
        require_equal_ranks([found[u] for u in active], [labels[u] for u in active])
    common = {m: output_scaling_of(m, [(labels[u], own[u][m]) for u in active if m in own[u]], output_scaling)
              for m in layout}  # fmt: skip
    unit = next(iter(common.values()), 1.0)
    adapters = []
    for state, keys, scaling, label in zip(states, found, own, labels, strict=True):
        adapters.append(_adapter(state, keys, {module: s / unit for module, s in scaling.items()}, label))
    return StateDictClients(adapters, common, unit, layout)


def _layout(found: Sequence[StateKeys], labels: Sequence[str]) -> dict[str, dict[str, FactorKey]]:
    """The names and shapes of every module as the first client with it has them; the others' layers must be alike."""
    layout: dict[str, dict[str, FactorKey]] = {}
    first: dict[str, str] = {}
    for keys, label in zip(found, labels, strict=True):
        for module, pair in keys.factors.items():
            same_layer(pair, label, layout.setdefault(module, pair), first.setdefault(module, label))
    return layout


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
