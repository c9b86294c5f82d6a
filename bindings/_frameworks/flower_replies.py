"""What the nodes of a round sent, checked and in an order that repeats."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .flower_compat import ArrayRecord, Message, MetricRecord, RecordDict
from .records import sent_lora_config, to_state_dict

ORDERS = ("content", "node")
logger = logging.getLogger("flwr")


@dataclass(frozen=True, eq=False)
class Reply:
    """One node's answer to a training message.

    Attributes:
        node: its id.
        content: everything it sent.
        arrays: its one ArrayRecord.
        metrics: its one MetricRecord.
        weight: the value of ``weighted_by_key``.
    """

    node: int
    content: RecordDict
    arrays: ArrayRecord
    metrics: MetricRecord
    weight: float

    @property
    def label(self) -> str:
        """How messages and reports call it."""
        return f"node {self.node}"

    def state_dict(self) -> dict[str, Tensor]:
        """Its arrays as tensors."""
        return to_state_dict(self.arrays, label=self.label)

    def lora_config(self) -> dict[str, Any] | None:
        """The LoRA settings that came along, or None."""
        return sent_lora_config(self.content, self.label)


def read_replies(messages: Iterable[Message], weighted_by_key: str, order: str) -> list[Reply]:
    """The replies that carry content, in order; failed ones are logged, as Flower's FedAvg does.

    By ``content`` (weight, the bytes of the arrays, settings, metrics) the order, and with it every bit of the result,
    is the same whenever the same was sent; node ids are drawn anew at every registration. ``node`` orders by id.

    Raises:
        ValueError: names the node whose reply does not have one ArrayRecord and one MetricRecord, whose metrics have
            other names than those of the rest, or whose weight is not a number of at least 0.
    """
    messages = list(messages)
    failed = [message for message in messages if message.has_error()]
    logger.info("aggregate_train: Received %s results and %s failures", len(messages) - len(failed), len(failed))
    for message in failed:
        logger.info("\t> Received error in reply from node %d: %s", message.metadata.src_node_id, message.error.reason)
    replies = [_reply(message, weighted_by_key) for message in messages if not message.has_error()]
    _check_metric_names(replies)
    return sorted(replies, key=(lambda r: r.node) if order == "node" else _content)


def mean_metrics(replies: Sequence[Reply], mean: Callable[..., MetricRecord | None], key: str) -> MetricRecord:
    """The nodes' metrics as ``mean`` (Flower's weighted mean, or the user's own function) puts them together.

    Raises:
        ValueError: names two nodes of which one sent a list of another length than the other, or none, where that is
            too much for ``mean``.
    """
    try:
        record = mean([reply.content for reply in replies], key)
    except (TypeError, ValueError) as error:
        _check_metric_lengths(replies, error)
        raise
    return MetricRecord() if record is None else record


def _reply(message: Message, weighted_by_key: str) -> Reply:
    node, content = message.metadata.src_node_id, message.content
    arrays = _only(list(content.array_records.values()), "ArrayRecord", node)
    metrics = _only(list(content.metric_records.values()), "MetricRecord", node)
    return Reply(node, content, arrays, metrics, _weight(metrics, weighted_by_key, node))


def _only(records: Sequence[Any], kind: str, node: int) -> Any:
    if len(records) != 1:
        raise ValueError(f"replies: node {node} sent {len(records)} {kind}s; expected one")
    return records[0]


def _weight(metrics: MetricRecord, key: str, node: int) -> float:
    if key not in metrics:
        raise ValueError(f"replies: node {node}: no {key!r} among its metrics, which weighs it (weighted_by_key)")
    value = metrics[key]
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"replies: node {node}: {key}: expected a number of at least 0, got {value!r}")
    return float(value)


def _check_metric_names(replies: Sequence[Reply]) -> None:
    names = [set(reply.metrics) for reply in replies]
    for reply, own in zip(replies[1:], names[1:], strict=True):
        if own != names[0]:
            odd = sorted(own ^ names[0])[0]
            raise ValueError(f"replies: {replies[0].label} and {reply.label} differ in the metric {odd!r}")


def _check_metric_lengths(replies: Sequence[Reply], cause: Exception) -> None:
    first = replies[0]
    for name, value in first.metrics.items():
        for reply in replies[1:]:
            own, other = _extent(value), _extent(reply.metrics[name])
            if own != other:
                nodes = f"{first.label} and {reply.label}"
                raise ValueError(
                    f"replies: {nodes} differ in the metric {name!r}: {own} and {other} ({cause})"
                ) from cause


def _extent(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else "one number"


def _content(reply: Reply) -> tuple[Any, ...]:
    """Bytes are compared up to the first difference, which is near: this costs next to nothing."""
    arrays = tuple((name, a.dtype, a.shape, a.data) for name, a in sorted(reply.arrays.items()))
    others = [(name, sorted(record.items())) for name, record in reply.content.config_records.items()]
    others += [(name, sorted(record.items())) for name, record in reply.content.metric_records.items()]
    return (reply.weight, arrays, repr(sorted(others)))
