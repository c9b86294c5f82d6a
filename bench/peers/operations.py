"""Each operation as one writes it in plain PyTorch: concatenate or stack, then multiply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


def weighted_sum(values: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    """``sum_u c_u X_u``, one product and one sum after the other."""
    return reduce(torch.add, (c * x for c, x in zip(values, tensors, strict=True)))


def cat_gram(B: Lists, A: Lists) -> tuple[list[Tensor], list[Tensor]]:
    """Gram matrices of the concatenated factors, module by module."""
    left = [torch.cat(list(bs), 1) for bs in B]
    right = [torch.cat(list(as_), 0) for as_ in A]
    return [x.T @ x for x in left], [x @ x.T for x in right]


def cat_gram_float32(B: Lists, A: Lists) -> tuple[list[Tensor], list[Tensor]]:
    """The same after conversion to float32."""
    left = [torch.cat(list(bs), 1).float() for bs in B]
    right = [torch.cat(list(as_), 0).float() for as_ in A]
    return [x.T @ x for x in left], [x @ x.T for x in right]


def cat_cross(B: Lists, A: Lists, X_B: Sequence[Tensor], X_A: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Products of the concatenated factors with one more matrix per side."""
    left = [torch.cat(list(bs), 1).T @ x for bs, x in zip(B, X_B, strict=True)]
    return left, [torch.cat(list(as_), 0) @ x.T for as_, x in zip(A, X_A, strict=True)]


def cat_combine(B: Lists, A: Lists, P: Sequence[Tensor], Q: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """``sum_u B_u P_u`` and ``sum_u Q_u A_u`` from the concatenated factors."""
    left = [torch.cat(list(bs), 1) @ p.to(bs[0].dtype) for bs, p in zip(B, P, strict=True)]
    return left, [q.to(as_[0].dtype) @ torch.cat(list(as_), 0) for as_, q in zip(A, Q, strict=True)]


def dense_accumulate(W: Tensor, B: Sequence[Tensor], A: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    """``W + sum_u c_u B_u A_u``, one dense product per client."""
    out = W.clone()
    for b, a, x in zip(B, A, c, strict=True):
        out += x * (b @ a)
    return out


def cat_accumulate(W: Tensor, B: Sequence[Tensor], A: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    """The same as one ``addmm`` of the concatenated factors."""
    return torch.addmm(W, torch.cat([b * x for b, x in zip(B, c, strict=True)], 1), torch.cat(list(A), 0))


def stack_gram(lists: Lists) -> Tensor:
    """(K, K) plain Gram matrix of gradients that are flattened and stacked first."""
    rows = torch.stack([torch.cat([t.flatten() for t in tensors]) for tensors in lists])
    return rows @ rows.T


def stack_centred_gram(lists: Lists) -> Tensor:
    """(K, K) Gram matrix of the stacked gradients' differences from their mean."""
    rows = torch.stack([torch.cat([t.flatten() for t in tensors]) for tensors in lists])
    rows -= rows.mean(0)
    return rows @ rows.T


def loop_combine(lists: Lists, coefficients: Sequence[float]) -> list[Tensor]:
    """``sum_k v_k g_k``, parameter by parameter."""
    return [weighted_sum(coefficients, tensors) for tensors in zip(*lists, strict=True)]


def stack_combine(lists: Lists, coefficients: Tensor) -> list[Tensor]:
    """The same with each parameter's gradients stacked."""
    return [torch.tensordot(coefficients, torch.stack(t), 1) for t in zip(*lists, strict=True)]


def materialised_gram(a: Tensor, d: Tensor, tasks: int) -> Tensor:
    """(K, K) Gram matrix of a linear layer's task gradients, formed one by one; the tasks have equal rows."""
    x, y = a.view(tasks, -1, a.shape[1]), d.view(tasks, -1, d.shape[1])
    g = torch.bmm(y.transpose(1, 2), x).flatten(1)
    return g @ g.T


def square_gram(a: Tensor, d: Tensor, tasks: int) -> Tensor:
    """The same from N x N products of all rows."""
    rows = (a @ a.T) * (d @ d.T)
    return rows.view(tasks, len(a) // tasks, tasks, -1).sum((1, 3))
