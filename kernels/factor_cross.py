"""Products of the clients' stacked LoRA factors with one more matrix: ``Bs^T X_B`` and ``As X_A^T`` per module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dispatch import resolve
from ._factor_inputs import FLOATS, Factors, Stack, check_factors, flat, tall_A, tall_B

Crosses = list[Tensor] | None


def factor_cross(
    B: Factors | None,
    A: Factors | None,
    X_B: Sequence[Tensor] | None,
    X_A: Sequence[Tensor] | None,
    *,
    precise: bool = False,
    backend: str = "auto",
) -> tuple[Crosses, Crosses]:
    """Inner products of the stacked factors with the columns of ``X_B`` and the rows of ``X_A``.

    Module by module ``Bs^T X_B`` (R, k) and ``As X_A^T`` (R, k): what an anchor, an alignment or a subspace iteration
    needs from the clients' factors. A side is skipped by passing both of its arguments as None.

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``, or None.
        A: ``A[l][u]`` (r_lu, n_l), or None.
        X_B: ``X_B[l]`` (m_l, k_l), or None.
        X_A: ``X_A[l]`` (k_l, n_l), or None.
        precise: as in ``factor_gram``.
        backend: ``auto``, ``triton`` or ``torch``.

    Returns:
        Two lists of (R_l, k_l) float64 matrices on the inputs' device; None for a skipped side.

    Raises:
        ValueError: shapes, types or devices do not fit together; the message names the tensor.
        RuntimeError: ``backend="triton"`` cannot run here.
    """
    check_cross(B, A, X_B, X_A)
    resolve(backend, flat(B, A, X_B, X_A))
    return factor_cross_torch(B, A, X_B, X_A, precise=precise)


def check_cross(
    B: Factors | None, A: Factors | None, X_B: Sequence[Tensor] | None, X_A: Sequence[Tensor] | None
) -> None:
    """Raise ValueError unless the arguments of ``factor_cross`` fit together."""
    check_factors(B, A)
    for name, factors, X, dim in (("X_B", B, X_B, 0), ("X_A", A, X_A, 1)):
        if (factors is None) != (X is None):
            raise ValueError(f"{name}: must be None exactly where {name[-1]} is None")
        if X is None or factors is None:
            continue
        if len(X) != len(factors):
            raise ValueError(f"{name}: {len(X)} modules, {name[-1]} has {len(factors)}")
        for l, (x, clients) in enumerate(zip(X, factors, strict=True)):
            if x.ndim != 2 or x.dtype not in FLOATS or x.shape[dim] != clients[0].shape[dim]:
                raise ValueError(
                    f"{name}[{l}]: expected a float matrix with dimension {dim} of {clients[0].shape[dim]}, "
                    f"got {tuple(x.shape)} {x.dtype}"
                )


@torch.no_grad()
def factor_cross_torch(
    B: Factors | None,
    A: Factors | None,
    X_B: Sequence[Tensor] | None,
    X_A: Sequence[Tensor] | None,
    *,
    precise: bool = False,
) -> tuple[Crosses, Crosses]:
    """The torch twin of ``factor_cross``: float64 throughout, in blocks that fit the cache."""
    left = None if B is None or X_B is None else [_cross(tall_B(bs), x) for bs, x in zip(B, X_B, strict=True)]
    right = None if A is None or X_A is None else [_cross(tall_A(as_), x.T) for as_, x in zip(A, X_A, strict=True)]
    return left, right


def _cross(stack: Stack, x: Tensor) -> Tensor:
    out = torch.zeros(stack.width, x.shape[1], dtype=torch.float64, device=stack.device)
    for start, stop, block in stack.blocks():
        out.addmm_(block.T, x[start:stop].double())
    return out
