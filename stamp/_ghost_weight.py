"""The gradients of all tasks with respect to one weight: as factors while that is cheaper, else as matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedgram.kernels import ghost_gram

from ._ghost_uses import DenseUse, TokenUse, Use

Kind = TypeVar("Kind", DenseUse, TokenUse)
CROSS_BLOCK = 1024  # rows of an embedding met with the rows of a tied linear layer at a time


def prefers_ghost(shape: Sequence[int], tasks: int, dense_rows: int, token_rows: int = 0) -> bool:
    """Whether the Gram from factors costs fewer operations than gradients first, for a weight of (q, p...) entries.

    Dense rows alone: ``N^2 (p + q) < (N + K^2) p q``. Rows of an embedding are one-hot on one side, so both ways are
    cheaper for them. Both sides grow with the rows, the left one faster: once False, more rows keep it False.
    """
    q, p = shape[0], math.prod(shape[1:])
    ghost = dense_rows**2 * (p + q) + token_rows**2 * (p + 1) + dense_rows * token_rows * p
    materialised = (dense_rows + tasks**2) * p * q + token_rows * p
    return ghost < materialised


@dataclass(eq=False)
class GhostWeight:
    """One weight, under all its uses: calls of one layer several times, or of several layers that share it.

    Attributes:
        name: the parameter's name in the model.
        weight: the parameter, shape (q, p) or (q, c_in, kernel...).
        tasks: how many tasks there will be.
        uses: per task so far, the calls; empty once ``gradients`` is in use.
        gradients: None while factors are kept; else per task the gradient, or None for a task without one.
    """

    name: str
    weight: nn.Parameter
    tasks: int
    uses: list[list[Use]] = field(default_factory=list)
    gradients: list[Tensor | None] | None = None

    @property
    def is_ghost(self) -> bool:
        """Whether factors, not gradients, are kept."""
        return self.gradients is None

    def expect(self, dense_rows: int, token_rows: int) -> None:
        """Turn to gradients where so many more rows make that the cheaper way."""
        dense, tokens = self._rows(DenseUse) + dense_rows, self._rows(TokenUse) + token_rows
        if not prefers_ghost(self.weight.shape, self.tasks, dense, tokens):
            self.materialise()

    def materialise(self) -> None:
        """Replace the factors of the tasks so far by their gradients; later tasks bring gradients."""
        if self.is_ghost:
            self.gradients = [self._gradient(uses) for uses in self.uses]
            self.uses = []

    def gram(self, backend: str = "auto") -> Tensor:
        """The (K, K) Gram matrix of the tasks' gradients, float64, from the factors."""
        dense = [[use for use in uses if isinstance(use, DenseUse)] for uses in self.uses]
        tokens = [[use for use in uses if isinstance(use, TokenUse)] for uses in self.uses]
        G = torch.zeros(self.tasks, self.tasks, dtype=torch.float64, device=self.weight.device)
        if self._rows(DenseUse):
            A, D = _stack(dense, lambda use: use.inputs()), _stack(dense, lambda use: use.grads)
            wider = torch.promote_types(A.dtype, D.dtype)
            G += ghost_gram(A.to(wider), D.to(wider), _offsets(dense), precise=True, backend=backend)
        if self._rows(TokenUse):
            T, E = _stack(tokens, lambda use: use.tokens), _stack(tokens, lambda use: use.grads)
            G += ghost_gram(T, E, _offsets(tokens), precise=True, backend=backend)
        if self._rows(DenseUse) and self._rows(TokenUse):
            C = _cross_gram(T, E, _offsets(tokens), A, D, _offsets(dense))
            G += C + C.T
        return G

    def _rows(self, kind: type) -> int:
        return sum(len(use) for uses in self.uses for use in uses if isinstance(use, kind))

    def _gradient(self, uses: list[Use]) -> Tensor | None:
        with torch.autocast(self.weight.device.type, enabled=False):
            parts = [use.gradient(self.weight.shape) for use in uses]
        return sum(parts[1:], start=parts[0]) if parts else None


def _stack(uses: Sequence[Sequence[Kind]], of: Callable[[Kind], Tensor]) -> Tensor:
    """One factor of all calls of all tasks as rows."""
    return torch.cat([of(use) for task in uses for use in task])


def _offsets(uses: Sequence[Sequence[Use]]) -> list[int]:
    """Where the rows of each task start and the last one's end, K + 1 numbers."""
    return [0, *itertools.accumulate(sum(len(use) for use in task) for task in uses)]


def _cross_gram(T: Tensor, E: Tensor, tokens: list[int], A: Tensor, D: Tensor, dense: list[int]) -> Tensor:
    """Inner products between an embedding's rows and a tied linear layer's.

    ``C_kl = sum over i in k, j in l of D[j, T_i] (E_i . A_j)``, float64, shape (K, K).
    """
    K = len(tokens) - 1
    C = torch.zeros(K, K, dtype=torch.float64, device=D.device)
    for k, l in itertools.product(range(K), repeat=2):
        A_l, D_l = (t[dense[l] : dense[l + 1]].to(torch.float64) for t in (A, D))
        for start in range(tokens[k], tokens[k + 1], CROSS_BLOCK):
            rows = slice(start, min(start + CROSS_BLOCK, tokens[k + 1]))
            C[k, l] += ((E[rows].to(torch.float64) @ A_l.T) * D_l[:, T[rows]].T).sum()
    return C
