"""All inner products ``<B_i A_j, B_k A_l>`` of a few members: what the scalar estimator's sweeps are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .group import Group
from .members import Side

MEMBERS = 16
"""Up to this many members (clients and anchor) their U^4 products are formed once; a sweep then takes few operations
on small tensors. Above, sweeps work on the Grams (``_scalar_problem``)."""


class PairProducts:
    """``H p = h`` of docs/math.md 1.3 from ``T[ik, jl] = <B_i A_j, B_k A_l>``, (L, U^2, U^2) float64.

    ``H_ik = sum_jl T[ik, jl] q_j q_l`` and ``h_i = sum_j E_ij q_j`` with ``E_ij = <B_i A_j, dW>``; for the other side
    the same with T and E transposed.
    """

    def __init__(self, T: Tensor, E: Tensor, squares: dict[Side, Tensor]) -> None:
        self.T, self.E, self.squares = T, E, squares
        self.U = E.shape[-1]

    @staticmethod
    def fits(group: Group) -> bool:
        """Whether the group has few enough members."""
        return len(group.ranks) <= MEMBERS

    @classmethod
    def of(cls, groups: Sequence[Group], collect: Callable[[list[Tensor]], Tensor]) -> PairProducts:
        """The products of every module of one group, or summed over all (``collect``)."""
        parts = [_products(group) for group in groups]
        T, E, b, a = (collect(list(terms)) for terms in zip(*parts, strict=True))
        return cls(T, E, {"B": b, "A": a})

    def equations(self, side: Side, q: Tensor) -> tuple[Tensor, Tensor]:
        """H (L, U, U) and h (L, U) of one side, given the coefficients q (L, U) of the other."""
        qq = (q.unsqueeze(-1) * q.unsqueeze(-2)).flatten(-2)
        if side == "B":
            H, h = (self.T * qq.unsqueeze(-2)).sum(-1), (self.E * q.unsqueeze(-2)).sum(-1)
        else:
            H, h = (self.T * qq.unsqueeze(-1)).sum(-2), (self.E * q.unsqueeze(-1)).sum(-2)
        return H.view(-1, self.U, self.U), h

    def cross(self, p: Tensor, q: Tensor) -> Tensor:
        """Half the second derivatives of the squared error by p_i (rows) and q_v, (L, U, U).

        ``<B_i A_v, BA> + <B_i A(q), B(p) A_v> - <B_i A_v, dW>``.
        """
        return torch.einsum("zikvl,zk,zl->ziv", self._with_mirror, p, q) - self.E

    @cached_property
    def _with_mirror(self) -> Tensor:
        T = self.T.view(-1, *[self.U] * 4)
        return T + T.transpose(-1, -2)

    def square(self, side: Side, p: Tensor) -> Tensor:
        """``||sum p_u B_u||^2`` (L,), or that of A."""
        return (self.squares[side] * (p.unsqueeze(-1) * p.unsqueeze(-2)).flatten(-2)).sum(-1)


def _products(group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T, E and the inner products ``<B_i, B_k>``, ``<A_j, A_l>`` (L, U^2) of one group."""
    assert group.gram is not None
    blocks = [_blocks(group, group.gram[side]) for side in ("B", "A")]
    L, U, r = len(group.targets), len(group.ranks), group.rank
    T = blocks[0] @ blocks[1].mT
    # <B_i A_j, B_u A_u>: k and l both u
    with_products = T.view(L, U, U, U, U).diagonal(dim1=2, dim2=4)
    E = (with_products * group.weights[:, None, None, :]).sum(-1)
    traces = [b.view(L, U * U, r, r).diagonal(dim1=-2, dim2=-1).sum(-1) for b in blocks]
    return T, E, traces[0], traces[1]


def _blocks(group: Group, gram: Tensor) -> Tensor:
    """(L, U^2, r^2): row ik is the block ``B_i^T B_k``, or ``A_i A_k^T``, zero-padded to the largest rank."""
    L, U, r = gram.shape[0], len(group.ranks), group.rank
    if any(rank != r for rank in group.ranks):
        at = group.member * r + group.slot
        padded = gram.new_zeros(L, U * r, U * r)
        padded[:, at[:, None], at] = gram
        gram = padded
    return gram.view(L, U, r, U, r).transpose(2, 3).reshape(L, U * U, r * r)
