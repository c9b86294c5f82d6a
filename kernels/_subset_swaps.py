"""Greedy selection and best-improvement swaps on centred class Grams, all classes and starts in lock step.

With ``K_ij = <x_i, x_j>`` of the centred rows and ``r = K 1_S``, ``m^2 ||mean_S||^2 = 1_S^T K 1_S``, and exchanging
the member i for j changes it by ``2 (r_j - r_i) + K_ii + K_jj - 2 K_ij``.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Swaps between two looks at whether all are done: a look makes a GPU wait.
STEPS_PER_LOOK = {"cpu": 1}
STEPS_PER_LOOK_DEVICE = 16


class MemberRows:
    """Rows of the centred Grams of several classes, from the Gram or straight from the centred rows."""

    def __init__(self, centred: Tensor, sizes: Tensor, *, gram: bool) -> None:
        self.centred = centred  # (C, n, p) float64
        self.sizes = sizes  # (C,)
        self.gram = torch.bmm(centred, centred.transpose(1, 2)) if gram else None  # (C, n, n)
        self.diagonal = centred.square().sum(2)  # (C, n)
        self.beyond = torch.arange(centred.shape[1], device=sizes.device) >= sizes[:, None]  # (C, n) padding

    def take(self, j: Tensor) -> Tensor:
        """Rows j (C, S) of the Grams: (C, S, n)."""
        source = self.centred if self.gram is None else self.gram
        rows = torch.gather(source, 1, j[:, :, None].expand(-1, -1, source.shape[2]))
        return rows if self.gram is not None else torch.bmm(rows, self.centred.transpose(1, 2))


@dataclasses.dataclass
class Starts:
    """S subsets of each of C classes: ``members`` (C, S, m) row numbers, of which the first ``counts`` (C,) count."""

    members: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, rows: MemberRows, counts: Tensor, m: int, S: int) -> Starts:
        """Room for S subsets of at most m members."""
        return cls(torch.zeros((len(counts), S, m), dtype=torch.int64, device=counts.device), counts)

    @property
    def valid(self) -> Tensor:
        """(C, 1, m): which of the members count."""
        return (torch.arange(self.members.shape[2], device=self.counts.device) < self.counts[:, None])[:, None]


def greedy(rows: MemberRows, starts: Starts) -> None:
    """Fill start 0: each new member is the row that brings the members' sum nearest zero (least, never most)."""
    taken = rows.beyond.clone()
    r = torch.zeros_like(rows.diagonal)
    for t in range(starts.members.shape[2]):
        growth = (2 * r + rows.diagonal).masked_fill_(taken, torch.inf)
        j = growth.argmin(1, keepdim=True)
        active = (t < starts.counts)[:, None]
        starts.members[:, 0, t] = torch.where(active, j, 0)[:, 0]
        taken.scatter_(1, j, taken.gather(1, j) | active)
        r += torch.where(active, rows.take(j)[:, 0], 0)


def tolerance(rows: MemberRows, starts: Starts) -> Tensor:
    """(C,) change of ``m^2 ||mean||^2`` that is rounding: sums of m entries, each a product over p, up to max K_ii."""
    return 8 * torch.finfo(torch.float64).eps * (starts.counts + rows.centred.shape[2]) * rows.diagonal.amax(1)


def descend(rows: MemberRows, starts: Starts, look: int | None = None) -> Tensor:
    """Swap until nothing improves, looking every ``look`` swaps; return (C, S) whether that point was reached."""
    C, S, m = starts.members.shape
    n = rows.diagonal.shape[1]
    valid = starts.valid
    panel = torch.stack([rows.take(starts.members[:, :, t]) for t in range(m)], 2)  # (C, S, m, n)
    panel.masked_fill_(~valid[..., None], 0)
    taken = taken_rows(rows, starts)
    limit = -tolerance(rows, starts)[:, None]
    look = look or STEPS_PER_LOOK.get(starts.members.device.type, STEPS_PER_LOOK_DEVICE)
    change = torch.empty_like(panel)
    r = panel.sum(2)
    done = torch.zeros((C, S), dtype=torch.bool, device=r.device)
    for step in range(most_swaps(m, n)):
        best, slot, j = _best_swap(rows, starts.members, valid, taken, panel, r, change)
        done = best >= limit
        if step % look == look - 1 and bool(done.all()):
            break
        _swap(rows, starts.members, taken, panel, slot, j, done)
        r = panel.sum(2)
    return done


def most_swaps(m: int, n: int) -> int:
    """Each swap lowers the error, so the search ends by itself; this only bounds it. Typical are m to 3 m swaps."""
    return 100 + 20 * min(m, n)


def taken_rows(rows: MemberRows, starts: Starts) -> Tensor:
    """(C, S, n): members and padding, which cannot come."""
    members = torch.where(starts.valid, starts.members, starts.members[:, :, :1])
    return rows.beyond[:, None].repeat(1, members.shape[1], 1).scatter_(2, members, True)


def _best_swap(
    rows: MemberRows, members: Tensor, valid: Tensor, taken: Tensor, panel: Tensor, r: Tensor, change: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best exchange of each subset: its change (C, S), the slot that goes and the row that comes."""
    C, S, m, n = panel.shape
    diagonal = rows.diagonal[:, None].expand(-1, S, -1)
    comes = (diagonal + 2 * r).masked_fill_(taken, torch.inf)
    goes = (diagonal - 2 * r).gather(2, members).masked_fill_(~valid, torch.inf)
    torch.add(comes[:, :, None, :], panel, alpha=-2, out=change)
    change += goes[..., None]
    best, where = change.view(C, S, m * n).min(2)
    return best, where // n, where % n


def _swap(
    rows: MemberRows, members: Tensor, taken: Tensor, panel: Tensor, slot: Tensor, j: Tensor, done: Tensor
) -> None:
    """Exchange, in every subset that is not done, the member at ``slot`` for row ``j``."""
    n = panel.shape[3]
    at = slot[:, :, None]
    leaving = members.gather(2, at)
    coming = torch.where(done[:, :, None], leaving, j[:, :, None])
    taken.scatter_(2, leaving, False).scatter_(2, coming, True)
    members.scatter_(2, at, coming)
    panel.scatter_(2, at[..., None].expand(-1, -1, -1, n), rows.take(coming[:, :, 0])[:, :, None])
