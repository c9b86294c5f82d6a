"""What the nodes of a round sent, checked and in an order that repeats."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
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
        weight: the value of ``weighted_by_key``.
    """

    node: int
    content: RecordDict
    arrays: ArrayRecord
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

    By ``content`` (weight, then the bytes of the arrays) the order, and with it every bit of the result, is the same
    whenever the same was sent; node ids are drawn anew at every registration. ``node`` orders by id.

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


def _reply(message: Message, weighted_by_key: str) -> Reply:
    node, content = message.metadata.src_node_id, message.content
    arrays = _only(list(content.array_records.values()), "ArrayRecord", node)
    metrics = _only(list(content.metric_records.values()), "MetricRecord", node)
    return Reply(node, content, arrays, _weight(metrics, weighted_by_key, node))


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
    names = [set(next(iter(reply.content.metric_records.values()))) for reply in replies]
    for reply, own in zip(replies[1:], names[1:], strict=True):
        if own != names[0]:
            odd = sorted(own ^ names[0])[0]
            raise ValueError(f"replies: {replies[0].label} and {reply.label} differ in the metric {odd!r}")


def _content(reply: Reply) -> tuple[Any, ...]:
    """Bytes are compared up to the first difference, which is near: this costs next to nothing."""
    arrays = sorted(reply.arrays.items())
    return (reply.weight, *((name, a.dtype, a.shape, a.data) for name, a in arrays))
