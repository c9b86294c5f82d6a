"""Prototypes: the samples of each class whose mean is nearest the class mean, chosen without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgram.kernels import subset_select

from ._inputs import checked_whole

Embedding = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Chosen samples, class by class in ascending order of the labels, with the evidence for each class.

    Attributes:
        indices: rows of X that were chosen, int64, shape (sum of counts,): one block per class, ascending within it.
        error: ``||mean of the chosen - mean of the class||`` in the embedding, per class, shape (C,), float64.
        random_error: the root mean square of that error over random subsets of the same size,
            ``sqrt(tr(Sigma) (1/m) (1 - m/n))``, shape (C,), float64.
        swap_optimal: whether no exchange of one chosen sample for another lowers the error, shape (C,), bool.
        classes: the labels, ascending, int64, shape (C,).
        counts: how many samples were chosen of each class, int64, shape (C,).
    """

    indices: Tensor
    error: Tensor
    random_error: Tensor
    swap_optimal: Tensor
    classes: Tensor
    counts: Tensor

    def of(self, label: int) -> Tensor:
        """The rows of X chosen for one class, int64. Raises KeyError where the class has none."""
        blocks = dict(zip(self.classes.tolist(), self.indices.split(self.counts.tolist()), strict=True))
        return blocks[label]


def select_prototypes(
    X: Tensor | np.ndarray,
    y: Tensor | np.ndarray | Sequence[int],
    per_class: int | Mapping[int, int],
    *,
    restarts: int = 3,
    seed: int = 0,
    embedding: Embedding | None = None,
    backend: str = "auto",
) -> Prototypes:
    """Choose, for each class, the m samples whose mean is nearest the mean of the class.

    ``min over |S| = m of || mean_S phi - mean_class phi ||``, phi being the input itself (flattened) or ``embedding``:
    greedy selection, then exchanges of one sample for another as long as one lowers the error, from several starts.
    No network is trained or asked. STAMP's prototypes (arXiv:2506.12031, prototypical coreset selection) are meant to
    stand in for a class when a gradient is computed; the paper's public text leaves the selection algorithm open, and
    this criterion is our choice in its spirit. A small error bounds how far the mean of any *affine* function of phi is
    from the class's; of a network's gradients, which are not affine in phi, it promises nothing.

    Args:
        X: samples, shape (N, ...), floating point, or integers (images of bytes), which are read as float32.
        y: integer labels, shape (N,).
        per_class: m for every class, at least 1; or label -> m for every label in y (0 leaves a class out).
        restarts: random starts per class beside the greedy one, at least 0.
        seed: seed of the random starts. The same arguments give the same choice.
        embedding: maps X as given (as a tensor) to (N, ...) features; called once, without gradients.
        backend: "auto", "triton" or "torch".

    Returns:
        The chosen rows with their error beside the random subsets' error, on the device of X.

    Raises:
        ValueError: X and y differ in length or are empty, X or its embedding is not of finite real numbers, y, a number
            of prototypes, ``restarts`` or ``seed`` is not integer, more prototypes are asked for than a class has
            samples (the message names the class), or a label of y is missing from ``per_class``.
    """
    restarts, seed = checked_draws(restarts, seed)
    samples = as_samples(X)
    labels = as_labels(y, len(samples)).to(samples.device)
    features = embed(samples, embedding)
    classes, sizes = labels.unique(sorted=True, return_counts=True)
    wanted = _counts(per_class, classes.tolist(), sizes.tolist())
    keep = torch.tensor([m > 0 for m in wanted], device=classes.device)
    order = labels.argsort(stable=True)[keep.repeat_interleave(sizes)]
    counts = torch.tensor([m for m in wanted if m], dtype=torch.int64, device="cpu")
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), sizes[keep].cpu().cumsum(0)])
    chosen = subset_select(features[order], offsets, counts, restarts=restarts, seed=seed, backend=backend)
    return Prototypes(
        order[chosen.indices],  # a stable order, so that rows ascend within each class as the selection does
        chosen.error,
        chosen.random_error,
        chosen.swap_optimal,
        classes[keep],
        counts.to(classes.device),
    )


def checked_draws(restarts: int, seed: int) -> tuple[int, int]:
    """The number of random starts and their seed as ints. Raises ValueError where they are none, or out of range."""
    if (starts := checked_whole(restarts, "restarts")) < 0:
        raise ValueError(f"restarts: expected 0 or more, got {starts}")
    if not -(2**63) <= (number := checked_whole(seed, "seed")) < 2**64:
        raise ValueError(f"seed: expected a whole number of 64 bits, got {number}")
    return starts, number


def as_samples(X: Tensor | np.ndarray) -> Tensor:
    """X as a detached tensor, in its dtype. Raises ValueError where it is not (N, ...) real numbers with N > 0."""
    samples = _as_tensor(X, "X", "real samples of shape (N, ...)")
    if samples.layout is not torch.strided:
        raise ValueError(f"X: expected a dense tensor, got {samples.layout}")
    if samples.is_complex() or samples.ndim == 0 or samples.numel() == 0:
        kind = f"{samples.dtype} of shape {tuple(samples.shape)}"
        raise ValueError(f"X: expected real samples of shape (N, ...) with at least one element, got {kind}")
    return samples


def as_labels(y: Tensor | np.ndarray | Sequence[int], count: int) -> Tensor:
    """Y as int64 of shape (count,). Raises ValueError where it is not integer or of another length."""
    labels = _as_tensor(y, "y", "integer labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"y: expected integer labels, got {labels.dtype}")
    if labels.ndim != 1 or len(labels) != count:
        raise ValueError(f"y: shape {tuple(labels.shape)} does not belong to X with {count} samples")
    found = labels.to(torch.int64)
    if labels.dtype == torch.uint64 and bool((found < 0).any()):
        raise ValueError("y: a label of 2^63 or more")
    return found


def _as_tensor(given: Any, argument: str, expected: str) -> Tensor:
    """A detached tensor, on the CPU what was none."""
    if isinstance(given, Tensor):
        return given.detach()
    try:
        return torch.as_tensor(np.asarray(given), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{argument}: expected {expected} ({error})") from None


@torch.no_grad()
def embed(samples: Tensor, embedding: Embedding | None) -> Tensor:
    """The finite (N, p) features that means are taken of: float64 stays float64, everything else becomes float32."""
    if embedding is not None and not callable(embedding):
        raise ValueError(f"embedding: expected a function, got {type(embedding).__name__}")
    features = samples if embedding is None else embedding(samples)
    name = "X" if embedding is None else "embedding"
    if not isinstance(features, Tensor) or features.ndim == 0 or len(features) != len(samples):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{name}: expected a tensor of {len(samples)} rows, got {got}")
    if features.is_complex():
        raise ValueError(f"{name}: expected real features, got {features.dtype}")
    features = features.reshape(len(samples), -1)
    features = features if features.dtype == torch.float64 else features.to(torch.float32)
    finite = torch.isfinite(features).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"{name}: sample {int(finite.int().argmin())} is not finite")
    return features.contiguous()


def _counts(per_class: int | Mapping[int, int], classes: list[int], sizes: list[int]) -> list[int]:
    """The number of prototypes of every class, checked against its number of samples."""
    available = dict(zip(classes, sizes, strict=True))
    if not isinstance(per_class, Mapping):
        if (m := checked_whole(per_class, "per_class")) < 1:
            raise ValueError(f"per_class: expected at least 1, got {m}")
        per_class = dict.fromkeys(classes, m)
    per_class = {label: checked_whole(m, f"per_class: class {label}") for label, m in per_class.items()}
    if missing := [label for label in classes if label not in per_class]:
        raise ValueError(f"per_class: no number given for class {missing[0]}")
    for label, m in per_class.items():
        if not 0 <= m <= available.get(label, 0):
            raise ValueError(f"per_class: class {label} has {available.get(label, 0)} samples, {m} were asked for")
    if not any(per_class.values()):
        raise ValueError("per_class: no prototype is asked of any class")
    return [per_class[label] for label in classes]
