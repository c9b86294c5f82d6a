"""Strategies of Flower's message API (flwr 1.41 and later): ``FloraNA`` for LoRA adapters, ``Stamp`` for whole states.

Both are Flower's ``FedAvg`` with another combination of the clients' arrays: a server that constructs ``FedAvg(...)``
constructs ``FloraNA(...)`` with the same arguments, and clients send what they sent before. bfloat16 is converted at
the edge, on both sides, by ``to_arrays`` and ``to_state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._frameworks.flower_base import Combined, GramStrategy, logger, number
from ._frameworks.flower_replies import Reply
from ._frameworks.options import AGGREGATION, MATCHING, check_aggregation, check_matching, matching, passed, unaligned
from ._frameworks.records import lora_record, to_arrays, to_state_dict
from ._plain.scalings import check_scaling_options
from .plain import aggregate_state_dicts, match_state_dicts

__all__ = ["FloraNA", "Stamp", "lora_record", "to_arrays", "to_state_dict"]


class FloraNA(GramStrategy):
    """Aggregates clients' LoRA adapters into one pair of factors per module (FLoRA-NA, arXiv:2509.26399).

    The arrays are PEFT's adapter state dict, both ways: ``to_arrays(get_peft_model_state_dict(model))`` and
    ``set_peft_model_state_dict(model, to_state_dict(arrays))``. Other tensors in it (a classifier, biases) are
    averaged by weight.

    The clients' scalings (alpha / r) come, client by client, from the ``lora_record(config)`` of its reply, else from
    ``config``, ``lora_alpha`` or ``scalings`` here. With none of these all clients are taken to share one
    scaling, which is right when they share alpha; unequal ranks are then refused.

    The metrics of a round hold, beside the clients' own: ``fedgram-rho``, ``fedgram-rho-fedavg`` and
    ``fedgram-rho-optimal`` (relative divergence of the result, of averaged factors, of the best pair of that rank; NaN
    where nothing was learnt), ``fedgram-clients``, ``fedgram-bytes-received`` and ``fedgram-bytes-sent`` (arrays only).

    Args:
        method: ``fedavg``, ``flora-na``, ``als``, ``svd`` or ``stack``. What ``stack`` returns has the sum of the
            clients' ranks: it does not fit a client's model.
        rank: of the result; None is, per module, the largest client rank; ``"auto:0.99"`` as in
            ``flora_na.aggregate``.
        shared: ``flora-na`` with one pair of coefficients for all modules.
        missing: ``error``, ``renormalize`` or ``zero``, for a module that a client lacks. What no client of a round
            sends stays as it was sent out.
        clip, min_cosine: as in ``flora_na.aggregate``.
        residual: keep what the pair leaves out in ``.residual`` (a state dict), for the server to merge.
        config: a ``peft.LoraConfig`` or the mapping in ``adapter_config.json``, of all clients that send none.
        lora_alpha: one number; the scaling of a layer is ``lora_alpha / r``.
        scalings: one number: the scaling itself.
        output_scaling: what the receivers multiply by; needed where the clients' scalings differ.
        anchor_previous: estimate the clients' steps from the global factors that they started from (``anchor``).
        align_previous: rotate the result towards those (``align_to``, als and svd only), so that the clients'
            optimizer state stays meaningful. A module that was not sent out is left as it is, and the report lists it
            (``unaligned``); to ``anchor_previous`` it is an error.
        backend: ``auto``, ``triton``, ``native`` or ``torch``.
        reply_order: ``content`` gives the same bits whenever the same was sent, from whichever nodes; ``node`` orders
            by node id.
        **fedavg: every argument of Flower's ``FedAvg``: fraction_train, min_train_nodes, weighted_by_key,
            train_metrics_aggr_fn, ...

    Attributes:
        reports: round -> report of every module, JSON-ready; ``clients`` in it has the shares by node.
        residual: of the last round, or None.

    Raises:
        ValueError: an option that is none of these or does not go with another, or more than one way to tell the
            scalings.
    """

    OPTIONS = (*AGGREGATION, "lora_alpha", "scalings", "output_scaling")

    def __init__(
        self,
        *,
        method: str = "als",
        rank: int | str | None = None,
        shared: bool = False,
        missing: str = "error",
        clip: float | str | None = None,
        min_cosine: float | None = None,
        residual: bool = False,
        config: Any = None,
        lora_alpha: float | None = None,
        scalings: float | None = None,
        output_scaling: float | Mapping[str, float] | None = None,
        anchor_previous: bool = False,
        align_previous: bool = False,
        backend: str = "auto",
        reply_order: str = "content",
        **fedavg: Any,
    ) -> None:
        super().__init__(reply_order=reply_order, **fedavg)
        check_scaling_options(lora_alpha=lora_alpha, scalings=scalings, output_scaling=output_scaling, config=config)
        self.method, self.rank, self.shared, self.missing, self.backend = method, rank, shared, missing, backend
        self.clip, self.min_cosine = clip, min_cosine
        self.config, self.lora_alpha, self.scalings = config, lora_alpha, scalings
        self.output_scaling, self.keeps_residual = output_scaling, residual
        self.anchor_previous, self.align_previous = anchor_previous, align_previous
        check_aggregation(self)
        self._last_scalings: dict[str, float] = {}
        self.residual: dict[str, Any] | None = None

    def _combine(self, clients: Sequence[Reply]) -> Combined:
        previous = self._sent_state() if self.anchor_previous or self.align_previous else None
        result = aggregate_state_dicts(
            [client.state_dict() for client in clients],
            [client.weight for client in clients],
            residual=self.keeps_residual,
            output_scaling=self.output_scaling,
            names=[client.label for client in clients],
            **passed(self, previous, self._last_scalings),
            **self._scaling(clients),
        )
        self.residual, self._last_scalings = result.residual, self._last_scalings | result.scalings
        report = result.report.to_dict()
        report["unaligned"] = unaligned(self, previous, report["modules"])
        if report["unaligned"]:
            names = ", ".join(report["unaligned"])
            logger.info("aggregate_train: not aligned, since the clients were not sent any: %s", names)
        rhos = {name.replace("_", "-"): number(report[name]) for name in ("rho", "rho_fedavg", "rho_optimal")}
        return Combined(result.state_dict, rhos, report)

    def _scaling(self, clients: Sequence[Reply]) -> dict[str, Any]:
        """How ``aggregate_state_dicts`` is told the scalings: by the clients' own settings as soon as one sent them."""
        sent = [client.lora_config() for client in clients]
        if all(config is None for config in sent):
            return {"config": self.config, "lora_alpha": self.lora_alpha, "scalings": self.scalings}
        for client, config in zip(clients, sent, strict=True):
            if config is None and self.config is None:
                raise ValueError(
                    f"replies: {client.label} sent no lora_record, others did: its scaling is not known; "
                    "give config for those that send none"
                )
        return {"config": [self.config if config is None else config for config in sent]}


class Stamp(GramStrategy):
    """Moves the global state along the matched direction of the clients' deltas (STAMP, arXiv:2506.12031).

    The arrays are ``model.state_dict()``, both ways, through ``to_arrays`` and ``to_state_dict``. Statistics of
    normalisation layers, integers and bools become the clients' weighted mean (see ``stamp.SpatialMatcher``). Of LoRA
    factors it matches the factors; to match their products, see ``fedgram.bindings.matching``.

    The metrics of a round hold, beside the clients' own: ``fedgram-gap`` (how far the matching is from its optimum,
    relative), ``fedgram-objective``, ``fedgram-clients``, ``fedgram-bytes-received`` and ``fedgram-bytes-sent``.

    Args:
        c: strength of the matching in [0, 1); 0 is federated averaging.
        lr: the server's learning rate.
        rescale, precise, backend: as in ``stamp.SpatialMatcher``.
        deltas: the clients send ``their state - global state``.
        reply_order: as in ``FloraNA``.
        **fedavg: every argument of Flower's ``FedAvg``.

    Attributes:
        reports: round -> weights and coefficients by node, gap, objective and status of the matching.

    Raises:
        ValueError: an option out of range.
    """

    OPTIONS = (*MATCHING, "deltas")

    def __init__(
        self,
        *,
        c: float = 0.25,
        lr: float = 1.0,
        rescale: bool | str = "mean",
        precise: bool = True,
        deltas: bool = False,
        backend: str = "auto",
        reply_order: str = "content",
        **fedavg: Any,
    ) -> None:
        super().__init__(reply_order=reply_order, **fedavg)
        if not isinstance(deltas, bool):
            raise ValueError(f"deltas: expected True or False, got {deltas!r}")
        self.c, self.lr, self.rescale, self.precise, self.backend = c, lr, rescale, precise, backend
        self.deltas = deltas
        check_matching(self)

    def _combine(self, clients: Sequence[Reply]) -> Combined:
        state = self._sent_state()
        if state is None:
            raise ValueError(
                "aggregate_train: no global state to move: called before configure_train, or started without arrays"
            )
        result = match_state_dicts(
            state,
            [client.state_dict() for client in clients],
            [client.weight for client in clients],
            deltas=self.deltas,
            names=[client.label for client in clients],
            **matching(self),
        )
        dual = result.dual
        labels = [clients[k].label for k in result.clients]
        figures = {"gap": float(dual.relative_gap), "objective": float(dual.objective)}
        report: dict[str, Any] = {
            "c": float(self.c),
            **figures,
            "status": dual.status,
            "weights": dict(zip(labels, dual.weights.tolist(), strict=True)),
            "coefficients": dict(zip(labels, dual.coefficients.tolist(), strict=True)),
        }
        return Combined(result.state_dict, figures, report)
