"""All modules at once, on the device: the estimators of FLoRA-NA without one look at a value.

``estimate`` and ``aggregate`` decide as they go (how many sweeps, which norms to take again), and a GPU waits for
every decision. Here the work is the same whatever the numbers are, so that the host only queues it: the whole call can
be traced by ``torch.compile(fullgraph=True)`` and captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedgram import kernels

from ._batched_algebra import spread_columns
from ._batched_group import BatchedGroup
from ._batched_solvers import alternating, scalars
from .als import tilted
from .coefficients import fit_rank
from .energies import MARGIN, ROUNDING, ZERO
from .group import ModuleFactors
from .rank_choice import LARGEST_RANK
from .weights import real_numbers

METHODS = ("fedavg", "flora-na", "als")
GRAM_RANK_LIMIT = 1024
"""Total rank up to which the Grams of all modules are kept: at 224 modules they take 4 GB there, and 9 GB at 1600."""
GRAM_SHARE = 8
"""Above it they are kept where they take at most one part in so many of the device's memory."""


class BatchedEstimate(NamedTuple):
    """One pair of factors per module, and evidence that stays on the device.

    Attributes:
        B: (m_l, r) per module, in the input dtype.
        A: (r, n_l) per module.
        rho: (L,) float64 ``||dW - BA|| / ||dW||`` of the factors as returned.
        norm: (L,) float64 ``||dW||``.
        certain: (L,) bool: whether rho stands clear of the rounding errors of the Grams, and so is right to three
            digits. Where it is not, ``estimate`` measures it without differences of squares.
        sweeps: (L,) int64 sweeps until the module converged (or all of them).
        converged: (L,) bool; true for closed forms.
    """

    B: list[Tensor]
    A: list[Tensor]
    rho: Tensor
    norm: Tensor
    certain: Tensor
    sweeps: Tensor
    converged: Tensor


@torch.no_grad()
def estimate_modules(
    B: ModuleFactors,
    A: ModuleFactors,
    weights: Sequence[float] | Tensor | None = None,
    scalings: Sequence[float] | Tensor | None = None,
    *,
    method: str = "als",
    rank: int | None = None,
    sweeps: int = 24,
    tolerance: float = 1e-6,
    precise: bool = True,
    backend: str = "auto",
) -> BatchedEstimate:
    """Estimate one pair per module for ``dW_l = sum_u w_u s_u B_lu A_lu`` (arXiv:2509.26399), all modules at once.

    Nothing of it makes the host wait for the device. The price is a fixed number of sweeps (a module that has
    converged is kept as it is), Cholesky factors in place of eigenvalues, and a simpler gauge: for ``als`` the rows of
    A are orthogonal and every column of B is as long as its row of A. Up to a total rank of 1024, and above it where
    they take an eighth of the device's memory at most, the Grams are formed once; else products with them are taken
    from the factors (``flora-na`` by conjugate gradients), and the norms from Grams of a few modules at a time.

    Args:
        B: ``B[l][u]`` (m_l, r_lu); all modules have the same clients. ``kernels.prepare`` and ``kernels.FactorSlab``
            give factors on which a repeated call spends no time on tens of thousands of tensors.
        A: ``A[l][u]`` (r_lu, n_l).
        weights: (U,) at least 0, normalised to sum 1; uniform by default. Their signs are not looked at. On the
            factors' device, or the host sends them there.
        scalings: (U,), 1 by default.
        method: ``fedavg``, ``flora-na`` or ``als``.
        rank: of ``als``; None is, per module, the largest client rank.
        sweeps: of ``als``; ``flora-na`` (which ``als`` starts from) takes a third of them.
        tolerance: a module has converged once a sweep lowers its squared error by less than this fraction of it.
        precise: take Grams and the evidence from float64 products. False is faster where arithmetic counts (some
            hundred clients), and leaves rho certain only where little cancels.
        backend: ``auto``, ``triton``, ``native`` or ``torch``.

    Raises:
        ValueError: shapes, types, method, rank or sweeps are wrong; the message names the argument.
    """
    _check(B, A, method, rank, sweeps)
    device, U = B[0][0].device, len(B[0])
    w, s = (_numbers(name, x, U, device) for name, x in (("weights", weights), ("scalings", scalings)))
    groups = _groups(B, A, w / w.sum(), s, precise, backend)
    P: list[Tensor] = [w] * len(B)
    Q: list[Tensor] = [w] * len(B)
    ran = torch.zeros(len(B), dtype=torch.int64, device=device)
    converged = torch.ones(len(B), dtype=torch.bool, device=device)
    for group, ids in groups:
        p, q, *evidence = _solve(group, method, rank, sweeps, tolerance)
        for i, l in enumerate(ids):
            P[l], Q[l] = p[i], q[i]
        if evidence:
            where = group.index
            ran, converged = ran.index_copy(0, where, evidence[0]), converged.index_copy(0, where, evidence[1])
    out_B, out_A = kernels.factor_combine(B, A, P, Q, backend=backend)
    assert out_B is not None
    assert out_A is not None
    norm, rho, certain = _measured(groups, B, A, out_B, out_A, precise, backend)
    return BatchedEstimate(out_B, out_A, rho, norm, certain, ran, converged)


def _check(B: ModuleFactors, A: ModuleFactors, method: str, rank: int | None, sweeps: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if rank is not None and (method != "als" or type(rank) is not int or not 1 <= rank <= LARGEST_RANK):
        raise ValueError(f"rank: from 1 to {LARGEST_RANK}, of 'als', not {rank!r} of {method!r}")
    if type(sweeps) is not int or sweeps < 1:
        raise ValueError(f"sweeps: expected an integer of at least 1, got {sweeps!r}")
    if not len(B) or len(B) != len(A):
        raise ValueError(f"B and A: expected the same positive number of modules, got {len(B)} and {len(A)}")
    U = len(B[0])
    if not U:
        raise ValueError("B[0]: expected at least one client")
    for l, (b, a) in enumerate(zip(B, A, strict=True)):
        if len(b) != U or len(a) != U:
            raise ValueError(f"B[{l}] and A[{l}]: expected {U} clients as in module 0, got {len(b)} and {len(a)}")


def _numbers(name: str, given: Sequence[float] | Tensor | None, count: int, device: torch.device) -> Tensor:
    """(count,) float64 on the device; ones for None."""
    if given is None:
        return torch.ones(count, dtype=torch.float64, device=device)
    numbers = given if isinstance(given, Tensor) and not given.is_complex() else real_numbers(name, given)
    if numbers.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), got {tuple(numbers.shape)}")
    return numbers.to(device).double()


def _groups(
    B: ModuleFactors, A: ModuleFactors, w: Tensor, s: Tensor, precise: bool, backend: str
) -> list[tuple[BatchedGroup, list[int]]]:
    """Modules by their clients' ranks; the Grams of all that form them in one call."""
    order: dict[tuple[int, ...], list[int]] = {}
    if isinstance(B, kernels.PreparedSide):  # reading the shapes of 20,000 tensors takes 10 ms
        of_modules = B.columns
    else:
        of_modules = [tuple([b.shape[-1] for b in clients]) for clients in B]
    for l, ranks in enumerate(of_modules):
        order.setdefault(ranks, []).append(l)
    groups = []
    for ranks, ids in order.items():
        whole = len(ids) == len(B)  # prepared factors are passed on as they are
        sides = (B, A) if whole else ([B[l] for l in ids], [A[l] for l in ids])
        formed = _kept(sum(ranks), len(ids), w.device)
        group = BatchedGroup(*sides, ranks, ids, w, s, formed=formed, precise=precise, backend=backend)
        groups.append((group, ids))
    return groups


def _kept(total_rank: int, modules: int, device: torch.device) -> bool:
    """Whether the Grams are formed once for all."""
    if total_rank <= GRAM_RANK_LIMIT or device.type != "cuda":
        return total_rank <= GRAM_RANK_LIMIT
    return 2 * 8 * total_rank**2 * modules <= torch.cuda.get_device_properties(device).total_memory // GRAM_SHARE


def _solve(group: BatchedGroup, method: str, rank: int | None, sweeps: int, tolerance: float) -> tuple[Tensor, ...]:
    """Coefficients of the unscaled factors, P (L, R, r) and Q (L, r, R); and, of iterations, sweeps and convergence."""
    p = q = group.weights.expand(group.modules, -1)
    found: tuple[Tensor, ...] = ()
    if method != "fedavg":
        p, q, *rest = scalars(group, p, q, max(1, sweeps // 3), tolerance)
        found = tuple(rest)
    P, Q = group.expand(p), group.expand(q)
    if method == "als":
        r = group.rank if rank is None else rank
        P, Q, *rest = alternating(group, _start(group, Q, r), sweeps, tolerance)
        found = tuple(rest)
    # where dW is zero (B = 0 in the first round) nothing but the average means anything: A must not become zero too
    average = group.expand(group.weights.expand(group.modules, -1))
    zero = (group.energy <= (ZERO * group.mass) ** 2).view(-1, 1, 1)
    P, Q = (torch.where(zero, fit_rank(average, x.shape[-1]), x) for x in (P, Q))
    return group.scale["B"] * P, (group.scale["A"] * Q).mT, *found


def _start(group: BatchedGroup, Q: Tensor, rank: int) -> Tensor:
    """Q in ``rank`` columns, a little tilted: fixed combinations of its columns, or of the rows of As beside them."""
    have = Q.shape[-1]
    sketch = (group.D.sqrt() * spread_columns(group.total_rank, rank, Q.device)).expand(group.modules, -1, -1)
    if have > rank:
        Q = Q @ spread_columns(have, rank, Q.device)
    Q = tilted(Q, sketch[..., : Q.shape[-1]], group.norms)
    return torch.cat([Q, sketch[..., Q.shape[-1] :]], -1)


def _measured(
    groups: Sequence[tuple[BatchedGroup, list[int]]],
    B: ModuleFactors,
    A: ModuleFactors,
    out_B: list[Tensor],
    out_A: list[Tensor],
    precise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``||dW||``, rho of the factors as they are returned, and whether it is certain, (L,) each."""
    X_B, X_A = kernels.factor_cross(B, A, out_B, out_A, precise=precise, backend=backend)
    S_B, S_A = kernels.factor_gram([[b] for b in out_B], [[a] for a in out_A], precise=precise, backend=backend)
    assert X_B is not None
    assert X_A is not None
    device = out_B[0].device
    norm, rho = (torch.zeros(len(B), dtype=torch.float64, device=device) for _ in range(2))
    certain = torch.zeros(len(B), dtype=torch.bool, device=device)
    rounding = ROUNDING["float64" if precise or device.type == "cpu" else "float32"]
    for group, ids in groups:
        x_B, x_A, s_B, s_A = (torch.stack([x[l] for l in ids]) for x in (X_B, X_A, S_B, S_A))
        inner = (group.D * group.scale["B"] * group.scale["A"] * x_B * x_A).sum((-2, -1))
        square = (s_B * s_A).sum((-2, -1))
        mass = (s_B.diagonal(dim1=-2, dim2=-1) * s_A.diagonal(dim1=-2, dim2=-1)).clamp_min(0).sqrt().sum(-1)
        error = group.energy - 2 * inner + square
        floor = MARGIN * rounding * (group.mass + mass) ** 2
        safe = (error > floor) & (group.energy > floor)
        energy = group.energy.clamp_min(0)
        ratio = (error.clamp_min(0) / energy).sqrt()
        ratio = torch.where(energy > 0, ratio, torch.nan)  # where dW is zero, as in ``Estimate``
        rho, norm = rho.index_copy(0, group.index, ratio), norm.index_copy(0, group.index, energy.sqrt())
        certain = certain.index_copy(0, group.index, safe)
    return norm, rho, certain
