"""Thin ``nn.Module``s for another codebase's server loop: what the clients sent in, the global one out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from fedgram import flora_na
from fedgram.flora_na import Adapter, AdapterLike, LoraLayer, Report
from fedgram.flora_na.cohort import Cohort, make_cohort
from fedgram.stamp import Dual
from fedgram.stamp.spatial import copied

from ._frameworks.options import (
    AGGREGATION,
    MATCHING,
    check_aggregation,
    check_matching,
    matching,
    passed,
    plain_config,
    shown,
    unaligned,
)
from ._peft.merging import merge_configs
from ._plain.earlier import with_new_modules
from ._plain.keys import completed
from ._plain.scalings import check_scaling_options
from .plain import aggregate_state_dicts, match_state_dicts


class _RoundAggregator(nn.Module):
    """What both aggregators have: the options, checked when it is made, and the last round's report."""

    OPTIONS: ClassVar[tuple[str, ...]] = AGGREGATION

    def __init__(
        self,
        method: str = "als",
        rank: int | str | None = None,
        *,
        shared: bool = False,
        missing: str = "error",
        clip: float | str | None = None,
        min_cosine: float | None = None,
        residual: bool = False,
        anchor_previous: bool = False,
        align_previous: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.method, self.rank, self.shared, self.missing, self.backend = method, rank, shared, missing, backend
        self.clip, self.min_cosine, self.keeps_residual = clip, min_cosine, residual
        self.anchor_previous, self.align_previous = anchor_previous, align_previous
        check_aggregation(self)
        self.report: Report | None = None
        self.unaligned: list[str] = []

    def extra_repr(self) -> str:
        """The options, as ``print`` shows them."""
        return shown(self, self.OPTIONS)


class LoraAggregator(_RoundAggregator):
    """Aggregates one round after another with ``flora_na.aggregate`` (arXiv:2509.26399) and remembers the last result.

    The result of the last round is part of the ``state_dict``, so that a server's checkpoint holds it.

    Args:
        method, rank, shared, missing, clip, min_cosine, backend: as in ``flora_na.aggregate``. What no client of a
            round has stays as the last round's result has it.
        residual: also keep what the pair leaves out, in ``.residual``.
        anchor_previous: estimate the step from the last round's result (``anchor``), from the second round on.
        align_previous: rotate the result to the last round's (``align_to``, als and svd only), from the second round
            on, so that the clients' optimizer state stays meaningful. A module that is new in a round is left as it is.

    Attributes:
        report: of the last round, or None.
        unaligned: modules of the last round that ``align_previous`` found nothing earlier of.
        residual: Adapter of the last round's residual, or None.
        previous: the last round's result, or None; set it to start from a given global adapter.

    Raises:
        ValueError: an option that is none of these, or does not go with another.
    """

    residual: Adapter | None = None
    previous: Adapter | None = None

    def forward(
        self,
        adapters: Sequence[AdapterLike],
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> Adapter:
        """Aggregate one round.

        Args:
            adapters: one Adapter, or mapping module name -> LoraLayer, per client of this round.
            weights: one per client (its sample count); uniform by default.
            names: the clients' labels in errors and in the report.

        Returns:
            The global adapter, every layer with scaling 1; kept as ``previous``, so not to be changed in place.

        Raises:
            ValueError: as ``flora_na.aggregate``, or a module that is new to ``anchor_previous``; the state is then as
                before.
        """
        options = passed(self, self.previous)
        for argument in ("anchor", "align_to"):
            if (earlier := options[argument]) is not None:
                cohort = make_cohort(adapters, weights, names=names, missing=self.missing)
                options[argument] = with_new_modules(earlier, cohort.modules, partial(_first_layer, cohort), argument)
        result = flora_na.aggregate(adapters, weights, residual=self.keeps_residual, names=names, **options)
        self.unaligned = unaligned(self, self.previous, result.adapter.modules)
        self.previous = result.adapter if self.previous is None else _carried(self.previous, result.adapter)
        self.report, self.residual = result.report, result.residual
        return self.previous

    def get_extra_state(self) -> dict[str, Any]:
        """The last round's layers and extras with their roles: tensors, numbers and text, which torch.load takes."""
        if (previous := self.previous) is None:
            return {"layers": None}
        return {
            "layers": {name: (layer.A, layer.B, float(layer.scaling)) for name, layer in previous.modules.items()},
            "extras": dict(previous.extras),
            "config": None if previous.config is None else plain_config(previous.config),
            "roles": dict(previous.roles),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up from a checkpoint. Older ones lack the roles of the extras: they count as averaged."""
        self.report, self.residual, self.previous, self.unaligned = None, None, None, []
        if state["layers"] is not None:
            layers = {name: LoraLayer(A=A, B=B, scaling=s) for name, (A, B, s) in state["layers"].items()}
            self.previous = Adapter(layers, state["extras"], state["config"], state.get("roles", {}))


class StateDictAggregator(_RoundAggregator):
    """``plain.aggregate_state_dicts`` round after round (arXiv:2509.26399), the last result remembered.

    The last result is part of the ``state_dict``, so that a server's checkpoint holds it.

    Args:
        method, rank, shared, missing, clip, min_cosine, backend: as in ``flora_na.aggregate``. What no client of a
            round sends stays as the last round's result has it.
        residual: also keep what the pair leaves out, in ``.residual``.
        output_scaling: as in ``plain.aggregate_state_dicts``.
        anchor_previous: estimate the step from the last round's result (``anchor``), from the second round on.
        align_previous: rotate the result to the last round's (``align_to``, als and svd only), from the second round
            on, so that the clients' optimizer state stays meaningful. A module that is new in a round is left as it is.

    Attributes:
        report: of the last round, or None.
        unaligned: modules of the last round that ``align_previous`` found nothing earlier of.
        residual: state dict of the last round's residual, or None.
        scalings: of the last round's result, module -> number.
        previous: the last round's state dict, or None; set it to start from a given global adapter.

    Raises:
        ValueError: an option that is none of these, or does not go with another.
    """

    OPTIONS = (*AGGREGATION, "output_scaling")
    residual: dict[str, Tensor] | None = None
    previous: dict[str, Tensor] | None = None

    def __init__(
        self,
        method: str = "als",
        rank: int | str | None = None,
        *,
        output_scaling: float | Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(method, rank, **options)
        check_scaling_options(output_scaling=output_scaling)
        self.output_scaling = output_scaling
        self.scalings: dict[str, float] = {}

    def forward(
        self,
        state_dicts: Iterable[Mapping[str, Tensor]],
        weights: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
        **scaling: Any,
    ) -> dict[str, Tensor]:
        """Aggregate one round.

        Args:
            state_dicts: one LoRA state dict per client of this round.
            weights: one per client (its sample count); uniform by default.
            names: the clients' labels in errors and in the report.
            scaling: at most one of ``lora_alpha``, ``scalings`` and ``config``, see ``plain.aggregate_state_dicts``.

        Returns:
            The global state dict, of the tensors kept in ``previous``: copy them before they are changed in place.

        Raises:
            ValueError: as ``plain.aggregate_state_dicts``, or a module that is new to ``anchor_previous``; the state is
                then as before.
        """
        result = aggregate_state_dicts(
            state_dicts,
            weights,
            output_scaling=self.output_scaling,
            residual=self.keeps_residual,
            names=names,
            **passed(self, self.previous, self.scalings),
            **scaling,
        )
        self.unaligned = unaligned(self, self.previous, result.report.modules)
        self.report, self.residual = result.report, result.residual
        self.scalings = self.scalings | result.scalings
        self.previous = completed(self.previous or {}, result.state_dict)
        return dict(self.previous)

    def get_extra_state(self) -> dict[str, Any]:
        """The last round's state dict and scalings."""
        return {"previous": self.previous, "scalings": self.scalings}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up from a checkpoint."""
        self.report, self.residual, self.unaligned = None, None, []
        self.previous, self.scalings = state["previous"], state["scalings"]


class StateDictMatcher(nn.Module):
    """``stamp.SpatialMatcher`` (arXiv:2506.12031) as a module: clients' state dicts in, the new global one out.

    The global state is part of the ``state_dict``, so that a server's checkpoint holds it.

    Args:
        state: the first global state, name -> tensor, copied; None takes it from a checkpoint.
        c, lr, rescale, precise, backend: as in ``plain.match_state_dicts``.

    Attributes:
        state: the global state.
        dual: the last round's matching, with its certificate, or None.

    Raises:
        ValueError: an option out of range, or ``state`` is not of tensors or has no floating-point entry.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor] | None = None,
        *,
        c: float = 0.25,
        lr: float = 1.0,
        rescale: bool | str = "mean",
        precise: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.c, self.lr, self.rescale, self.precise, self.backend = c, lr, rescale, precise, backend
        check_matching(self)
        self.state: dict[str, Tensor] | None = None if state is None else copied(state)
        self.dual: Dual | None = None

    def forward(
        self,
        client_states: Iterable[Mapping[str, Tensor | None]],
        counts: Sequence[float] | None = None,
        *,
        deltas: bool = False,
        names: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Move the global state by one round of the clients.

        Args:
            client_states: one state dict per client that answered.
            counts: their numbers of samples; equal by default.
            deltas: they are ``new state - global state``; None for an entry stands for no change.
            names: the clients' labels in errors.

        Returns:
            The new global state. Its tensors are those held here: copy them before they are changed in place, as
            ``load_state_dict`` does.

        Raises:
            ValueError: as ``plain.match_state_dicts``, or there is no global state yet; the state is then as before.
        """
        if self.state is None:
            raise ValueError("state: no global state yet: pass one, or load a checkpoint")
        result = match_state_dicts(self.state, client_states, counts, deltas=deltas, names=names, **matching(self))
        self.state, self.dual = result.state_dict, result.dual
        return dict(result.state_dict)

    def get_extra_state(self) -> dict[str, Any]:
        """The global state."""
        return {"state": self.state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up from a checkpoint."""
        self.state, self.dual = None if state["state"] is None else copied(state["state"]), None

    def extra_repr(self) -> str:
        """The options, as ``print`` shows them."""
        return shown(self, MATCHING)


def _first_layer(cohort: Cohort, module: str) -> LoraLayer:
    return cohort.layer(cohort.present(module)[0], module)


def _carried(previous: Adapter, adapter: Adapter) -> Adapter:
    """The new adapter with what only the previous one has, and a configuration that declares it."""
    config, earlier = adapter.config, previous.config
    if config is not None and earlier is not None and (previous.extras.keys() - adapter.extras.keys()):
        config = merge_configs([config, earlier])
    extras, roles = {**previous.extras, **adapter.extras}, {**previous.roles, **adapter.roles}
    return Adapter({**previous.modules, **adapter.modules}, extras, config, roles)
