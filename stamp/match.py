"""Gradient matching: from K gradients to one direction that helps the worst-off task (STAMP, arXiv:2506.12031)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedgram.kernels import grad_combine, grad_gram, moved

from ._inputs import checked_strength
from .dual import Dual, looked_at, rescaling, solve_dual
from .gramian import Gramian, WeightsLike, normalised_weights
from .structure import GradientLike, Inputs, average, not_finite, read

NAMED = ("mapping", "module")
Target: TypeAlias = nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor]


@dataclass(frozen=True, eq=False)
class Match:
    """A matched direction and its evidence.

    Attributes:
        direction: ``d = sum_k v_k g_k`` in the structure of one input: a tensor, a list of tensors, or a dict from
            name to tensor (for state dicts and modules); new tensors in the input dtype, or those written to.
        dual: the solution of the dual, see ``Dual``.
        gramian: the centred Gram matrix that it was solved on, on the device where it was solved, as is the dual.
    """

    direction: Any
    dual: Dual
    gramian: Gramian
    _inputs: Inputs | None = field(default=None, repr=False)

    @property
    def weights(self) -> Tensor:
        """The dual weights ``w``, shape (K,), float64."""
        return self.dual.weights

    @property
    def coefficients(self) -> Tensor:
        """The coefficients ``v`` of the direction, shape (K,), float64."""
        return self.dual.coefficients

    @property
    def objective(self) -> float:
        """The optimal value of the dual; see ``Dual.objective``."""
        return self.dual.objective

    @property
    def gap(self) -> float:
        """What the worst-off task could gain at most by another direction in the ball; see ``Dual.gap``."""
        return self.dual.gap

    @property
    def relative_gap(self) -> float:
        """The gap relative to the terms it is a difference of; see ``Dual.relative_gap``."""
        return self.dual.relative_gap

    @property
    def status(self) -> str:
        """``optimal``, ``degenerate``, ``mean``, ``stationary``, ``inexact`` or ``nonfinite``; see ``Dual.status``."""
        return self.dual.status

    def check(self) -> Match:
        """Return self, or raise ValueError naming the task and entry of gradients that are not finite.

        ``match`` has checked already, except within ``torch.compile`` and the capture of a CUDA graph, which cannot
        look: call this after a replay, at whatever interval suits, while the gradients still hold their values.
        """
        if self.status == "nonfinite":
            reason = not_finite(self._inputs) if self._inputs is not None else "gradients: not finite"
            raise ValueError(reason)
        return self


def gramian(
    gradients: Iterable[GradientLike],
    weights: WeightsLike | None = None,
    *,
    precise: bool = True,
    backend: str = "auto",
) -> Gramian:
    """The centred Gram matrix of K gradients in one read of the data, float64 on their device.

    Arguments and errors as in ``match``; on a GPU the values are not looked at.
    """
    inputs = read(gradients)
    return _gramian(inputs, _weights(weights, inputs), precise, backend)


def match(
    gradients: Iterable[GradientLike],
    weights: WeightsLike | None = None,
    *,
    c: float = 0.25,
    rescale: bool | str = False,
    precise: bool = True,
    backend: str = "auto",
) -> Match:
    """Match K gradients: the direction d that maximises ``min_k <g_k, d>`` over ``||d - g0|| <= c ||g0||``.

    ``g0 = sum_k u_k g_k`` is the weighted mean. The data is read twice, once for the centred Gram matrix and once for
    the combination ``d = sum_k v_k g_k``; nothing of length d is stacked or copied. The dual is solved to rounding
    and the answer carries its certificate. From a GPU the K x K matrix comes to the host, where one solve is a hundred
    times as fast; within ``torch.compile`` and the capture of a CUDA graph all stays on the device (before a
    capture, call ``solve_dual(gramian(gradients), c, method="batched")`` once: what it needs cannot be set up within
    one). (STAMP, arXiv:2506.12031, gradient matching; the matching objective is that of CAGrad, with the exact
    solution in place of some steps of descent.)

    Args:
        gradients: one entry per task: K tensors, K lists of tensors, K state dicts, or K modules (the ``.grad`` of
            their trainable parameters). Same structure, shapes, dtypes and device; float64, float32, bfloat16, float16
            (dtypes may differ between parameters). None in a list or as ``.grad`` counts as zero; None for every task
            stays out (None in the list that comes back, absent from the dict). In state dicts, integer and
            bool entries and the statistics of normalisation layers (names that end in ``running_mean``,
            ``running_var``, ``num_batches_tracked``) are not gradients: their weighted mean is returned (integers
            rounded to the nearest, bools by majority), and they do not enter the match.
        weights: u, shape (K,), at least 0, normalised to sum 1; default uniform. A task of weight 0 is not part of the
            mean and still counts in the minimum: leave it out if it should not.
        c: strength in [0, 1); 0 returns the mean.
        rescale: False: d as defined. True or "authors": divided by 1 + c^2, as the authors' code does. "mean": divided
            by 1 + c, which makes the step of agreeing gradients exactly their mean.
        precise: form the Gram matrix with float64 products (default); see ``fedgram.kernels.grad_gram``. False is up
            to twice as fast, and right only for gradients of similar length that differ by far more than 1e-4 of it:
            a task whose gradient is short beside the mean is lost in the rounding of float32 products.
        backend: "auto", "triton" or "torch".

    Returns:
        A Match. With all gradients zero, or a mean of zero, its status is "stationary" and the direction zero.

    Raises:
        ValueError: no gradients, structures that differ (named), non-finite gradients (named; in a graph, traced or
            captured, by ``Match.check()``), c or weights out of range.
    """
    inputs = read(gradients)
    return match_inputs(inputs, _weights(weights, inputs), c=c, rescale=rescale, precise=precise, backend=backend)


def match_(
    into: Target,
    gradients: Iterable[GradientLike],
    weights: WeightsLike | None = None,
    *,
    c: float = 0.25,
    rescale: bool | str = False,
    precise: bool = True,
    backend: str = "auto",
) -> Match:
    """Match K gradients and write the direction where it is needed; otherwise as ``match``.

    Args:
        into: a module (the ``.grad`` of its trainable parameters), a tensor, a list of tensors, or a mapping from name
            to tensor, with one tensor per entry of a gradient. A tensor that requires grad, such as a parameter,
            receives the direction as its ``.grad``, made where it is missing and overwritten otherwise; any other
            tensor is overwritten itself. An entry without a gradient in any task is left alone. A tensor written to may
            be the same entry of one of the gradients.
        gradients, weights, c, rescale, precise, backend: as in ``match``.

    Raises:
        ValueError: as ``match``, or ``into`` lacks an entry or has another shape. Nothing is written then.
    """
    inputs = read(gradients)
    targets = _targets(into, inputs)
    u = _weights(weights, inputs)
    return match_inputs(inputs, u, targets, c=c, rescale=rescale, precise=precise, backend=backend)


def match_inputs(
    inputs: Inputs,
    u: Tensor,
    targets: Mapping[str, Tensor] | None = None,
    *,
    c: float,
    rescale: bool | str,
    precise: bool,
    backend: str,
) -> Match:
    """What ``match`` and ``match_`` do once their inputs are read; ``targets`` as ``match_`` takes them, by name."""
    rescaling(rescale, checked_strength(c))  # refuse a bad option before the data is read
    gram = _gramian(inputs, u, precise, backend)
    if gram.H.device.type != "cpu" and looked_at(gram.H.device):
        gram = _finite(gram.cpu(), inputs)
    dual = solve_dual(gram, c, rescale=rescale)
    averages = {name: average(tensors, u) for name, tensors in inputs.averaged.items()}
    out = None if targets is None else [_written(targets[name]) for name in inputs.names]
    direction = grad_combine(inputs.tensors, dual.coefficients, out=out, backend=backend)
    if targets is not None:
        with torch.no_grad():
            averages = {name: targets[name].copy_(value) for name, value in averages.items()}
    return Match(inputs.assemble(direction, averages), dual, gram, inputs)


@torch.no_grad()
def _gramian(inputs: Inputs, u: Tensor, precise: bool, backend: str) -> Gramian:
    n0, h, H = grad_gram(inputs.tensors, u, precise=precise, backend=backend)
    gram = Gramian(n0, h, H, moved(u, H.device))
    return _finite(gram, inputs) if H.device.type == "cpu" and looked_at(H.device) else gram


def _finite(gram: Gramian, inputs: Inputs) -> Gramian:
    """One bad number reaches every entry through the mean, so this look costs no pass over the data."""
    if not bool(gram.H.isfinite().all() & gram.h.isfinite().all() & gram.n0.isfinite()):
        raise ValueError(not_finite(inputs))
    return gram


def _weights(weights: WeightsLike | None, inputs: Inputs) -> Tensor:
    if torch.compiler.is_compiling() and (weights is None or isinstance(weights, Tensor)):
        K = len(inputs.tensors)
        u = torch.ones(K, dtype=torch.float64) if weights is None else weights.double()
        if u.shape != (K,):
            raise ValueError(f"weights: expected shape ({K},), got {tuple(u.shape)}")
        return u / u.sum()
    return torch.from_numpy(normalised_weights(weights, len(inputs.tensors)))


def _targets(into: Target, inputs: Inputs) -> dict[str, Tensor]:
    """Name -> tensor to write, checked against the gradients before anything is computed."""
    if isinstance(into, nn.Module):
        found = {name: p for name, p in into.named_parameters() if p.requires_grad}
    elif isinstance(into, Mapping):
        found = dict(into)
    elif isinstance(into, Tensor):
        found = {"": into}
    else:
        found = {f"[{p}]": t for p, t in enumerate(into)}
    if len(found) == len(inputs.order) and inputs.kind not in NAMED:  # positions, whatever the names
        found = dict(zip(inputs.order, found.values(), strict=True))
    elif inputs.kind in NAMED and not isinstance(into, nn.Module | Mapping):
        raise ValueError("into: the gradients have names; expected a module or a mapping from name to tensor")
    elif inputs.kind not in NAMED:
        raise ValueError(f"into: expected {len(inputs.order)} tensors, one per entry of a gradient, got {len(found)}")
    for name, row in [*zip(inputs.names, zip(*inputs.tensors, strict=True), strict=True), *inputs.averaged.items()]:
        if name not in found:
            raise ValueError(f"into: lacks {name!r}")
        if found[name].shape != row[0].shape or found[name].device != row[0].device:
            got, expected = (f"{tuple(t.shape)} on {t.device}" for t in (found[name], row[0]))
            raise ValueError(f"into: {name!r} is {got}; the gradients are {expected}")
    return found


def _written(tensor: Tensor) -> Tensor:
    """The tensor itself, or the ``.grad`` of one that requires it."""
    if not tensor.requires_grad:
        return tensor
    if tensor.grad is None:
        tensor.grad = torch.empty_like(tensor)
    return tensor.grad
