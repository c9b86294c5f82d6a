"""What both strategies add to Flower's FedAvg: the arrays of the round kept, replies in order, a report a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._plain.keys import completed
from .flower_compat import ArrayRecord, ConfigRecord, FedAvg, Grid, Message, MetricRecord
from .flower_replies import ORDERS, Reply, mean_metrics, read_replies
from .options import shown
from .records import to_arrays, to_state_dict

PREFIX = "fedgram-"
logger = logging.getLogger("flwr")


@dataclass(frozen=True, eq=False)
class Combined:
    """One round: the new global state, its figures by metric name, and its whole report."""

    state: Mapping[str, Tensor]
    metrics: dict[str, float]
    report: dict[str, Any]


class GramStrategy(FedAvg):
    """FedAvg whose combination of the replies a subclass provides.

    Attributes:
        OPTIONS: names of the subclass's own options.
        reports: round -> the whole report, JSON-ready.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, reply_order: str = "content", **fedavg: Any) -> None:
        if reply_order not in ORDERS:
            raise ValueError(f"reply_order: expected {' or '.join(ORDERS)}, got {reply_order!r}")
        super().__init__(**fedavg)
        self.reply_order = reply_order
        self.reports: dict[int, dict[str, Any]] = {}
        self._sent: ArrayRecord | None = None
        self._bytes_sent = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; the arrays that the clients start from are kept until they answer."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._sent, self._bytes_sent = arrays, arrays.count_bytes() * len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the clients' arrays, and average their metrics; the round's figures stand beside these.

        What was sent out and no node sent back stays in the arrays as it was; the report lists it.

        Raises:
            ValueError: names the node, the tensor and the reason.
        """
        clients = read_replies(replies, self.weighted_by_key, self.reply_order)
        if not clients:
            return None, None
        combined = self._combine([client for client in clients if client.weight > 0] or clients)
        own = to_arrays(combined.state, pack_bf16=True)  # bfloat16 is there only if it came packed
        arrays = ArrayRecord(completed(self._sent or {}, own))
        combined.report["carried_over"] = [name for name in arrays if name not in own]
        metrics = mean_metrics(clients, self.train_metrics_aggr_fn, self.weighted_by_key)
        figures = combined.metrics | {
            "clients": len(clients),
            "bytes-received": sum(client.arrays.count_bytes() for client in clients),
            "bytes-sent": self._bytes_sent,
        }
        for name, value in figures.items():
            metrics[PREFIX + name] = value
        self.reports[server_round] = combined.report
        logger.info("aggregate_train: %s", ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        if carried := combined.report["carried_over"]:
            logger.info("aggregate_train: sent by no node, and carried over as it was: %s", ", ".join(carried))
        return arrays, metrics

    def _combine(self, clients: Sequence[Reply]) -> Combined:
        raise NotImplementedError

    def _sent_state(self) -> dict[str, Tensor] | None:
        """What the clients of this round started from, or None where it was theirs to choose."""
        return None if not self._sent else to_state_dict(self._sent, label="the global arrays")

    def summary(self) -> None:
        """Log the configuration: FedAvg's, then this strategy's own."""
        super().summary()
        logger.info("\t└──> Aggregation: %s", shown(self, (*self.OPTIONS, "reply_order")))


def number(value: float | None) -> float:
    """A figure as a metric; what has no value is NaN."""
    return math.nan if value is None else float(value)
