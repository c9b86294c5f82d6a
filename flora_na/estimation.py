"""One module: estimate a pair of factors from the clients' factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .coefficients import AnyPair, Pair
from .divergence import Errors, Factors, combine_measured, measured_errors, shows
from .gauge import align
from .group import Group
from .grouping import make_groups
from .methods import check_method, doubtful_apart, solve_each, with_averages
from .rank_choice import LARGEST_RANK, Rank, at_least, split_by_rank
from .stack import concatenate, residual_factors
from .target import Target, check_counts, make_target, scaling_numbers
from .weights import Weights, normalise_weights
from .yardsticks import Yardsticks


@dataclass(frozen=True, eq=False)
class Estimate:
    """One pair of factors near ``dW = sum w_u s_u B_u A_u``, with its evidence. The scaling of the pair is 1.

    Yardsticks and residual are computed when asked for, from the clients' factors: change these in place only after.

    Attributes:
        B: (m, r), in the input dtype and on the input device.
        A: (r, n), likewise.
        rho: ``||dW - BA|| / ||dW||`` of the factors as returned, their rounding included; NaN where dW is zero.
        norm: ``||dW||``, Frobenius.
        status: ``closed-form``, ``converged``, ``max-sweeps``, ``exact`` (stack) or ``zero-target`` (dW is zero: the
            averaged factors are returned); of ``flora-na`` also ``unresolved``: so much cancels within dW, or
            within the pair, that the Grams hold nothing more to go by, and the pair is the best that was seen.
        sweeps: alternating sweeps used; 0 for closed forms.
    """

    B: Tensor
    A: Tensor
    rho: float
    norm: float
    status: str
    sweeps: int
    _target: Target = field(repr=False)
    _yardsticks: Yardsticks = field(repr=False)
    _index: int = field(repr=False)

    @property
    def rank(self) -> int:
        """The rank of the pair."""
        return self.A.shape[0]

    @property
    def rho_fedavg(self) -> float:
        """rho of the averaged factors (FedIT), cut to this rank where it is below theirs; computed when asked for."""
        return self._yardsticks.fedavg.rho[self._index]

    @property
    def rho_optimal(self) -> float:
        """rho of the best pair of this rank (Eckart-Young); computed when first asked for."""
        return self._yardsticks.optimal.rho[self._index]

    def residual(self) -> tuple[Tensor, Tensor]:
        """``dW - BA`` as factors (m, R + r), (R + r, n): what FedEx-LoRA adds to the base weights. float32 or wider."""
        return residual_factors(self._target, self.B, self.A)


@torch.no_grad()
def estimate(
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    weights: Weights = None,
    scalings: Sequence[float] | Tensor | None = None,
    *,
    method: str = "als",
    rank: Rank = None,
    anchor: tuple[Tensor, Tensor] | None = None,
    align_to: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Estimate:
    """Estimate one pair ``(B, A)`` whose product is near ``dW = sum_u w_u s_u B_u A_u`` (arXiv:2509.26399).

    Args:
        B: lora_B of every client, (m, r_u); ranks may differ, dtypes are promoted to one.
        A: lora_A of every client, (r_u, n).
        weights: one per client, normalised to sum 1; uniform by default. Clients of weight 0 take no part.
        scalings: one per client (alpha / r); 1 by default.
        method: ``fedavg`` averages the factors; ``flora-na`` fits one scalar per client and side, from the averages
            to a local optimum, and returns norms of B and A within a factor of two (an anchor fixes them); ``als``
            fits whole blocks by alternating least squares (with Grams on a CPU by one sweep from the optimum's rows: it
            then is ``svd``, and else near it to the tolerance of the sweeps); ``svd`` is the optimum; ``stack``
            concatenates (exact, rank sum r_u).
        rank: of the result, up to ``LARGEST_RANK``; None is the largest among clients (and anchor), ``"auto:0.99"``
            the smallest whose best pair keeps that share of ``||dW||^2``. Above what the factors span, the result is
            padded with zero columns.
        anchor: last round's global factors ``(B_g, A_g)``: ``flora-na`` then estimates
            ``A_g + sum q_u (A_u - A_g)``, and likewise B; for ``als`` and ``svd`` they are only more to combine from.
        align_to: factors of an earlier round; the result is rotated to come nearest to them (als and svd only), and has
            their rank at least, unless ``rank`` is a number.
        backend: ``auto``, ``triton``, ``native`` or ``torch``, for the operations on the factors.

    Returns:
        The pair, with rho, the two yardsticks, status and sweeps.

    Raises:
        ValueError: bad shapes, dtypes, weights, rank or method; NaN or Inf in a factor (names the client).
    """
    for argument, pair in (("anchor", anchor), ("align_to", align_to)):
        if pair is not None and not _is_pair(pair):
            raise ValueError(f"{argument}: expected a pair of tensors, B (m, r) and A (r, n)")
    w = normalise_weights(weights, len(B))
    target = make_target(*_active(B, A, w, scalings), anchor=anchor)
    [result] = estimate_targets(
        [target], method=method, rank=rank, align_to=None if align_to is None else [align_to], backend=backend
    )
    return result


def _is_pair(given: object) -> bool:
    return isinstance(given, Sequence) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)


def _active(
    B: Sequence[Tensor], A: Sequence[Tensor], weights: Tensor, scalings: Sequence[float] | Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Sequence[float], list[str]]:
    """What ``make_target`` takes, without the clients of weight zero: they take no part in anything."""
    check_counts(B, A, given := scaling_numbers(scalings, len(B)))
    keep = [u for u, weight in enumerate(weights.tolist()) if weight > 0]
    labels = [f"client {u}" for u in keep]
    if len(keep) == len(B):
        return B, A, weights, given, labels
    return [B[u] for u in keep], [A[u] for u in keep], weights[keep], [given[u] for u in keep], labels


def estimate_targets(
    targets: Sequence[Target],
    *,
    method: str,
    rank: Rank = None,
    shared: bool = False,
    align_to: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    backend: str = "auto",
) -> list[Estimate]:
    """Estimates for many modules at once: each operation on the factors is one call over all of them."""
    check_method(method, rank, shared)
    if align_to is not None and method not in ("als", "svd"):
        raise ValueError(f"align_to: rotates the pairs of 'als' and 'svd'; {method!r} has a gauge of its own")
    averaged = method == "fedavg" and rank is None  # the coefficients are known before the Grams
    measured = averaged and any(shows(target.dtype) for target in targets)
    groups, ranks = split_by_rank(make_groups(targets, backend, averaged=averaged, measured=measured), rank)
    if align_to is not None and not isinstance(rank, int):
        groups, ranks = at_least(groups, ranks, [_rank_of(pair) for pair in align_to])
    if method != "stack" and not shared:
        groups, ranks = doubtful_apart(groups, method, ranks)
    pairs: list[AnyPair]
    if method == "stack":
        pairs = [Pair(torch.empty(0), torch.empty(0), "exact") for _ in groups]
        factors = [_stacked(group) for group, _ in groups]
        errors = measured_errors([group for group, _ in groups], factors, backend)
    else:
        pairs = _pairs([group for group, _ in groups], method, ranks, shared)
        if align_to is not None:
            pairs = [_align(g, ids, p, align_to, backend) for (g, ids), p in zip(groups, pairs, strict=True)]
        factors, errors = combine_measured([(g, p) for (g, _), p in zip(groups, pairs, strict=True)], backend)
    results: dict[int, Estimate] = {}
    for (group, ids), pair, pieces, error in zip(groups, pairs, factors, errors, strict=True):
        results.update(zip(ids, _estimates(group, pair, pieces, error), strict=True))
    return [results[i] for i in range(len(targets))]


def _rank_of(pair: tuple[Tensor, Tensor] | None) -> int:
    """Of earlier factors, which are checked when the result is rotated towards them."""
    return 0 if pair is None or pair[0].ndim != 2 else min(pair[0].shape[1], LARGEST_RANK)


def _pairs(groups: list[Group], method: str, ranks: list[int | None], shared: bool) -> list[AnyPair]:
    pairs = solve_each(groups, method, ranks, shared=shared)
    return [with_averages(group, pair) for group, pair in zip(groups, pairs, strict=True)]


def _align(
    group: Group, ids: list[int], pair: AnyPair, previous: Sequence[tuple[Tensor, Tensor] | None], backend: str
) -> Pair:
    chosen = [previous[i] for i in ids]
    empty = [(t.B[0][:, :0], t.A[0][:0]) for t in group.targets]
    return align(group, pair, [e if c is None else c for c, e in zip(chosen, empty, strict=True)], backend)


def _stacked(group: Group) -> Factors:
    pieces = [concatenate(t) for t in group.targets]
    return [b for b, _ in pieces], [a for _, a in pieces]


def _estimates(group: Group, pair: AnyPair, factors: Factors, errors: Errors) -> list[Estimate]:
    norms, rhos = errors.energy.sqrt().tolist(), errors.rho
    ended = pair.ended or ((pair.status, pair.sweeps),) * len(group.targets)
    yardsticks: dict[int, Yardsticks] = {}
    out = []
    for i, (target, B, A) in enumerate(zip(group.targets, *factors, strict=True)):
        status, sweeps = ended[i]
        rho, status = (rhos[i], status) if norms[i] > 0 else (float("nan"), "zero-target")
        if norms[i] > 0 and not rho < float("inf"):
            raise ValueError(f"{target.name}: the aggregate overflows {target.dtype}; convert the factors to float32")
        measure = yardsticks.setdefault(A.shape[0], Yardsticks(group, A.shape[0]))
        out.append(Estimate(B, A, rho, norms[i], status, sweeps, target, measure, i))
    return out
