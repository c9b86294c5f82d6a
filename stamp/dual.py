"""The dual of gradient matching: K x K numbers in, weights and a certificate out (STAMP, arXiv:2506.12031; CAGrad)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ._batched import solve_batched
from ._exact import STATUSES, Solution, solve
from ._inputs import (
    FLOAT32,
    HALF,
    check_centre,
    check_finite,
    check_values,
    checked_matrix,
    checked_strength,
)
from ._look import may_look
from ._problem import problem_of
from ._range import batch_in_range, in_range
from .gramian import Gramian, WeightsLike, normalised_weights

TOLERANCE = 1e-9  # relative gap up to which a result counts as solved
CROWD = 64  # problems from which the batched method is the faster one on a CPU


@dataclass(frozen=True, eq=False)
class Dual:
    """The solution of ``min over w in the simplex of <g_w, g0> + c ||g0|| ||g_w||``, one or a batch of them.

    The tensors lie on the device of the Gram matrix. ``objective``, ``gap``, ``scale``, ``relative_gap`` and ``status``
    are read when asked for: on a GPU that waits for the device, so ask after the direction is applied.

    Attributes:
        weights: ``w``, shape (K,) or (batch, K), float64, at least 0, summing to 1.
        coefficients: ``v``, same shape: the matched direction is ``d = sum_k v_k g_k``.
        iterations: faces solved, or the fixed number of passes of the batched method.
    """

    weights: Tensor
    coefficients: Tensor
    iterations: int
    _numbers: Tensor = field(repr=False)  # (..., 3): objective, gap, scale
    _codes: Tensor = field(repr=False)  # (...): index into STATUSES
    _given: tuple[Gramian | Tensor, float, Tensor, bool | str] = field(repr=False)  # matrix, c, weights, rescale

    @property
    def objective(self) -> float | Tensor:
        """``f(w)``: no direction within ``c ||g0||`` of ``g0`` gains more than this on every task."""
        return self._number(0)

    @property
    def gap(self) -> float | Tensor:
        """``f(w) - min_k <g_k, d>``, at least 0: bounds the distance to the optimum of the primal and of the dual.

        ``d`` is the direction before ``rescale``. Computed from the Gram matrix at the returned ``w``.
        """
        return self._number(1)

    @property
    def scale(self) -> float | Tensor:
        """The largest ``|<g_k, g0>| + c ||g0|| ||g_k||`` over the tasks that take part in the answer."""
        return self._number(2)

    @property
    def relative_gap(self) -> float | Tensor:
        """``gap / scale`` (0 where both are 0): float64 sums of terms of that size cannot certify below about 1e-16."""
        gap, scale = self._numbers[..., 1], self._numbers[..., 2]
        ratio = torch.where(scale > 0, gap / torch.where(scale > 0, scale, 1.0), gap)
        return float(ratio) if ratio.ndim == 0 else ratio

    @property
    def status(self) -> str | tuple[str, ...]:
        """How each problem ended.

        - ``optimal``: the relative gap is at most 1e-9.
        - ``degenerate``: some weighting of the gradients is zero, to the rounding of the Gram matrix; the direction is
          the mean gradient projected on the cone ``<g_k, d> >= 0``, the limit of the matching. The objective is 0.
        - ``mean``: ``c = 0``; the direction is the mean gradient.
        - ``stationary``: the mean gradient is zero, and so is the direction. A mean counts as zero, and is itself the
          direction, below 6e-8 of the lengths that are averaged, the rounding of a Gram matrix, and below about 1e-154,
          whose square is not a float64 number any more.
        - ``inexact``: the gap is above 1e-9, or may be: the rounding of the Gram matrix could hide as much, as it does
          around the mean of gradients far longer than one that binds. For a batch on a GPU ``refine()`` may close it.
        - ``nonfinite``: the Gram matrix has infinite or NaN entries; the coefficients are NaN.
        """
        codes = self._codes.tolist()
        return STATUSES[codes] if isinstance(codes, int) else tuple(STATUSES[k] for k in codes)

    def refine(self) -> Dual:
        """Solve again on the CPU, to rounding, every problem that is ``inexact``; waits for the device."""
        statuses = self.status if isinstance(self.status, tuple) else (self.status,)
        bad = [i for i, status in enumerate(statuses) if status == "inexact"]
        if not bad:
            return self
        if self.weights.ndim == 1:
            return _single(*self._given, self.weights.device)
        matrix, c, u, rescale = self._given
        weights, coefficients = self.weights.clone(), self.coefficients.clone()
        numbers, codes = self._numbers.clone(), self._codes.clone()
        for i in bad:
            one = _single(_entry(matrix, i), c, u[i], rescale, weights.device)
            weights[i], coefficients[i], numbers[i], codes[i] = one.weights, one.coefficients, one._numbers, one._codes
        return replace(self, weights=weights, coefficients=coefficients, _numbers=numbers, _codes=codes)

    def _number(self, index: int) -> float | Tensor:
        value = self._numbers[..., index]
        return float(value) if value.ndim == 0 else value


def solve_dual(
    gramian: Gramian | Tensor | np.ndarray,
    c: float,
    weights: WeightsLike | None = None,
    *,
    rescale: bool | str = False,
    method: str = "auto",
) -> Dual:
    """Solve the dual of gradient matching to rounding, with its certificate (arXiv:2506.12031; MGDA and CAGrad duals).

    ``g0 = sum_k u_k g_k`` is the mean under ``weights`` u, and the dual is ``min over w in the simplex of
    <g_w, g0> + c ||g0|| ||g_w||`` with ``g_w = sum_k w_k g_k``. Its solution gives the direction ``d = sum_k v_k g_k``,
    ``v = u + (c ||g0|| / ||g_w||) w``, that maximises ``min_k <g_k, d>`` over ``||d - g0|| <= c ||g0||``. A task of
    weight 0 does not enter ``g0`` and still counts in the minimum.

    Args:
        gramian: inner products of K gradients, shape (K, K), or a batch of them, (batch, K, K), any real dtype; or a
            Gramian, which keeps the digits of gradients that share a large part. Solved in float64. K from 1 to some
            thousands.
        c: strength in [0, 1). 0 gives the mean, near 1 the direction of the least norm in the hull.
        weights: u, shape (K,), or (batch, K) for a batch; normalised to sum 1. Default: those the Gramian is centred
            at, else uniform.
        rescale: multiplies the coefficients. False: 1. True or "authors": 1 / (1 + c^2), as the authors' code does.
            "mean": 1 / (1 + ||d - g0|| / ||g0||), which makes gradients that agree give exactly their mean. That is
            1 / (1 + c), but nearer to 1 where the answer is degenerate and d stays within the ball: 1 where d = g0.
        method: "exact" (one by one on the CPU, to rounding; waits for a GPU that has the matrix), "batched" (fixed
            number of passes, never waits for the device; problems left above a relative gap of 1e-9 are redone exactly
            on the CPU, on a GPU only by ``Dual.refine()``), "auto": exact for fewer than 64 matrices, batched
            otherwise, and within ``torch.compile`` and the capture of a CUDA graph. A GPU is waited for because that
            costs less than the passes do: at K = 20 on an H100 they are 900 launches, 140 ms of the host.

    Returns:
        A Dual with float64 tensors on the device of the Gram matrix.

    Raises:
        ValueError: K is 0 or the batch empty; the matrix is not square, not symmetric or indefinite beyond rounding (of
            a Gramian also n0 and h beside H); an entry is not finite (the message names the gradient); c or the weights
            are out of range. Batched on a GPU the values are not looked at: non-finite ones give NaN coefficients and
            the status "nonfinite".
    """
    c = checked_strength(c)
    rescaling(rescale, c)
    if method not in ("auto", "exact", "batched"):
        raise ValueError(f"method: expected auto, exact or batched, got {method!r}")
    accuracy = HALF if getattr(gramian, "dtype", None) in (torch.float16, torch.bfloat16, np.float16) else FLOAT32
    matrix = gramian if isinstance(gramian, Gramian) else checked_matrix(gramian)
    shape, device = (
        (matrix.h.shape, matrix.h.device) if isinstance(matrix, Gramian) else (matrix.shape[:-1], matrix.device)
    )
    if method == "auto":
        method = "exact" if may_look(device) and shape[:-1].numel() < CROWD else "batched"
    looked = method == "exact" or (device.type == "cpu" and may_look(device))
    if looked:
        matrix = matrix.cpu()
        _check_host(matrix, accuracy)
    u = _weights(weights, matrix, shape)
    if method == "exact" and len(shape) == 1:
        return _single(matrix, c, u, rescale, device)
    if method == "exact":
        duals = [_single(_entry(matrix, i), c, u[i], rescale, device) for i in range(shape[0])]
        return _stacked(duals, matrix, c, u, rescale)
    dual = _batch(matrix, c, u, rescale)
    return dual.refine() if looked else dual


def _check_host(matrix: Gramian | Tensor, accuracy: float) -> None:
    """Look at the values of one matrix or a batch on the host."""
    H = matrix.H if isinstance(matrix, Gramian) else matrix
    if isinstance(matrix, Gramian):
        check_finite(matrix.dense().numpy())
    # The centred part alone: beside a large mean, n0 + 2 h_k + H_kk of float32 sums may well be below zero.
    matrices = H.numpy().reshape(-1, *H.shape[-2:])
    for one in matrices:
        check_values(one, accuracy)
    if isinstance(matrix, Gramian):
        centres = zip(matrix.n0.reshape(-1).tolist(), matrix.h.numpy().reshape(-1, matrix.K), matrices, strict=True)
        for n0, h, one in centres:
            check_centre(n0, h, one)


def rescaling(rescale: bool | str, c: float) -> float:
    """The factor that ``rescale`` stands for where ``||d - g0|| = c ||g0||``. Raises ValueError for what it is not."""
    c = checked_strength(c)
    if rescale is True or rescale == "authors":
        return 1 / (1 + c * c)
    if rescale == "mean":
        return 1 / (1 + c)
    if rescale is False:
        return 1.0
    raise ValueError(f"rescale: expected False, True, 'authors' or 'mean', got {rescale!r}")


def _weights(weights: WeightsLike | None, matrix: Gramian | Tensor, shape: torch.Size) -> Tensor:
    """``u`` on the device, shape (K,), or (batch, K) for a batch."""
    device = matrix.h.device if isinstance(matrix, Gramian) else matrix.device
    if weights is None and isinstance(matrix, Gramian) and matrix.weights is not None:
        return matrix.weights.to(torch.float64).expand(shape)
    rows = _rows(weights) if len(shape) == 2 else None
    if rows is None:
        return torch.from_numpy(normalised_weights(weights, shape[-1])).to(device).expand(shape)
    if len(rows) != shape[0]:
        raise ValueError(f"weights: expected one row for each of {shape[0]} matrices, got {len(rows)}")
    return torch.from_numpy(np.stack([normalised_weights(row, shape[-1]) for row in rows])).to(device)


def _rows(weights: WeightsLike | None) -> list[WeightsLike] | None:
    """The rows of weights of two dimensions; None for others."""
    if isinstance(weights, Tensor | np.ndarray):
        return list(weights) if weights.ndim == 2 else None
    rows: list[WeightsLike] = [row for row in weights or () if isinstance(row, Sequence | Tensor | np.ndarray)]
    return rows or None


def _entry(matrix: Gramian | Tensor, i: int) -> Gramian | Tensor:
    return Gramian(matrix.n0[i], matrix.h[i], matrix.H[i]) if isinstance(matrix, Gramian) else matrix[i]


def _single(matrix: Gramian | Tensor, c: float, u: Tensor, rescale: bool | str, device: torch.device) -> Dual:
    """The exact solver, and its answer back on the device."""
    given, root = in_range(matrix if isinstance(matrix, Gramian) else matrix.cpu().numpy())
    solution = solve(problem_of(given, u.cpu().numpy(), c))
    v = _coefficients(u, torch.from_numpy(solution.step).to(u.device), c, rescale, solution.share).to(device)
    numbers = torch.from_numpy(np.array([solution.objective, solution.gap, solution.scale])) * root * root
    code = torch.tensor(STATUSES.index(_status(solution)), device=device)
    w, numbers = (part.to(device) for part in (torch.from_numpy(solution.w), numbers))
    return Dual(w, v, solution.iterations, numbers, code, (matrix, c, u, rescale))


def _coefficients(u: Tensor, step: Tensor, c: float, rescale: bool | str, share: float | Tensor) -> Tensor:
    """``u + step`` rescaled; with "mean" so that it is u to the last bit where step = share u."""
    if rescale == "mean":
        return u + (step - share * u) * (1 / (1 + share))
    return rescaling(rescale, c) * (u + step)


def _status(solution: Solution) -> str:
    known = solution.gap + solution.doubt <= TOLERANCE * solution.scale
    return solution.status if known else "inexact"


def _stacked(duals: list[Dual], matrix: Gramian | Tensor, c: float, u: Tensor, rescale: bool | str) -> Dual:
    w, v, numbers, codes = (
        torch.stack([getattr(dual, name) for dual in duals])
        for name in ("weights", "coefficients", "_numbers", "_codes")
    )
    return Dual(w, v, max(dual.iterations for dual in duals), numbers, codes, (matrix, c, u, rescale))


def _batch(matrix: Gramian | Tensor, c: float, u: Tensor, rescale: bool | str) -> Dual:
    parts = (matrix.n0, matrix.h, matrix.H) if isinstance(matrix, Gramian) else (matrix,)
    one = u.ndim == 1
    scaled, root = batch_in_range(tuple(part[None] for part in parts) if one else parts)
    answer, passes = solve_batched(scaled, u[None] if one else u, c, TOLERANCE)
    v = _coefficients(u, answer.step, c, rescale, answer.share[:, None])
    numbers = torch.stack([answer.objective, answer.gap, answer.scale], -1) * root[:, None] * root[:, None]
    w, v, numbers, codes = ((part[0] if one else part) for part in (answer.w, v, numbers, answer.code))
    return Dual(w, v, passes, numbers, codes, (matrix, c, u, rescale))
