"""Many duals at once in torch: fixed numbers of passes, no look from the host, a certificate for each.

The same method and the same formulas as the exact solver, on tensors with a leading batch dimension. Members of a face
are a mask, so every pass has the same shapes. What the passes do not finish shows in the certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._exact import STATUSES
from ._problem import EPS, VANISHING

TINY = 1e-300
FACES = 12  # passes over faces after Frank-Wolfe
PIVOTS = 12  # passes of the projection on the cone


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of duals; the fields are those of ``_problem.Problem``, with a batch dimension B in front."""

    n: Tensor  # (B,)
    h: Tensor  # (B, K)
    H: Tensor  # (B, K, K)
    u: Tensor  # (B, K)
    c: float
    beta: Tensor  # (B, K)
    constant: Tensor  # (B,)
    n0: Tensor  # (B,)
    root: Tensor  # (B, K)
    norms: Tensor  # (B, K)

    @property
    def s(self) -> Tensor:
        """``c ||g0||``, shape (B,)."""
        return self.c * self.n0.sqrt()

    @property
    def diagonal(self) -> Tensor:
        """``H_kk``, shape (B, K)."""
        return self.H.diagonal(dim1=1, dim2=2)

    def reach(self, w: Tensor) -> Tensor:
        """The lengths summed in ``g_w``, shape (B,)."""
        return self.n.clamp(min=0).sqrt() + (self.root * w).sum(-1)

    def product(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``y = Hw + h`` and ``||g_w||^2``."""
        y = _times(self.H, w) + self.h
        return y, self.n + (self.h * w).sum(-1) + (y * w).sum(-1)

    def slope(self, y: Tensor, q: Tensor) -> Tensor:
        """The gradient of the objective up to a constant."""
        return self.beta + (self.s / q.clamp(min=TINY).sqrt())[:, None] * y


def _times(H: Tensor, w: Tensor) -> Tensor:
    return (H @ w[..., None])[..., 0]


def _pick(x: Tensor, k: Tensor) -> Tensor:
    return x.gather(-1, k[:, None])[:, 0]


def _row(H: Tensor, k: Tensor) -> Tensor:
    return H.gather(1, k[:, None, None].expand(-1, 1, H.shape[2]))[:, 0]


def _is(k: Tensor, K: int) -> Tensor:
    """One-hot mask of the indices, shape (B, K)."""
    return torch.arange(K, device=k.device) == k[:, None]


def build(parts: tuple[Tensor, ...], u: Tensor, c: float) -> Batch:
    """From (n0, h, H) or a plain (G,), each plain matrix centred where no gradient is short against the mean."""
    if len(parts) == 3:
        n, h, H = parts
    else:
        (G,) = parts
        b = _times(G, u)
        n = (b * u).sum(-1)
        h, H = b - n[:, None], G - b[:, :, None] - b[:, None, :] + n[:, None, None]
        keep = H.diagonal(dim1=1, dim2=2).amax(-1) <= n / 4
        n, h = torch.where(keep, n, 0.0), torch.where(keep[:, None], h, 0.0)
        H = torch.where(keep[:, None, None], H, G)
    H = (H + H.transpose(1, 2)) / 2
    y = _times(H, u) + h
    n0 = n + (h * u).sum(-1) + (y * u).sum(-1)
    diagonal = H.diagonal(dim1=1, dim2=2)
    base, root = n.clamp(min=0).sqrt(), diagonal.clamp(min=0).sqrt()
    squares = n[:, None] + 2 * h + diagonal
    norms = torch.where(squares > 16 * EPS * (base[:, None] + root) ** 2, squares, 0.0).clamp(min=0).sqrt()
    n0 = torch.where(n0 <= 16 * EPS * (base + (root * u).sum(-1)) ** 2, 0.0, n0)
    return Batch(n, h, H, u, c, y, n + (h * u).sum(-1), n0, root, norms)


def frank_wolfe(batch: Batch, steps: int) -> Tensor:
    """Pairwise Frank-Wolfe with exact line search from the best vertex, shape (B, K)."""
    H, s, diagonal = batch.H, batch.s, batch.diagonal
    K = H.shape[1]
    w = _is((batch.beta + s[:, None] * batch.norms).argmin(-1), K).to(H.dtype)
    for step in range(steps):
        if step % 64 == 0:  # the running products drift by rounding
            w = w / w.sum(-1, keepdim=True)
            y, q = batch.product(w)
        slope = batch.slope(y, q)
        i, a = slope.argmin(-1), torch.where(w > 0, slope, -torch.inf).argmax(-1)
        most, rows = _pick(w, a), (_row(H, i) - _row(H, a))
        B, P = _pick(batch.beta, i) - _pick(batch.beta, a), _pick(y, i) - _pick(y, a)
        Q = (_pick(diagonal, i) + _pick(diagonal, a) - 2 * _pick(_row(H, i), a)).clamp(min=0)
        R = s * s * Q - B * B
        flat = (q - P * P / Q.clamp(min=TINY)).clamp(min=0) / (Q * R).clamp(min=TINY)
        x = torch.minimum((-B * flat.sqrt() - P / Q.clamp(min=TINY)).clamp(min=0), most)
        x = torch.where((R > 0) & (Q > 0), x, most)
        x = torch.where((i == a) | (q.clamp(min=0).sqrt() <= VANISHING * batch.reach(w)), 0.0, x)
        w = (w + x[:, None] * _is(i, K) - x[:, None] * _is(a, K)).clamp(min=0)
        q = q + x * (2 * P + x * Q)
        y = y + x[:, None] * rows
    return w / w.sum(-1, keepdim=True)


def face_step(batch: Batch, w: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """One step to the minimum of the face ``members``, or to the first wall. Returns weights and who was dropped."""
    K = w.shape[1]
    s = batch.s.clamp(min=TINY)
    first = torch.where(members, batch.norms, torch.inf).argmin(-1)
    row, corner = _row(batch.H, first), _pick(batch.diagonal, first)
    others = members & ~_is(first, K)
    C = batch.H - row[:, :, None] - row[:, None, :] + corner[:, None, None]
    length = torch.maximum(C.diagonal(dim1=1, dim2=2), EPS * (batch.diagonal + corner[:, None])).clamp(min=TINY).sqrt()
    inverse = torch.where(others, 1 / length, 0.0)
    C = C * inverse[:, :, None] * inverse[:, None, :]
    C = C + torch.diag_embed(torch.where(others, K * EPS, 1.0))
    sides = (
        torch.stack(
            [
                _pick(batch.h, first)[:, None] + corner[:, None] - batch.h - row,
                (_pick(batch.beta, first)[:, None] - batch.beta) / s[:, None],
            ],
            -1,
        )
        * inverse[..., None]
    )
    factor, failed = torch.linalg.cholesky_ex(C)
    X = torch.cholesky_solve(sides, factor)
    X = (X + torch.cholesky_solve(sides - C @ X, factor)) * inverse[..., None]
    start = _is(first, K).to(w.dtype)
    alpha = X[..., 0] + start * (1 - X[..., 0].sum(-1, keepdim=True))
    z = X[..., 1] - start * X[..., 1].sum(-1, keepdim=True)
    r = (z * _times(batch.H, z)).sum(-1).clamp(min=0)
    y = _times(batch.H, alpha) + batch.h
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
    dropped = _is(k, K) & (good & (ratio < full))[:, None]
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
        members = members | (_is(k, w.shape[1]) & entering[:, None])
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
            x = x + m * torch.cholesky_solve((m * (right - _times(A, x)))[..., None], factor)[..., 0]
        x = torch.where((failed == 0)[:, None], x, 0.0)
        clean = torch.where(free, x, x.clamp(min=0))
        gain = right - _times(A, clean)
        violation = torch.where(there & ~free, gain, gain.abs() * free).amax(-1)
        better = violation < least
        best, least = torch.where(better[:, None], clean, best), torch.where(better, violation, least)
        inside = free | (there & torch.where(inside, x > 0, gain > 1e-14))
    length = (best * _times(A, best)).sum(-1).clamp(min=0).sqrt()
    x = best * inverse
    short = batch.s / length.clamp(min=1.0)
    Gx = _times(G, x)
    worst = (batch.constant[:, None] + batch.beta + short[:, None] * Gx).amin(-1)
    return x * short[:, None], length, worst


def solve_batched(
    parts: tuple[Tensor, ...], u: Tensor, c: float, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Solve a batch: weights (B, K), ``v - u`` (B, K), (objective, gap, scale) (B, 3), status codes (B,), passes.

    ``parts`` is (n0, h, H) or (G,), float64, batch first; ``tolerance`` the relative gap that counts as solved.
    """
    batch = build(parts, u, c)
    K = u.shape[1]
    steps = 4 * K
    w = frank_wolfe(batch, steps) if K > 2 else torch.full_like(u, 1 / K)
    w = faces(batch, w, FACES)
    _, q = batch.product(w)
    norm = q.clamp(min=0).sqrt()
    s, n0 = batch.s, batch.n0
    sizes = (batch.constant[:, None] + batch.beta).abs() + s[:, None] * batch.norms
    step = (c * (n0.sqrt() / norm.clamp(min=TINY)))[:, None] * w
    objective = batch.constant + (batch.beta * w).sum(-1) + s * norm
    gap = gap_at(batch, w)
    code = torch.full_like(n0, STATUSES.index("optimal"), dtype=torch.int64)

    vanishing = norm <= VANISHING * batch.reach(w)
    x, length, worst = cone(batch, w, PIVOTS)
    step = torch.where(vanishing[:, None], x, step)
    objective = torch.where(vanishing, 0.0, objective)
    gap = torch.where(vanishing, (-worst).clamp(min=0) + 0.0, gap)
    code = torch.where(vanishing, STATUSES.index("degenerate"), code)
    code = torch.where(vanishing & (length > 1 + 1e-9), STATUSES.index("inexact"), code)
    active = (w > 0) | (vanishing[:, None] & (x != 0))
    scale = torch.where(active, sizes, 0.0).amax(-1)
    scale = torch.where(vanishing, torch.maximum(scale, n0), scale)
    code = torch.where(gap > tolerance * scale, STATUSES.index("inexact"), code)

    lowest = _is(batch.beta.argmin(-1), K).to(u.dtype)
    for case, name, weights in (
        (n0 == 0, "stationary", u),
        (torch.full_like(vanishing, c == 0) & (n0 > 0), "mean", lowest),
    ):
        value = torch.zeros_like(n0) if name == "stationary" else batch.constant + batch.beta.amin(-1)
        w, step = torch.where(case[:, None], weights, w), torch.where(case[:, None], 0.0, step)
        objective, gap = torch.where(case, value, objective), torch.where(case, 0.0, gap)
        scale = torch.where(case, value.abs(), scale)
        code = torch.where(case, STATUSES.index(name), code)

    finite = batch.H.isfinite().all(-1).all(-1) & batch.h.isfinite().all(-1) & batch.n.isfinite()
    w, step = torch.where(finite[:, None], w, torch.nan), torch.where(finite[:, None], step, torch.nan)
    numbers = torch.stack([objective, gap, scale], -1)
    numbers = torch.where(finite[:, None], numbers, torch.nan)
    code = torch.where(finite, code, STATUSES.index("nonfinite"))
    return w, step, numbers, code, steps + FACES
