"""Many duals at once in torch: fixed numbers of passes, no look from the host, a certificate for each.

The same method and the same formulas as the exact solver, on tensors with a leading batch dimension. Members of a face
are a mask, so every pass has the same shapes. What the passes do not finish shows in the certificate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._batch_problem import TINY, Batch, build, one_at, pick, row_of, times
from ._exact import STATUSES
from ._problem import EPS, HIDDEN, VANISHING

FACES = 12  # passes over faces after Frank-Wolfe
PIVOTS = 12  # passes of the projection on the cone


def frank_wolfe(batch: Batch, steps: int) -> Tensor:
    """Pairwise Frank-Wolfe with exact line search from the best vertex, shape (B, K)."""
    H, s, diagonal = batch.H, batch.s, batch.diagonal
    K = H.shape[1]
    w = one_at((batch.beta + s[:, None] * batch.norms).argmin(-1), K).to(H.dtype)
    for step in range(steps):
        if step % 64 == 0:  # the running products drift by rounding
            w = w / w.sum(-1, keepdim=True)
            y, q = batch.product(w)
        slope = batch.slope(y, q)
        i, a = slope.argmin(-1), torch.where(w > 0, slope, -torch.inf).argmax(-1)
        most, rows = pick(w, a), (row_of(H, i) - row_of(H, a))
        B, P = pick(batch.beta, i) - pick(batch.beta, a), pick(y, i) - pick(y, a)
        Q = (pick(diagonal, i) + pick(diagonal, a) - 2 * pick(row_of(H, i), a)).clamp(min=0)
        R = s * s * Q - B * B
        flat = (q - P * P / Q.clamp(min=TINY)).clamp(min=0) / (Q * R).clamp(min=TINY)
        x = torch.minimum((-B * flat.sqrt() - P / Q.clamp(min=TINY)).clamp(min=0), most)
        x = torch.where((R > 0) & (Q > 0), x, most)
        x = torch.where((i == a) | (q.clamp(min=0).sqrt() <= VANISHING * batch.reach(w)), 0.0, x)
        w = (w + x[:, None] * one_at(i, K) - x[:, None] * one_at(a, K)).clamp(min=0)
        q = q + x * (2 * P + x * Q)
        y = y + x[:, None] * rows
    return w / w.sum(-1, keepdim=True)


def face_step(batch: Batch, w: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """One step to the minimum of the face ``members``, or to the first wall. Returns weights and who was dropped."""
    K = w.shape[1]
    s = batch.s.clamp(min=TINY)
    first = torch.where(members, batch.norms, torch.inf).argmin(-1)
    row, corner = row_of(batch.H, first), pick(batch.diagonal, first)
    others = members & ~one_at(first, K)
    C = batch.H - row[:, :, None] - row[:, None, :] + corner[:, None, None]
    length = torch.maximum(C.diagonal(dim1=1, dim2=2), EPS * (batch.diagonal + corner[:, None])).clamp(min=TINY).sqrt()
    inverse = torch.where(others, 1 / length, 0.0)
    C = C * inverse[:, :, None] * inverse[:, None, :]
    C = C + torch.diag_embed(torch.where(others, K * EPS, 1.0))
    sides = (
        torch.stack(
            [
                pick(batch.h, first)[:, None] + corner[:, None] - batch.h - row,
                (pick(batch.beta, first)[:, None] - batch.beta) / s[:, None],
            ],
            -1,
        )
        * inverse[..., None]
    )
    factor, failed = torch.linalg.cholesky_ex(C)
    X = torch.cholesky_solve(sides, factor)
    X = (X + torch.cholesky_solve(sides - C @ X, factor)) * inverse[..., None]
    start = one_at(first, K).to(w.dtype)
    alpha = X[..., 0] + start * (1 - X[..., 0].sum(-1, keepdim=True))
    z = X[..., 1] - start * X[..., 1].sum(-1, keepdim=True)
    r = (z * times(batch.H, z)).sum(-1).clamp(min=0)
    y = times(batch.H, alpha) + batch.h
    p = batch.n + (batch.h * alpha).sum(-1) + (y * alpha).sum(-1)
    p = torch.where(p <= 1e-14 * batch.reach(alpha.abs()) ** 2, 0.0, p)
    ray = r >= 1 - 1e-13
    t = torch.where(ray, 0.0, (p / torch.where(ray, 1.0, 1 - r)).sqrt())
    direction = torch.where(ray[:, None], z, alpha + t[:, None] * z - w)
    ratio, k = torch.where(members & (direction < 0), w / (-direction).clamp(min=TINY), torch.inf).min(-1)
    full = torch.where(ray, torch.inf, 1.0)
    good = (failed == 0) & direction.isfinite().all(-1) & torch.minimum(ratio, full).isfinite()
    step = torch.where(good, torch.minimum(ratio, full), 0.0)
    moved = (w + step[:, None] * torch.where(good[:, None], direction, 0.0)).clamp(min=0)
    dropped = one_at(k, K) & (good & (ratio < full))[:, None]
    moved = torch.where(dropped, 0.0, moved)
    return moved / moved.sum(-1, keepdim=True), dropped


def faces(batch: Batch, w: Tensor, passes: int) -> Tensor:
    """Polish ``w`` over faces and return the weights of the smallest gap seen, the mean among them."""
    best, least = batch.u, gap_at(batch, batch.u)
    members = w > 0
    for _ in range(passes):
        w, dropped = face_step(batch, w, members)
        members = members & ~dropped & (w > 0)
        y, q = batch.product(w)
        slope = batch.slope(y, q)
        gap = (w * (slope - slope.amin(-1, keepdim=True))).sum(-1)
        better = gap < least
        best, least = torch.where(better[:, None], w, best), torch.where(better, gap, least)
        size = batch.beta.abs() + (batch.s / q.clamp(min=TINY).sqrt())[:, None] * (
            batch.h.abs() + batch.root * (batch.root * w).sum(-1, keepdim=True)
        )
        gain = torch.where(members, torch.inf, (slope - (w * slope).sum(-1, keepdim=True)) / size.clamp(min=TINY))
        worst, k = gain.min(-1)
        entering = (worst < -1e-14) & ~dropped.any(-1)  # only once the face is solved
        members = members | (one_at(k, w.shape[1]) & entering[:, None])
    # A vanishing g_w has no gap of its own: keep it where the passes ended there.
    _, q = batch.product(w)
    vanishing = q.clamp(min=0).sqrt() <= VANISHING * batch.reach(w)
    return torch.where(vanishing[:, None], w, best)


def gap_at(batch: Batch, w: Tensor) -> Tensor:
    """``f(w) - min_k <g_k, d>`` where ``g_w`` does not vanish, shape (B,)."""
    slope = batch.slope(*batch.product(w))
    return (w * (slope - slope.amin(-1, keepdim=True))).sum(-1)


def cone(batch: Batch, w: Tensor, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Project ``g0`` on ``{<g_k, d> >= 0}`` by block pivoting: ``x``, ``||g_x||`` and the worst ``<g_k, d>``."""
    lengths = torch.where(batch.norms > 0, batch.norms, 1.0)
    there = batch.norms > 0
    inverse = torch.where(there, 1 / lengths, 0.0)
    G = batch.n[:, None, None] + batch.h[:, :, None] + batch.h[:, None, :] + batch.H
    A = G * inverse[:, :, None] * inverse[:, None, :]
    b = (batch.constant[:, None] + batch.beta) * inverse
    right = -b / batch.s.clamp(min=TINY)[:, None]
    free = there & (w > 1e-12 * w.amax(-1, keepdim=True))
    inside = free
    best, least = torch.zeros_like(w), torch.full_like(batch.n, torch.inf)
    for _ in range(passes):
        m = inside.to(w.dtype)
        # The ridge makes dependent columns solvable; the refinements take it out of the answer again.
        C = A * m[:, :, None] * m[:, None, :] + torch.diag_embed(torch.where(inside, 1e-11, 1.0))
        factor, failed = torch.linalg.cholesky_ex(C)
        x = torch.zeros_like(w)
        for _ in range(3):
            x = x + m * torch.cholesky_solve((m * (right - times(A, x)))[..., None], factor)[..., 0]
        x = torch.where((failed == 0)[:, None], x, 0.0)
        clean = torch.where(free, x, x.clamp(min=0))
        gain = right - times(A, clean)
        violation = torch.where(there & ~free, gain, gain.abs() * free).amax(-1)
        better = violation < least
        best, least = torch.where(better[:, None], clean, best), torch.where(better, violation, least)
        inside = free | (there & torch.where(inside, x > 0, gain > 1e-14))
    length = (best * times(A, best)).sum(-1).clamp(min=0).sqrt()
    x = best * inverse
    short = batch.s / length.clamp(min=1.0)
    Gx = times(G, x)
    worst = (batch.constant[:, None] + batch.beta + short[:, None] * Gx).amin(-1)
    return x * short[:, None], length, worst


@dataclass(frozen=True, eq=False)
class Answer:
    """The solutions of a batch; the fields are those of ``_exact.Solution``, with a batch dimension B in front."""

    w: Tensor  # (B, K)
    step: Tensor  # (B, K)
    share: Tensor  # (B,)
    objective: Tensor  # (B,)
    gap: Tensor  # (B,)
    doubt: Tensor  # (B,)
    scale: Tensor  # (B,)
    code: Tensor  # (B,): index into STATUSES

    def where(self, case: Tensor, other: Answer) -> Answer:
        """``other`` where ``case`` (B,) holds."""
        rows = case[:, None]
        return Answer(
            torch.where(rows, other.w, self.w),
            torch.where(rows, other.step, self.step),
            torch.where(case, other.share, self.share),
            torch.where(case, other.objective, self.objective),
            torch.where(case, other.gap, self.gap),
            torch.where(case, other.doubt, self.doubt),
            torch.where(case, other.scale, self.scale),
            torch.where(case, other.code, self.code),
        )


def solve_batched(parts: tuple[Tensor, ...], u: Tensor, c: float, tolerance: float) -> tuple[Answer, int]:
    """Solve a batch with weights ``u`` (B, K): the answer, and the number of passes.

    ``parts`` is (n0, h, H) or (G,), float64, batch first; ``tolerance`` the relative gap that counts as solved.
    """
    batch = build(parts, u, c)
    K = u.shape[1]
    steps = 4 * K
    w = frank_wolfe(batch, steps) if K > 2 else torch.full_like(u, 1 / K)
    w = faces(batch, w, FACES)
    norm = batch.product(w)[1].clamp(min=0).sqrt()
    vanishing = norm <= VANISHING * batch.reach(w)
    answer = _regular(batch, w, norm).where(vanishing, _on_the_cone(batch, w))
    inexact = answer.gap + answer.doubt > tolerance * answer.scale
    answer = replace(answer, code=torch.where(inexact, STATUSES.index("inexact"), answer.code))
    answer = answer.where(batch.n0 == 0, _stationary(batch))
    if c == 0:
        answer = answer.where(batch.n0 > 0, _mean(batch))
    finite = batch.H.isfinite().all(-1).all(-1) & batch.h.isfinite().all(-1) & batch.n.isfinite()
    return answer.where(~finite, _uniform(batch, torch.nan, "nonfinite")), steps + FACES


def _regular(batch: Batch, w: Tensor, norm: Tensor) -> Answer:
    """Where ``||g_w|| = norm`` does not vanish."""
    objective = batch.constant + (batch.beta * w).sum(-1) + batch.s * norm
    step = (batch.c * (batch.n0.sqrt() / norm.clamp(min=TINY)))[:, None] * w
    reach = batch.reach(w)
    doubt = 4 * EPS * batch.s * reach * (reach / norm.clamp(min=TINY))
    share, scale = torch.full_like(norm, batch.c), _scale(batch, w > 0)
    return Answer(w, step, share, objective, gap_at(batch, w), doubt, scale, _codes(batch, "optimal"))


def _on_the_cone(batch: Batch, w: Tensor) -> Answer:
    """Where it vanishes: the mean gradient projected on the cone."""
    x, length, worst = cone(batch, w, PIVOTS)
    scale = torch.maximum(_scale(batch, (w > 0) | (x != 0)), batch.n0)
    hidden = batch.reach(w) > HIDDEN * (batch.norms * w).sum(-1)
    code = torch.where(hidden | (length > 1 + 1e-9), STATUSES.index("inexact"), _codes(batch, "degenerate"))
    share, zero = batch.c * length.clamp(max=1.0), torch.zeros_like(length)
    return Answer(w, x, share, zero, (-worst).clamp(min=0) + 0.0, zero, scale, code)


def _stationary(batch: Batch) -> Answer:
    return replace(_uniform(batch, 0.0, "stationary"), w=batch.u)


def _mean(batch: Batch) -> Answer:
    lowest = one_at(batch.beta.argmin(-1), batch.u.shape[1]).to(batch.u.dtype)
    value = batch.constant + batch.beta.amin(-1)
    return replace(_uniform(batch, 0.0, "mean"), w=lowest, objective=value, scale=value.abs())


def _uniform(batch: Batch, number: float, status: str) -> Answer:
    """The same number everywhere."""
    row, one = torch.full_like(batch.u, number), torch.full_like(batch.n0, number)
    return Answer(row, row, one, one, one, one, one, _codes(batch, status))


def _codes(batch: Batch, status: str) -> Tensor:
    return torch.full_like(batch.n0, STATUSES.index(status), dtype=torch.int64)


def _scale(batch: Batch, active: Tensor) -> Tensor:
    """The largest ``|<g_k, g0>| + c ||g0|| ||g_k||`` over the active tasks, shape (B,)."""
    sizes = (batch.constant[:, None] + batch.beta).abs() + batch.s[:, None] * batch.norms
    return torch.where(active, sizes, 0.0).amax(-1)
