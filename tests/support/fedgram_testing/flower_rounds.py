"""A round of Flower's: what a strategy sends, what every node answers, on real messages."""

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedgram.bindings.flower import to_arrays

MODULES = {"encoder.0.query": (12, 10), "encoder.1.value": (9, 10)}
PREFIX = "base_model.model."
NODES = (901, 17, 405)
COUNTS = (30, 10, 60)


class Nodes:
    """All of a Grid that a strategy asks for before it sends."""

    def __init__(self, ids=NODES):
        self.ids = list(ids)

    def get_node_ids(self):
        return self.ids


def adapter(seed, rank=4, modules=MODULES, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, (m, n) in modules.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, n, generator=g).to(dtype)
        state[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(m, rank, generator=g).to(dtype)
    state[f"{PREFIX}classifier.weight"] = torch.randn(3, 10, generator=g).to(dtype)
    return state


def answer(strategy, states, counts=COUNTS, *, start=None, nodes=NODES, more=None, pack=True, arrival=None):
    """One round: the strategy sends ``start``, every node answers with its state; what is aggregated comes back."""
    sent = strategy.configure_train(1, to_arrays(adapter(99) if start is None else start), ConfigRecord(), Nodes(nodes))
    by_node = {message.metadata.dst_node_id: message for message in sent}
    replies = []
    for k, (node, state, count) in enumerate(zip(nodes, states, counts, strict=True)):
        records = {"arrays": to_arrays(state, pack_bf16=pack), "metrics": MetricRecord({"num-examples": count})}
        replies.append(Message(RecordDict(records | ((more or {}).get(k, {}))), reply_to=by_node[node]))
    return strategy.aggregate_train(1, [replies[k] for k in arrival or range(len(replies))])
