"""From state dicts to adapters and back: which scaling each layer has, and which one the receivers will use.

A result is used with the receivers' own scaling ``t`` of each module. What is estimated is ``dW / unit``: each
client's layer carries ``s_u / unit``. The unit of a module is its ``t``, so that the pair that comes out is the
receivers'. Only where modules are weighed against each other (``shared``, ``clip``, ``min_cosine``) all have the unit
of the first one; the pair of a module with another ``t`` is then scaled by ``unit / t``, half of it on either factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import TypeAlias

from torch import Tensor

from fedgram.flora_na import Adapter, LoraLayer, Report

from .earlier import OPTIONS, GlobalState, with_new_modules
from .keys import FactorKey, StateKeys, matrices, same_layer, sort_state
from .scalings import Numbers, ScalingRule, Settings, output_scaling_of, require_equal_ranks

Layout: TypeAlias = Mapping[str, Mapping[str, FactorKey]]


@dataclass(frozen=True, eq=False)
class StateDictClients:
    """The clients' state dicts as adapters.

    Attributes:
        adapters: one per client that took part; each layer's scaling is relative to the unit.
        scalings: module -> the output's scaling.
        units: module -> what the figures of a report are to be multiplied by.
        layout: module -> names and shapes under which the result is written.
        extras: of every other tensor its name -> that under which it is written.
        given: whether the output's scalings were given, and not taken from the clients.
        rule: how the clients' were told.
    """

    adapters: list[Adapter]
    scalings: dict[str, float]
    units: dict[str, float]
    layout: Layout
    extras: Mapping[str, str]
    given: bool
    rule: ScalingRule

    def relative(self, module: str) -> float:
        """The output's scaling in the module's unit."""
        return self.scalings[module] / self.units[module]

    def earlier(self, state: Mapping[str, Tensor], argument: str, rank: int | str | None) -> Adapter:
        """An earlier result as an adapter: its scaling is the output's. A ``GlobalState`` may lack new modules.

        ``rank``: of the result, as it was asked for.
        """
        keys = sort_state(state, argument)
        for module, pair in keys.factors.items():
            if module in self.layout:
                same_layer(pair, argument, self.layout[module], "the clients")
        scalings = {module: self.relative(module) if module in self.units else 1.0 for module in keys.factors}
        earlier = _adapter(state, keys, scalings, argument)
        told, option = (state.scalings, OPTIONS[argument]) if isinstance(state, GlobalState) else ({}, argument)
        if not self.given:
            if not isinstance(rank, int):
                self._check_ranks(earlier, told, option)
            if argument == "anchor":
                self._check_scalings(told, option)
        if not isinstance(state, GlobalState):
            return earlier
        return with_new_modules(earlier, self.layout, self._first_layer, argument)

    def _check_scalings(self, told: Mapping[str, float], option: str) -> None:
        """Refuse an anchor that was made for another scaling than the clients': it is read by theirs.

        ``told``: module -> the scaling that the earlier result was for, as far as that is known.
        """
        for module, scaling in self.scalings.items():
            if told.get(module, scaling) != scaling:
                raise ValueError(
                    f"{module}: {option}: the earlier result was for a scaling of {told[module]:g}, the clients' is "
                    f"now {scaling:g}: say in output_scaling by what the receivers multiply, in every round"
                )

    def _check_ranks(self, earlier: Adapter, told: Mapping[str, float], option: str) -> None:
        """Refuse an earlier rank above all clients', which the result will have, where the scaling may then be another.

        ``told``: module -> the scaling that the earlier result was for, as far as that is known.
        """
        for module, scaling in self.scalings.items():
            if module not in earlier.modules:
                continue
            own = max(a.modules[module].rank for a in self.adapters if module in a.modules)
            rank = earlier.modules[module].trimmed().rank
            if rank > own and not self.rule.holds_at_any_rank(scaling, told.get(module)):
                known = f"the clients' is {scaling:g}" if self.rule.known else "give lora_alpha, scalings or config"
                raise ValueError(
                    f"{module}: {option}: the earlier factors have rank {rank}, the clients' {own} at most, and "
                    f"at another the scaling may be another ({known}): say in output_scaling by what the receivers will"
                )

    def _first_layer(self, module: str) -> LoraLayer:
        return next(adapter.modules[module] for adapter in self.adapters if module in adapter.modules)

    def clip(self, clip: float | str | None) -> float | str | None:
        """A bound on norms of updates, in the unit that all modules then have; multiples of the median need none."""
        try:
            return None if clip is None or isinstance(clip, bool) else float(clip) / self._unit
        except (TypeError, ValueError):
            return clip

    def report(self, report: Report) -> Report:
        """The report with its norms in the units of ``dW``; the divergences and cosines are ratios and stay."""
        modules = {name: replace(one, norm=one.norm * abs(self.units[name])) for name, one in report.modules.items()}
        screening = report.screening
        if screening is not None:
            bound = None if screening.bound is None else screening.bound * self._unit
            screening = replace(screening, norms=screening.norms * self._unit, bound=bound)
        return replace(report, modules=modules, screening=screening)

    @property
    def _unit(self) -> float:
        """The size of the first module's unit."""
        return abs(next(iter(self.units.values()), 1.0))


def read_states(
    states: Sequence[Mapping[str, Tensor]],
    labels: Sequence[str],
    took_part: Sequence[bool],
    lora_alpha: Numbers,
    scalings: Numbers,
    config: Settings,
    output_scaling: float | Mapping[str, float] | None,
    one_unit: bool = False,
) -> StateDictClients:
    """Sort the names, find every layer's scaling and the output's, and wrap the tensors, of those that took part.

    ``one_unit``: modules are going to be weighed against each other.

    Raises:
        ValueError: names the client, module or argument.
    """
    rule = ScalingRule.make(labels, took_part, lora_alpha, scalings, config)
    states, labels = list(compress(states, took_part)), rule.labels
    found = [sort_state(state, label) for state, label in zip(states, labels, strict=True)]
    own = [
        {module: rule.scaling(u, module, pair["A"].shape[0]) for module, pair in keys.factors.items()}
        for u, keys in enumerate(found)
    ]
    layout = _layout(found, labels)
    if not rule.known:
        require_equal_ranks(found, labels)
    common = {}
    for module in layout:
        told = [(label, one[module]) for label, one in zip(labels, own, strict=True) if module in one]
        common[module] = output_scaling_of(module, told, output_scaling)
    units = dict.fromkeys(common, next(iter(common.values()), 1.0)) if one_unit else common
    adapters = []
    for state, keys, scaling, label in zip(states, found, own, labels, strict=True):
        adapters.append(_adapter(state, keys, {m: s / units[m] for m, s in scaling.items()}, label))
    extras = {name: key for keys in reversed(found) for name, key in keys.extras.items()}  # as the first has it
    return StateDictClients(adapters, common, units, layout, extras, output_scaling is not None, rule)


def _layout(found: Sequence[StateKeys], labels: Sequence[str]) -> dict[str, dict[str, FactorKey]]:
    """The names and shapes of every module as the first client with it has them; the others' layers must be alike."""
    layout: dict[str, dict[str, FactorKey]] = {}
    first: dict[str, str] = {}
    for keys, label in zip(found, labels, strict=True):
        for module, pair in keys.factors.items():
            same_layer(pair, label, layout.setdefault(module, pair), first.setdefault(module, label))
    return layout


def _adapter(state: Mapping[str, Tensor], keys: StateKeys, scalings: Mapping[str, float], label: str) -> Adapter:
    layers = {}
    for module, pair in keys.factors.items():
        try:
            A, B = matrices(state, pair)
            layers[module] = LoraLayer(A=A, B=B, scaling=scalings[module])
        except ValueError as error:
            raise ValueError(f"{module}: {label}: {error}") from None
    return Adapter(layers, {name: state[key].detach() for name, key in keys.extras.items()})
