"""Inner products of the clients' factors in the metric of a small matrix: what FLoRA-NA's normal equations hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._factor_inputs import Factors, TallColumns, check_factors, tall_A, tall_B

Traces = list[Tensor] | None


def factor_traces(
    B: Factors | None, A: Factors | None, S_B: Sequence[Tensor] | None, S_A: Sequence[Tensor] | None
) -> tuple[Traces, Traces]:
    """``H_ik = tr(B_i^T B_k S_B)`` and ``H_ik = tr(A_i A_k^T S_A)`` of every pair of clients, module by module.

    This is the matrix of the least squares for one scalar per client (FLoRA-NA, arXiv:2509.26399; docs/math.md 1.3).
    With ``S = C C^T`` it is the Gram matrix of the vectors ``B_u C``, r times fewer operations than that of the
    stacked factors. Factors of lower rank than S count as padded by zeros. Work in float64 matrix products, block by
    block; BLAS and cuBLAS are at the floor for it, so there is no Triton variant. A side is skipped by passing both of
    its arguments as None.

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``, any float type; or None.
        A: ``A[l][u]`` (r_lu, n_l), or None.
        S_B: ``S_B[l]`` (r_l, r_l) float64, positive semidefinite, r_l the largest rank of the module; or None.
        S_A: the same for A.

    Returns:
        Two lists of (U_l, U_l) float64 matrices on the inputs' device; None for a skipped side.

    Raises:
        ValueError: shapes or types do not fit together; the message names the tensor.
    """
    check_factors(B, A)
    for name, factors, S in (("S_B", B, S_B), ("S_A", A, S_A)):
        if (factors is None) != (S is None) or (S is not None and factors is not None and len(S) != len(factors)):
            raise ValueError(f"{name}: expected one matrix for every module of {name[-1]}")
    left = None if B is None or S_B is None else [_traces(tall_B(b), s, "S_B") for b, s in zip(B, S_B, strict=True)]
    right = None if A is None or S_A is None else [_traces(tall_A(a), s, "S_A") for a, s in zip(A, S_A, strict=True)]
    return left, right


@torch.no_grad()
def _traces(stack: TallColumns, S: Tensor, name: str) -> Tensor:
    ranks = [t.shape[1] for t in stack.columns]
    clients, r = len(ranks), max(ranks)
    if S.shape != (r, r) or S.dtype != torch.float64:
        raise ValueError(f"{name}: expected float64 ({r}, {r}), got {tuple(S.shape)} {S.dtype}")
    values, vectors = torch.linalg.eigh(0.5 * (S + S.T))
    root = vectors * values.clamp_min(0.0).sqrt()
    H = torch.zeros(clients, clients, dtype=torch.float64, device=stack.device)
    place = _places(ranks, r).to(stack.device) if min(ranks) < r else None
    for _, _, block in stack.blocks():
        if place is not None:
            padded = block.new_zeros(len(block), clients * r)
            padded[:, place] = block
            block = padded
        rows = (block.reshape(len(block), clients, r) @ root).transpose(0, 1).reshape(clients, -1)
        H.addmm_(rows, rows.T)
    upper = H.triu()  # BLAS does not promise equal bits in the two triangles
    return upper + upper.triu(1).T


def _places(ranks: Sequence[int], r: int) -> Tensor:
    """(R,) where each stacked column lies once every client has r of them."""
    return torch.cat([torch.arange(rank, device="cpu") + u * r for u, rank in enumerate(ranks)])
