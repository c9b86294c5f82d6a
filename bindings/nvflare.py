"""NVIDIA FLARE 2.9: aggregators for its FedAvg controller and recipes (``pip install 'fedgram[nvflare]'``).

The server holds the clients' models of a round until all have arrived and aggregates them in the order of the clients'
names, so that results repeat. Clients send what ``get_peft_model_state_dict`` gives (``FloraNAAggregator``) or their
whole state dict (``StampAggregator``), as torch tensors or as numpy arrays, full or as differences. The weight of a
client is the ``NUM_STEPS_CURRENT_ROUND`` of its model's meta, as in FLARE's own FedAvg.

Differences are added to the global model in the wider dtype of the two; the result has that of the global model.
bfloat16 travels only as torch tensors: numpy has none. ``FloraNARecipe`` and ``StampRecipe`` ask for tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

try:
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator

    from ._frameworks.nvflare_models import Collected, Round, global_params, like_sent, write_report
    from ._frameworks.nvflare_recipes import AdapterModel, FloraNARecipe, StampRecipe, register
except ImportError as error:
    raise ImportError(
        f"fedgram.bindings.nvflare needs NVIDIA FLARE 2.9 or newer ({error}): pip install 'fedgram[nvflare]'"
    ) from error

from ._frameworks.options import (
    AGGREGATION,
    MATCHING,
    check_aggregation,
    check_matching,
    matching,
    passed,
    plain_config,
    plain_value,
    unaligned,
)
from ._plain.scalings import check_scaling_options
from .plain import aggregate_state_dicts, match_state_dicts

__all__ = ["AdapterModel", "FloraNAAggregator", "FloraNARecipe", "StampAggregator", "StampRecipe"]

WEIGHT_KEY = "NUM_STEPS_CURRENT_ROUND"


class _RoundAggregator(ModelAggregator):
    """Collects the models of one round; a subclass says what becomes of them."""

    def __init__(self, weighted_by: str | None, report: bool) -> None:
        super().__init__()
        self.weighted_by, self.report = weighted_by, report
        self._collected = Collected()

    def accept_model(self, model: FLModel) -> None:
        """Take one client's model. What is wrong with it is said by ``aggregate_model``, which ends the job."""
        self._collected.add(model, _sender(self.fl_ctx))

    def aggregate_model(self) -> FLModel:
        """Aggregate the models of the round.

        Raises:
            ValueError: names the client and the tensor, or that no client's model arrived. FLARE then ends the job.
        """
        collected, self._collected = self._collected, Collected()
        current = collected.round(self.weighted_by, global_params(self.fl_ctx))
        state, evidence, summary = self._combined(current)
        params = current.completed(state)
        evidence["carried_over"] = [key for key in params if key not in state]
        if self.report:
            write_report(self.fl_ctx, current, evidence)
        shown = [(key, value) for key, value in summary.items() if value is not None]
        self.info(
            ", ".join(f"{key} {format(value, '.4g' if isinstance(value, float) else '')}" for key, value in shown)
        )
        if evidence["carried_over"]:
            self.info(f"sent by no client, and carried over as it was: {', '.join(evidence['carried_over'])}")
        metrics, meta = current.mean_metrics(), {"fedgram": summary}
        return FLModel(params=like_sent(params, current), metrics=metrics, meta=meta)

    def reset_stats(self) -> None:
        """Forget what has been accepted; called before every round."""
        self._collected = Collected()

    def _make_plain(self, *options: str) -> None:
        """FLARE rebuilds the object on the server from attributes that are called as the arguments are, by way of JSON,
        which has no numbers of numpy and torch."""
        for option in options:
            setattr(self, option, plain_value(getattr(self, option)))

    def _combined(self, current: Round) -> tuple[Mapping[str, Any], dict[str, Any], dict[str, Any]]:
        """The new state, the evidence in full, and its summary in numbers and words."""
        raise NotImplementedError


class FloraNAAggregator(_RoundAggregator):
    """FLoRA-NA (arXiv:2509.26399) for FLARE's FedAvg: ``FedAvgRecipe(aggregator=FloraNAAggregator(), ...)``.

    Clients send the state dict of their adapter, every LoRA factor whole or as difference from the global model. What
    else is in it (a classifier's head) is averaged by weight.

    Args:
        method, rank, shared, missing, clip, min_cosine, backend: as in ``flora_na.aggregate``.
        lora_alpha, scalings, config, output_scaling: of all clients, as in ``plain.aggregate_state_dicts``; none is
            needed where all clients train with the same LoRA configuration. A client that trains with another alpha
            says so in its model's meta: ``FLModel(..., meta={"lora_alpha": 32})``; then every client must, or
            ``lora_alpha`` here stands for those that do not.
        anchor_previous: estimate the step from the global adapter that the clients started from (``anchor``).
        align_previous: rotate the result to that adapter (``align_to``, als and svd only), so that clients' optimizer
            state stays meaningful. A module that it lacks is left as it is, and the report lists it (``unaligned``); to
            ``anchor_previous`` it is an error.
        weighted_by: key of the client's weight in its model's meta; where no client has it, all count equally. None
            counts all equally.
        report: write ``fedgram_round_<n>.json`` (rho of every module, and the yardsticks) into the server's app folder.

    The global model's meta carries ``fedgram``: rho, rho_fedavg, rho_optimal in all, of the model as it goes back.
    What no client of a round sent stays in it as it was; the report lists it (``carried_over``).

    Raises:
        ValueError: an option that is none of these, or does not go with another.
    """

    def __init__(
        self,
        method: str = "als",
        rank: int | str | None = None,
        shared: bool = False,
        missing: str = "error",
        clip: float | str | None = None,
        min_cosine: float | None = None,
        lora_alpha: float | None = None,
        scalings: float | None = None,
        config: Any = None,
        output_scaling: float | None = None,
        anchor_previous: bool = False,
        align_previous: bool = False,
        weighted_by: str | None = WEIGHT_KEY,
        report: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(weighted_by, report)
        check_scaling_options(lora_alpha=lora_alpha, scalings=scalings, output_scaling=output_scaling, config=config)
        self.method, self.rank, self.shared, self.missing, self.backend = method, rank, shared, missing, backend
        self.lora_alpha, self.scalings, self.output_scaling = lora_alpha, scalings, output_scaling
        self.config = None if config is None else plain_config(config)
        self.clip, self.min_cosine = clip, min_cosine
        self.anchor_previous, self.align_previous = anchor_previous, align_previous
        check_aggregation(self)
        self._last_scalings: dict[str, float] = {}
        self._make_plain(*AGGREGATION, "lora_alpha", "scalings", "output_scaling", "report")

    def _combined(self, current: Round) -> tuple[Mapping[str, Any], dict[str, Any], dict[str, Any]]:
        previous = current.earlier() if self.anchor_previous or self.align_previous else None
        result = aggregate_state_dicts(
            current.states(),
            current.weights,
            lora_alpha=self._alphas(current),
            scalings=self.scalings,
            config=self.config,
            output_scaling=self.output_scaling,
            names=current.names,
            dtypes=current.dtypes(),
            **passed(self, previous, self._last_scalings),
        )
        self._last_scalings |= result.scalings
        evidence = result.report.to_dict()
        evidence["unaligned"] = unaligned(self, previous, evidence["modules"])
        if evidence["unaligned"]:
            self.info(f"not aligned, since the global model has none: {', '.join(evidence['unaligned'])}")
        summary = {key: evidence[key] for key in ("method", "rho", "rho_fedavg", "rho_optimal")}
        return result.state_dict, evidence, summary

    def _alphas(self, current: Round) -> float | Sequence[float] | None:
        """The clients' own alphas where they state them."""
        stated = current.stated("lora_alpha")
        if all(alpha is None for alpha in stated):
            return self.lora_alpha
        alphas: list[float] = []
        for name, alpha in zip(current.names, stated, strict=True):
            alpha = self.lora_alpha if alpha is None else alpha
            if alpha is None:
                raise ValueError(f"lora_alpha: {name} does not state its own, others do: give the aggregator one")
            alphas.append(alpha)
        return alphas


class StampAggregator(_RoundAggregator):
    """STAMP's spatial matching (arXiv:2506.12031) for FLARE's FedAvg: ``FedAvgRecipe(aggregator=StampAggregator())``.

    Clients send their whole state dict, or its difference from the global model. The global model moves along the
    direction that helps the worst-off client most; see ``plain.match_state_dicts``.

    Args:
        c, lr, rescale, precise, backend: as in ``plain.match_state_dicts``.
        weighted_by: key of the client's weight in its model's meta; where no client has it, all count equally. None
            counts all equally.
        report: write ``fedgram_round_<n>.json`` (weights, coefficients, gap) into the server's app folder.

    The global model's meta carries ``fedgram``: status, gap and relative gap of the matching.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        c: float = 0.25,
        lr: float = 1.0,
        rescale: bool | str = "mean",
        precise: bool = True,
        weighted_by: str | None = WEIGHT_KEY,
        report: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(weighted_by, report)
        self.c, self.lr, self.rescale, self.precise, self.backend = c, lr, rescale, precise, backend
        check_matching(self)
        self.c, self.lr = float(c), float(lr)
        self._make_plain(*MATCHING, "report")

    def _combined(self, current: Round) -> tuple[Mapping[str, Any], dict[str, Any], dict[str, Any]]:
        result = match_state_dicts(
            current.base(),
            current.sent,
            current.weights,
            deltas=current.differences,
            names=current.names,
            **matching(self),
        )
        dual = result.dual
        summary = {"status": dual.status, "gap": dual.gap, "relative_gap": dual.relative_gap}
        evidence = summary | {
            "clients": [current.names[k] for k in result.clients],
            "weights": dual.weights.tolist(),
            "coefficients": dual.coefficients.tolist(),
            "gramian": result.gramian.dense().tolist(),
        }
        return result.state_dict, evidence, summary


def _sender(fl_ctx: FLContext | None) -> str | None:
    """Who sent what is being accepted, where the controller does not say it in the model's meta."""
    peer = fl_ctx.get_peer_context() if fl_ctx is not None else None
    return None if peer is None else peer.get_identity_name() or None


register(FloraNAAggregator, StampAggregator)
