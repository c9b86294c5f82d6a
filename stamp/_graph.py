"""Looking at the graph of a loss before gradients are taken through it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


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


def check_visible(nodes: Iterable[Node], parameters: Collection[Tensor]) -> None:
    """Refuse blocks under reentrant checkpointing, whose parameters are no part of the graph.

    Their nodes run a backward pass of their own, which ``torch.autograd.grad`` never starts: the parameters within
    would count as unused. A checkpoint that takes its parameters as arguments is an ordinary node.

    Raises:
        ValueError: there is such a block.
    """
    owned = {id(p) for p in parameters}
    for node in nodes:
        if not isinstance(node, BackwardCFunction) or "checkpoint" not in node.name().lower():
            continue
        if not any(id(getattr(child, "variable", None)) in owned for child, _ in node.next_functions):
            raise ValueError(
                f"model: a block runs under reentrant activation checkpointing ({node.name()}), which hides its "
                "parameters from torch.autograd.grad; use checkpoint(..., use_reentrant=False)"
            )
