"""Aggregating LoRA as one writes it in plain PyTorch: averages, dense sums, dense and QR-based decompositions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .operations import weighted_sum

Pair = tuple[Tensor, Tensor]
Tensors = Sequence[Tensor]


def average(B: Tensors, A: Tensors, weights: Tensor) -> Pair:
    """FedIT: the averages of the factors, client by client."""
    w = weights.tolist()
    return weighted_sum(w, B), weighted_sum(w, A)


def dense_sum(B: Tensors, A: Tensors, weights: Tensor) -> Tensor:
    """``sum_u w_u B_u A_u`` (m, n), product by product."""
    dW = torch.zeros(B[0].shape[0], A[0].shape[1], dtype=B[0].dtype, device=B[0].device)
    for c, b, a in zip(weights.tolist(), B, A, strict=True):
        dW += c * (b @ a)
    return dW


def dense_svd(B: Tensors, A: Tensors, weights: Tensor, rank: int) -> Pair:
    """The best pair of a rank from the SVD of the dense sum."""
    U, s, V = torch.linalg.svd(dense_sum(B, A, weights), full_matrices=False)
    return U[:, :rank] * s[:rank], V[:rank]


def qr_svd(B: Tensors, A: Tensors, weights: Tensor, rank: int) -> Pair:
    """The same from ``cat``, two QR factorisations and the SVD of their small core."""
    left = torch.cat([b * c for b, c in zip(B, weights.tolist(), strict=True)], 1)
    Q_B, R_B = torch.linalg.qr(left)
    Q_A, R_A = torch.linalg.qr(torch.cat(list(A), 0).T)
    U, s, V = torch.linalg.svd(R_B @ R_A.T)
    return Q_B @ (U[:, :rank] * s[:rank]), V[:rank] @ Q_A.T


def dense_residual(B: Tensors, A: Tensors, weights: Tensor) -> Tensor:
    """FedEx-LoRA: what the averaged factors miss, ``sum w_u B_u A_u - (sum w_u B_u)(sum w_u A_u)``, dense."""
    mean_B, mean_A = average(B, A, weights)
    return dense_sum(B, A, weights) - mean_B @ mean_A


def dense_client_gramian(B: Sequence[Tensors], A: Sequence[Tensors]) -> Tensor:
    """(U, U) inner products of the clients' updates over all modules, from dense products."""
    total = torch.zeros(len(B[0]), len(B[0]), dtype=B[0][0].dtype, device=B[0][0].device)
    for bs, as_ in zip(B, A, strict=True):
        updates = torch.stack([(b @ a).flatten() for b, a in zip(bs, as_, strict=True)])
        total += updates @ updates.T
    return total
