"""A memory of prototypes with a fixed number of places, shared out again as tasks arrive."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from ._inputs import checked_whole
from .prototypes import Embedding, as_labels, as_samples, checked_draws, embed, select_prototypes


@dataclass(frozen=True, eq=False)
class _Held:
    """One class of one task: the samples kept, and the mean feature of all samples ever seen, if it is tracked."""

    samples: Tensor
    mean: Tensor | None
    seen: int


class _Options(TypedDict):
    """What ``select_prototypes`` is called with."""

    restarts: int
    seed: int
    embedding: Embedding | None
    backend: str


class PrototypeMemory:
    """Samples of past tasks within a fixed budget, each class kept near its mean.

    The places are shared equally between the tasks, then equally between the classes of a task; what a small class
    cannot fill goes to the others. When a task arrives, the earlier ones give up places: their prototypes are chosen
    again **among those still kept** (the other samples are gone), by the criterion of ``select_prototypes``. So the
    error of an old task grows with every re-selection; ``errors`` reports it against the mean of everything seen.
    The same updates give the same memory.

    Which coreset algorithm the paper (STAMP, arXiv:2506.12031) uses is left open by its public text; the criterion
    here is ours. Matching the mean of the inputs, or of ``embedding``, bounds the means of affine functions only.

    Beside the samples, one mean feature vector per class is kept for ``errors``, unless ``track_errors`` is False.
    """

    def __init__(
        self,
        capacity: int,
        *,
        restarts: int = 3,
        seed: int = 0,
        embedding: Embedding | None = None,
        track_errors: bool = True,
        backend: str = "auto",
    ) -> None:
        """Make an empty memory.

        Args:
            capacity: the number of samples that may be kept in all, at least 1.
            restarts, seed, embedding, backend: as in ``select_prototypes``.
            track_errors: keep what ``errors`` needs: a mean of p float64 numbers per class.

        Raises:
            ValueError: ``capacity`` is below 1 or not whole, or ``restarts`` or ``seed`` no number of its kind.
        """
        self.capacity = checked_whole(capacity, "capacity")
        if self.capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        restarts, seed = checked_draws(restarts, seed)
        self._embedding, self._track_errors = embedding, track_errors
        self._options: _Options = {"restarts": restarts, "seed": seed, "embedding": embedding, "backend": backend}
        self._tasks: dict[Hashable, dict[int, _Held]] = {}

    @property
    def tasks(self) -> tuple[Hashable, ...]:
        """The names of the tasks held, in the order of their arrival."""
        return tuple(self._tasks)

    def __len__(self) -> int:
        """The number of samples kept, at most ``capacity``."""
        return sum(len(held.samples) for classes in self._tasks.values() for held in classes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the samples and class means kept, without labels."""
        held = [held for classes in self._tasks.values() for held in classes.values()]
        return sum(h.samples.nbytes + (0 if h.mean is None else h.mean.nbytes) for h in held)

    def update(self, X: Tensor | np.ndarray, y: Tensor | np.ndarray | Sequence[int], task: Hashable) -> None:
        """Take in samples of a task and share out the places again. On an error the memory is left as it was.

        Samples of a task that is already held join those kept of it, and the choice is made among both; each new
        sample then weighs as much as a kept one, which stood for many.

        Args:
            X: samples, shape (N, ...), any real dtype, which is kept.
            y: integer labels, shape (N,).
            task: the task's name.

        Raises:
            ValueError: as ``select_prototypes``; X has another shape or dtype than the samples held; or the budget
                leaves a task with fewer places than it has classes.
        """
        samples = as_samples(X)
        labels = as_labels(y, len(samples)).to(samples.device)
        self._check_kind(samples)
        merged = {**self._tasks, task: self._merged(samples, labels, task)}
        sizes = {name: sum(len(held.samples) for held in classes.values()) for name, classes in merged.items()}
        shares = fair_shares(self.capacity, list(sizes.values()))
        self._tasks = {
            name: self._shrunk(classes, share, name)
            for (name, classes), share in zip(merged.items(), shares, strict=True)
        }

    def task(self, task: Hashable) -> tuple[Tensor, Tensor]:
        """The prototypes of one task: X (n, ...) and int64 y (n,), classes ascending. Raises KeyError if not held."""
        classes = self._tasks[task]
        X = torch.cat([held.samples for held in classes.values()])
        return X, _labels(classes, X.device)

    def errors(self, task: Hashable) -> dict[int, float]:
        """Per class of a task, ``||mean of the kept - mean of all ever seen||`` in the embedding.

        Raises:
            KeyError: the task is not held.
            ValueError: the memory was made with ``track_errors=False``.
        """
        if not self._track_errors:
            raise ValueError("errors: the memory was made with track_errors=False")
        return {label: self._error(held) for label, held in self._tasks[task].items()}

    def _error(self, held: _Held) -> float:
        assert held.mean is not None
        return float((embed(held.samples, self._embedding).to(torch.float64).mean(0) - held.mean).norm())

    def _check_kind(self, samples: Tensor) -> None:
        for classes in self._tasks.values():
            first = next(iter(classes.values())).samples
            if samples.shape[1:] != first.shape[1:] or samples.dtype != first.dtype:
                got, held = (f"{t.dtype} {tuple(t.shape[1:])}" for t in (samples, first))
                raise ValueError(f"X: samples are {got}, the memory holds {held}")
            return

    def _merged(self, samples: Tensor, labels: Tensor, task: Hashable) -> dict[int, _Held]:
        """The classes of a task with the new samples added, labels ascending."""
        features = embed(samples, self._embedding)  # also checks that all are finite
        classes = dict(self._tasks.get(task, {}))
        for label in labels.unique().tolist():
            rows = labels == label
            mean = features[rows].to(torch.float64).mean(0) if self._track_errors else None
            new = _Held(samples[rows], mean, int(rows.sum()))
            classes[label] = _joined(classes[label], new) if label in classes else new
        return dict(sorted(classes.items()))

    def _shrunk(self, classes: dict[int, _Held], places: int, task: Hashable) -> dict[int, _Held]:
        """The classes of one task chosen down to ``places`` samples."""
        if places < len(classes):
            total = f"capacity: {self.capacity} samples leave task {task!r} {places} places"
            raise ValueError(f"{total}, fewer than its {len(classes)} classes")
        shares = fair_shares(places, [len(held.samples) for held in classes.values()])
        wanted = dict(zip(classes, shares, strict=True))
        full = {label: held for label, held in classes.items() if len(held.samples) > wanted[label]}
        if not full:
            return classes
        X = torch.cat([held.samples for held in full.values()])
        y = _labels(full, X.device)
        chosen = select_prototypes(X, y, {label: wanted[label] for label in full}, **self._options)
        kept = {label: replace(held, samples=X[chosen.of(label)]) for label, held in full.items()}
        return classes | kept


def fair_shares(total: int, available: Sequence[int]) -> list[int]:
    """Share ``total`` places equally, nobody above what it has; what does not divide goes to the earliest that can."""
    level = bisect_right(range(max(available) + 1), total, key=lambda h: sum(min(n, h) for n in available)) - 1
    shares = [min(n, level) for n in available]
    takers = [i for i, n in enumerate(available) if n > level]
    for i in takers[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _labels(classes: dict[int, _Held], device: torch.device) -> Tensor:
    """The label of every sample kept, class by class, int64."""
    labels = [label for label, held in classes.items() for _ in range(len(held.samples))]
    return torch.tensor(labels, dtype=torch.int64, device=device)


def _joined(old: _Held, new: _Held) -> _Held:
    seen = old.seen + new.seen
    mean = None if old.mean is None or new.mean is None else old.mean + (new.mean - old.mean) * (new.seen / seen)
    return _Held(torch.cat([old.samples, new.samples.to(old.samples.device)]), mean, seen)
