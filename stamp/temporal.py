"""Temporal matching: a client's step that also serves its earlier tasks (STAMP, arXiv:2506.12031)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from ._batches import first, to_device
from ._buffers import Kept, put_back, remembered
from ._graph import check_visible, walk
from ._inputs import checked_number, checked_whole
from ._loss import LossFn, checked_loss
from .dual import rescaling
from .gramian import normalised_weights
from .match import Match, match_inputs
from .structure import finite, read_gradients

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Memory(Protocol):
    """What holds the earlier tasks' prototypes, such as ``PrototypeMemory``."""

    @property
    def tasks(self) -> Sequence[Hashable]:
        """The names of the tasks held."""
        ...

    def task(self, task: Hashable) -> Any:
        """The batch of one task's prototypes, as ``loss_fn`` takes it."""
        ...


@dataclass(frozen=True, eq=False)
class TemporalStep:
    """One matched step.

    Attributes:
        match: the matching; entry 0 is the current task, the others the earlier ones in the memory's order.
        losses: the tasks' losses in that order, shape (K,), detached; in the multi-step form those of the last step.
        tasks: names of the earlier tasks that took part.
    """

    match: Match
    losses: Tensor
    tasks: tuple[Hashable, ...]


class _Options(TypedDict):
    """What ``match_inputs`` is called with."""

    c: float
    rescale: bool | str
    precise: bool
    backend: str


class TemporalMatcher:
    """Matches the gradient of the current task with one gradient per earlier task, computed on its prototypes.

    ::

        matcher = stamp.TemporalMatcher(model, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), memory)
        for batch in loader:
            matcher.step(batch)  # in place of zero_grad() and loss.backward()
            optimizer.step()
        memory.update(X, y, task)

    Tasks run one after another at the same parameters, each through the model in the mode it is in. Buffers, such as
    the running statistics of normalisation layers, follow the current task only: the prototypes do not move them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        memory: Memory,
        *,
        c: float = 0.25,
        current_weight: float | None = None,
        rescale: bool | str = False,
        precise: bool = True,
        backend: str = "auto",
    ) -> None:
        """Bind a model to its memory; both stay the caller's and may change between steps.

        Args:
            model: the module that is trained.
            loss_fn: ``loss_fn(model, batch)`` -> one number.
            memory: ``PrototypeMemory``, or anything with ``.tasks`` and ``.task(name)`` -> batch.
            c: strength of the matching in [0, 1).
            current_weight: weight of the current task in the mean gradient, in [0, 1]; the earlier tasks share the
                rest equally. Default: all tasks equal.
            rescale, precise, backend: as in ``match``.

        Raises:
            ValueError: ``current_weight`` is out of range.
        """
        if current_weight is not None and not 0 <= checked_number(current_weight, "current_weight") <= 1:
            raise ValueError(f"current_weight: expected a number in [0, 1], got {current_weight}")
        rescaling(rescale, c)
        self.model, self.loss_fn, self.memory = model, loss_fn, memory
        self.current_weight = None if current_weight is None else float(current_weight)
        self._options: _Options = {"c": c, "rescale": rescale, "precise": precise, "backend": backend}

    def step(self, batch: Any, task: Hashable | None = None) -> TemporalStep:
        """Write the matched direction into the parameters' ``.grad``, for any optimizer to follow.

        Args:
            batch: a batch of the current task, as ``loss_fn`` takes it.
            task: the current task's name; if the memory holds it already, it does not count as an earlier one.

        Raises:
            ValueError: a loss that is not one floating-point number or depends on no trainable parameter, a gradient
                that is not finite (task and parameter are named), a block under reentrant activation checkpointing, or
                a ``DistributedDataParallel`` over several ranks, whose gradients would not be averaged. ``.grad``,
                buffers and modes are as before then.
        """
        _refuse_ranks(self.model)
        earlier = self._earlier(task)
        parameters = _trainable(self.model)
        before = remembered(self.model)
        try:
            losses, gradients = self._gradients(batch, parameters, earlier)
            inputs = read_gradients(gradients, _labels(earlier))
            found = match_inputs(inputs, self._weights(len(gradients)), parameters, **self._options)
        except BaseException:
            put_back(before)  # a batch that is not finite has gone into running statistics
            raise
        for name in set(parameters) - set(inputs.names):
            parameters[name].grad = None  # no task reaches it
        return TemporalStep(found, torch.stack(losses), earlier)

    def _gradients(
        self, batch: Any, parameters: Mapping[str, nn.Parameter], earlier: Sequence[Hashable]
    ) -> tuple[list[Tensor], list[dict[str, Tensor | None]]]:
        """Every task's loss and gradient at the same parameters."""
        losses: list[Tensor] = []
        gradients: list[dict[str, Tensor | None]] = []
        after: list[Kept] = []  # what the current task leaves
        for k, (data, label) in enumerate(zip(self._batches(batch, earlier), _labels(earlier), strict=True)):
            loss = checked_loss(self.loss_fn(self.model, data), label)
            check_visible(walk([loss.grad_fn]), parameters.values())
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            losses.append(loss.detach())
            gradients.append(dict(zip(parameters, found, strict=True)))
            if k > 0:
                put_back(after)
            elif earlier:
                after = remembered(self.model)
        return losses, gradients

    def multi_step(
        self,
        batches: Iterable[Any],
        *,
        steps: int,
        optimizer: OptimizerFactory,
        lr: float = 1.0,
        task: Hashable | None = None,
    ) -> TemporalStep:
        """The multi-step form: every task trains alone from the same start, and the model moves along the match.

        The current task takes ``steps`` steps over ``batches``, each earlier task as many on its prototypes, all from
        the parameters and buffers that the model has now. The K differences ``end - start`` are matched, and the model
        becomes ``start + lr * d`` with the buffers that the current task's run left. ``.grad`` stays as it was. Holds
        K + 1 copies of the parameters.

        Args:
            batches: at least ``steps`` batches of the current task; no more are drawn.
            steps: inner steps per task, at least 1.
            optimizer: makes a fresh inner optimizer for each run, such as ``lambda p: torch.optim.SGD(p, lr=0.01)``.
            lr: the length of the outer step in units of the matched difference, finite.
            task: as in ``step``.

        Raises:
            ValueError: too few batches, ``steps`` below 1 or not whole, ``lr`` not finite, a loss as in ``step``, a
                difference that is not finite, or an end of the outer step beyond the range of its dtype. The model is
                as before then.
        """
        lr = checked_number(lr, "lr")
        if (steps := checked_whole(steps, "steps")) < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        earlier = self._earlier(task)
        parameters = _trainable(self.model)
        start = _copies(parameters)
        grads = {name: p.grad for name, p in parameters.items()}
        losses, deltas = [], []
        before = after = remembered(self.model)
        try:
            for k, (data, label) in enumerate(zip(self._batches(batches, earlier), _labels(earlier), strict=True)):
                stream = first(data, steps) if k == 0 else iter([data] * steps)
                losses.append(self._train(stream, optimizer(parameters.values()), label))
                deltas.append({name: p.detach() - start[name] for name, p in parameters.items()})
                after = remembered(self.model) if k == 0 else after
                _set(parameters, start)
                put_back(before)
            inputs = read_gradients(deltas, _labels(earlier))
            found = match_inputs(inputs, self._weights(len(deltas)), **self._options)
            _check_end(start, found.direction, lr)
        except BaseException:
            after = before
            raise
        finally:
            _set(parameters, start)
            put_back(after)
            for name, p in parameters.items():
                p.grad = grads[name]
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(_end(start[name], found.direction[name], lr))
        return TemporalStep(found, torch.stack(losses), earlier)

    def _train(self, batches: Iterator[Any], optimizer: torch.optim.Optimizer, label: str) -> Tensor:
        """Run the inner optimizer over the batches; the last loss."""
        for batch in batches:
            optimizer.zero_grad()
            loss = checked_loss(self.loss_fn(self.model, batch), label)
            loss.backward()
            optimizer.step()
        return loss.detach()

    def _earlier(self, task: Hashable | None) -> tuple[Hashable, ...]:
        return tuple(name for name in self.memory.tasks if task is None or name != task)

    def _batches(self, current: Any, earlier: Sequence[Hashable]) -> Iterator[Any]:
        """The current task's data, then the prototypes of the others on the device of the model."""
        yield current
        device = next((p.device for p in self.model.parameters()), None)
        for name in earlier:
            yield to_device(self.memory.task(name), device)

    def _weights(self, K: int) -> Tensor:
        return torch.from_numpy(normalised_weights(self._shares(K), K))

    def _shares(self, K: int) -> list[float] | None:
        if self.current_weight is None or K == 1:
            return None
        return [self.current_weight, *([(1 - self.current_weight) / (K - 1)] * (K - 1))]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model: has no trainable parameter")
    return parameters


def _labels(earlier: Sequence[Hashable]) -> list[str]:
    """What the tasks are called in messages."""
    return ["the current task", *(f"earlier task {name!r}" for name in earlier)]


def _end(start: Tensor, direction: Tensor, lr: float) -> Tensor:
    return torch.add(start.to(torch.float64), direction.to(torch.float64), alpha=lr).to(start.dtype)


def _check_end(start: Mapping[str, Tensor], direction: Mapping[str, Tensor], lr: float) -> None:
    """Refuse an outer step whose end is not finite."""
    for name, t in start.items():
        if not finite([_end(t, direction[name], lr)]):
            limit = torch.finfo(t.dtype).max
            raise ValueError(f"lr: with {lr:g}, {name!r} would exceed {limit:.5g}, the largest number of {t.dtype}")


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


@torch.no_grad()
def _set(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, t in tensors.items():
        t.copy_(values[name])


def _refuse_ranks(model: nn.Module) -> None:
    """Raise ValueError for DistributedDataParallel: it averages what reaches ``.grad``, and autograd is asked here."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and module.process_group.size() > 1:
            raise ValueError(
                "model: step would not average over the ranks of DistributedDataParallel; pass its .module, and "
                "average .grad after step"
            )
