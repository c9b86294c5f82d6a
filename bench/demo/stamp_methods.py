"""The methods side by side: what a client remembers, how it steps, and how the server moves."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedgram.stamp import PrototypeMemory, TemporalMatcher
from fedgram.stamp.memory import fair_shares

from .stamp_model import Batch, loss


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: what it is called there.
        memory: what the client's memory holds.
        step: gradient of the current batch alone ("current"), of batch and memory as one ("replay"), projected
            ("a-gem"), or one per task, averaged ("mean") or matched ("match").
        spatial: whether the server matches the clients' deltas; else it averages them by sample count.
    """

    name: str
    memory: Literal["none", "random", "prototypes"]
    step: Literal["current", "replay", "a-gem", "mean", "match"]
    spatial: bool


METHODS = (
    Method("FedAvg", "none", "current", False),
    Method("FedAvg + replay", "random", "replay", False),
    Method("A-GEM", "random", "a-gem", False),
    Method("STAMP without temporal", "prototypes", "mean", True),
    Method("STAMP without spatial", "prototypes", "match", False),
    Method("STAMP, random samples", "random", "match", True),
    Method("STAMP", "prototypes", "match", True),
)


class RandomMemory:
    """The budget and shares of ``PrototypeMemory``, with samples drawn at random: the control."""

    def __init__(self, capacity: int, *, seed: int) -> None:
        self.capacity = capacity
        self._draw = torch.Generator().manual_seed(seed)
        self._held: dict[Hashable, dict[int, Tensor]] = {}

    @property
    def tasks(self) -> tuple[Hashable, ...]:
        """The names of the tasks held."""
        return tuple(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the samples kept."""
        return sum(X.nbytes for classes in self._held.values() for X in classes.values())

    def update(self, X: Tensor, y: Tensor, task: Hashable) -> None:
        """Take in a new task and share out the places again, every class thinned at random."""
        self._held[task] = {label: X[y == label] for label in y.unique().tolist()}
        sizes = [sum(map(len, classes.values())) for classes in self._held.values()]
        for classes, places in zip(self._held.values(), fair_shares(self.capacity, sizes), strict=True):
            shares = fair_shares(places, list(map(len, classes.values())))
            for label, share in zip(list(classes), shares, strict=True):
                order = torch.randperm(len(classes[label]), generator=self._draw)[:share]
                classes[label] = classes[label][order]

    def task(self, task: Hashable) -> Batch:
        """The samples of one task, X and y."""
        classes = self._held[task]
        y = torch.cat([torch.full((len(X),), label) for label, X in classes.items()])
        return torch.cat(list(classes.values())), y


class Client:
    """One client: its memory, and its way of making a step's gradient."""

    def __init__(self, model: nn.Module, method: Method, capacity: int, c: float, seed: int) -> None:
        self.model, self.method = model, method
        self.memory = (
            RandomMemory(capacity, seed=seed)
            if method.memory == "random"
            else PrototypeMemory(capacity, seed=seed, track_errors=False)  # no byte more than the random one
        )
        self.sample_gradients = 0
        # rescale="mean": where tasks agree the step is their mean, so that all methods have the same learning rate.
        strength = c if method.step == "match" else 0.0
        self._matcher = TemporalMatcher(model, loss, self.memory, c=strength, rescale="mean")

    def fill_grad(self, batch: Batch) -> None:
        """Write one step's gradient into ``.grad``."""
        held = [self.memory.task(name) for name in self.memory.tasks]
        self.sample_gradients += len(batch[1]) + sum(len(y) for _, y in held)
        if self.method.step in ("mean", "match"):
            self._matcher.step(batch)
            return
        self.model.zero_grad()
        if self.method.step == "a-gem" and held:
            _project(self.model, batch, _joined(held))
        elif held:
            loss(self.model, _joined([batch, *held])).backward()
        else:
            loss(self.model, batch).backward()

    def remember(self, task: Batch, name: int) -> None:
        """Keep samples of a task that is over."""
        if self.method.memory != "none":
            self.memory.update(*task, name)


def _joined(batches: list[Batch]) -> Batch:
    X, y = zip(*batches, strict=True)
    return torch.cat(X), torch.cat(y)


def _project(model: nn.Module, batch: Batch, held: Batch) -> None:
    """A-GEM (arXiv:1812.00420): drop the component of the batch's gradient that would raise the memory's loss."""
    parameters = list(model.parameters())
    g, r = (torch.autograd.grad(loss(model, data), parameters) for data in (batch, held))
    gr = sum(float((a * b).sum()) for a, b in zip(g, r, strict=True))
    rr = sum(float((b * b).sum()) for b in r)
    for p, a, b in zip(parameters, g, r, strict=True):
        p.grad = a - (gr / rr) * b if gr < 0 < rr else a
