"""Gradient matching: from K gradients to one direction that helps the worst-off task (STAMP, arXiv:2506.12031)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedgram.kernels import grad_combine, grad_gram, moved

from ._look import may_look
from ._targets import Target, attach, check_fits, targets_of, written
from .dual import Dual, rescaling, solve_dual
from .gramian import Gramian, WeightsLike, normalised_weights, one_hot, recentred
from .structure import GradientLike, Inputs, average, finite, not_finite, read, unfit


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
        return float(self.dual.objective)

    @property
    def gap(self) -> float:
        """What the worst-off task could gain at most by another direction in the ball; see ``Dual.gap``."""
        return float(self.dual.gap)

    @property
    def relative_gap(self) -> float:
        """The gap relative to the terms it is a difference of; see ``Dual.relative_gap``."""
        return float(self.dual.relative_gap)

    @property
    def status(self) -> str:
        """``optimal``, ``degenerate``, ``mean``, ``stationary``, ``inexact`` or ``nonfinite``; see ``Dual.status``."""
        status = self.dual.status
        assert isinstance(status, str)  # of one problem
        return status

    def check(self) -> Match:
        """Return self, or raise ValueError naming the task and entry of gradients that are not finite.

        ``match`` has checked already, except within ``torch.compile`` and the capture of a CUDA graph, which cannot
        look: call this after a replay, at whatever interval suits, while the gradients still hold their values.
        """
        averaged = {} if self._inputs is None else self._inputs.averaged
        if self.status == "nonfinite" or not finite(t for column in averaged.values() for t in column):
            raise ValueError("gradients: not finite" if self._inputs is None else not_finite(self._inputs))
        return self


def gramian(
    gradients: Iterable[GradientLike],
    weights: WeightsLike | None = None,
    *,
    precise: bool = True,
    backend: str = "auto",
) -> Gramian:
    """The centred Gram matrix of K gradients in one read of the data, float64 on their device.

    Arguments, errors and further reads as in ``match``. A GPU is waited for, outside of a capture, to see whether the
    values are finite and whether a gradient is too short to be told from rounding beside the mean.
    """
    inputs = read(gradients)
    found = match_gramian(inputs, _weights(weights, inputs), precise, backend)
    return found.to(inputs.tensors[0][0].device)


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
    the combination ``d = sum_k v_k g_k``; nothing of length d is stacked or copied. Where a gradient is zero, or
    shorter than 2^-9 of the mean (an old task that is all but solved), its length would be lost in the mean's: then the
    data is read once more for the Gram matrix around the shortest one (and again, should others be shorter still by as
    much; within a graph never, and the status is "inexact"). The dual is solved to rounding
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
            by 1 + ||d - g0|| / ||g0||, which is 1 + c, or less where the status is degenerate (1 where d = g0); this
            makes the step of agreeing gradients exactly their mean.
        precise: form the Gram matrix with float64 products (default); see ``fedgram.kernels.grad_gram``. False is up
            to twice as fast, and right only for gradients of similar length that differ by far more than 1e-4 of it:
            a task whose gradient is short beside the mean, by less than the 2^-9 that makes for another (and precise)
            read, is lost in the rounding of float32 products.
        backend: "auto", "triton", "native" or "torch".

    Returns:
        A Match. With all gradients zero, or a mean of zero, its status is "stationary" and the direction the mean:
        zero, or what rounding of the gradients has left of it (see ``Dual.status``).

    Raises:
        ValueError: no gradients, structures that differ (named), non-finite gradients or statistics (named; in a
            graph, traced or captured, by ``Match.check()``), a direction with entries beyond the range of its dtype
            (named; in a graph they become infinite), c or weights out of range.
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
        ValueError: as ``match``, or ``into`` lacks an entry, has it in another shape or as integers, has one tensor
            twice, or is of a dtype that a weighted mean of statistics or integers exceeds (in a graph it becomes
            infinite, or wraps). Nothing is written then.
    """
    inputs = read(gradients)
    targets = targets_of(into, inputs)
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
    rescaling(rescale, c)  # refuse a bad option before the data is read
    gram = match_gramian(inputs, u, precise, backend)
    dual = solve_dual(gram, c, rescale=rescale)
    averages = {name: average(tensors, u) for name, tensors in inputs.averaged.items()}
    looked = may_look(gram.H.device)
    if looked and not finite(averages.values()):
        raise ValueError(not_finite(inputs))
    if looked and targets is not None:
        check_fits(targets, averages)
    out = None if targets is None else [written(targets[name]) for name in inputs.names]
    if looked and not _fits(dual, gram, inputs.tensors[0] if out is None else out):
        direction = _checked_direction(inputs, dual, out, backend)
    else:
        direction = grad_combine(inputs.tensors, dual.coefficients, out=out, backend=backend)
    if targets is not None:
        attach(targets, dict(zip(inputs.names, direction, strict=True)))
        with torch.no_grad():
            averages = {name: targets[name].copy_(value) for name, value in averages.items()}
    return Match(inputs.assemble(direction, averages), dual, gram, inputs)


def _fits(dual: Dual, gram: Gramian, written: Sequence[Tensor]) -> bool:
    """Whether ``sum_k |v_k| ||g_k||``, which no entry exceeds, is in the range of every dtype: no look at the data.

    So must the coefficients be in that of float32, in which gradients of 16 bits are multiplied.
    """
    sizes, lengths = dual.coefficients.abs(), gram.squares.clamp(min=0).sqrt()
    single = torch.finfo(torch.float32).max
    smallest = min(single, *(torch.finfo(t.dtype).max for t in written))
    return float(sizes @ lengths) < smallest / 2 and float(sizes.max()) < single


@torch.no_grad()
def _checked_direction(inputs: Inputs, dual: Dual, out: Sequence[Tensor] | None, backend: str) -> list[Tensor]:
    """The direction where it may be too large for its dtype: looked at before it is written."""
    found = [torch.empty_like(t) for t in (inputs.tensors[0] if out is None else out)]
    grad_combine(inputs.tensors, dual.coefficients, out=found, backend=backend)
    if not finite(found):
        raise ValueError(unfit(inputs, dict(zip(inputs.names, found, strict=True)), "the direction"))
    return found if out is None else grad_combine(inputs.tensors, dual.coefficients, out=out, backend=backend)


def match_gramian(inputs: Inputs, u: Tensor, precise: bool, backend: str) -> Gramian:
    """The Gramian of gradients that were read: where values may be looked at on the host, with the digits of all."""
    gram = gramian_about(inputs, u, None, precise, backend)
    K = len(inputs.tensors)
    if not may_look(inputs.tensors[0][0].device):
        return gram
    return recentred(gram, lambda k: gramian_about(inputs, u, one_hot(k, K), True, backend))


@torch.no_grad()
def gramian_about(inputs: Inputs, u: Tensor, centre: Tensor | None, precise: bool, backend: str) -> Gramian:
    """One read: the Gramian around ``sum_k centre_k g_k``, by default the mean under ``u``.

    Where values may be looked at it comes to the host, and is checked to be finite.
    """
    found = grad_gram(inputs.tensors, u if centre is None else centre, precise=precise, backend=backend)
    device = found.H.device
    if not may_look(device):
        return Gramian(*found, moved(u, device), None if centre is None else moved(centre, device))
    return _finite(replace(Gramian(*found).cpu(), weights=u, centre=centre), inputs)


def _finite(gram: Gramian, inputs: Inputs) -> Gramian:
    """One bad number reaches every entry through the mean, so this look costs no pass over the data."""
    if not bool(gram.H.isfinite().all() & gram.h.isfinite().all() & gram.n0.isfinite()):
        raise ValueError(not_finite(inputs))
    return gram


def _weights(weights: WeightsLike | None, inputs: Inputs) -> Tensor:
    if torch.compiler.is_compiling() and (weights is None or isinstance(weights, Tensor)):
        K = len(inputs.tensors)
        u = torch.ones(K, dtype=torch.float64, device="cpu") if weights is None else weights.double()
        if u.shape != (K,):
            raise ValueError(f"weights: expected shape ({K},), got {tuple(u.shape)}")
        return u / u.sum()
    return torch.from_numpy(normalised_weights(weights, len(inputs.tensors)))
