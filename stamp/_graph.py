"""Looking at the graph of a loss before gradients are taken through it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import Node

CHECKPOINT = "CheckpointFunctionBackward"
"""The node of torch's reentrant checkpoint, and of the libraries that took it over; it holds a ``run_function``."""


def walk(roots: Iterable[Node | None], without: Collection[Node] = ()) -> Iterator[Node]:
    """Every node that the roots lead to, once; never through those of ``without``."""
    seen = set(without)
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(child for child, _ in node.next_functions)


def check_visible(nodes: Iterable[Node], parameters: Iterable[Tensor], reached: Iterable[Tensor | None] = ()) -> None:
    """Refuse blocks under reentrant checkpointing that may hold parameters which are no part of the graph.

    Their nodes run a backward pass of their own, which ``torch.autograd.grad`` never starts: the parameters within
    would count as unused. Where the graph has all parameters besides (of a frozen block, say) nothing is hidden.

    Args:
        nodes: of the graph.
        parameters: those whose gradients are wanted.
        reached: those that the loss is known to depend on.

    Raises:
        ValueError: there is such a block, and a parameter that is not met otherwise.
    """
    block, met = False, {id(p) for p in reached}
    for node in nodes:
        block = block or (node.name() == CHECKPOINT and hasattr(node, "run_function"))
        met.add(id(getattr(node, "variable", None)))
    if block and any(id(p) not in met for p in parameters):
        raise ValueError(
            "model: a block runs under reentrant activation checkpointing, which hides its parameters from "
            "torch.autograd.grad; use checkpoint(..., use_reentrant=False)"
        )
