"""Who takes part in the modules of a group: ranks, weights and scalings of the members, as tensors made once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedgram import kernels

from .target import Target

Side = Literal["B", "A"]
SIDES: tuple[Side, Side] = ("B", "A")


@dataclass(frozen=True, eq=False)
class Members:
    """The members of L modules, of the same ranks in all of them.

    Attributes:
        targets: the modules.
        device: where they are solved; their factors may lie elsewhere.
    """

    targets: tuple[Target, ...]
    device: torch.device

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the members, the anchor last."""
        return self.targets[0].ranks

    @cached_property
    def total_rank(self) -> int:
        """R, the sum of the members' ranks."""
        return sum(self.ranks)

    @cached_property
    def weights(self) -> Tensor:
        """(L, M) float64 weights of the members, 0 for the anchor."""
        return _lines([t.weights for t in self.targets]).to(self.device)

    @cached_property
    def of_row(self) -> Tensor:
        """(R,) the member that each stacked row belongs to."""
        return members_of_rows(self.ranks).to(self.device)

    @cached_property
    def unscaled(self) -> bool:
        """Whether all scalings are 1."""
        return all(t.unscaled for t in self.targets)

    @cached_property
    def scale(self) -> dict[Side, Tensor]:
        """(L, M) float64 per side: what every member's factor is multiplied by for its scaling."""
        scalings = _lines([t.scalings for t in self.targets]).to(self.device)
        root = scalings.abs().sqrt()
        return {"B": scalings.sign() * root, "A": root}

    @cached_property
    def row_scale(self) -> dict[Side, Tensor]:
        """(L, R, 1) float64 per side: what every stacked row is multiplied by for its member's scaling."""
        return {side: scale[:, self.of_row].unsqueeze(-1) for side, scale in self.scale.items()}

    def average(self, side: Side) -> Sequence[Tensor]:
        """The scalars (M,) of every module's average, for the factors without their scalings, where these are."""
        scalars = self.weights if self.unscaled else self.weights * self.scale[side]
        return kernels.moved(scalars, self.targets[0].device).unbind()


@functools.lru_cache(maxsize=64)
def members_of_rows(ranks: tuple[int, ...]) -> Tensor:
    """(R,) of every stacked row the member that it belongs to; shared, hence not to be written to."""
    return torch.arange(len(ranks), device="cpu").repeat_interleave(torch.tensor(ranks, device="cpu"))


def _lines(vectors: list[Tensor]) -> Tensor:
    """(L, M), not to be written to: of one vector that all modules share, no copies."""
    first = vectors[0]
    return first.expand(len(vectors), -1) if all(v is first for v in vectors) else torch.stack(vectors)
