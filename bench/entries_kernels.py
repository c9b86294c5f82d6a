"""The operations' entries: each against the obvious PyTorch, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedgram import kernels

from .ceilings import Cost, rate_of
from .peers import operations
from .peers.optional import compiled, compiled_name
from .reference import GRAM, dense_update, list_error, relative_error
from .registry import Case, Contender, Size, entry, with_peers
from .workloads import TINY, W1, W2_MODULE, Lora, factors, sample_weights


def factor_size(size: Size, device: torch.device, dtype: torch.dtype) -> Lora:
    """W1, a part of it, or what tests take."""
    quick = W1 if device.type == "cuda" else replace(W1, modules=6)
    return replace({"full": W1, "quick": quick, "tiny": TINY}[size], dtype=dtype)


def gram_cost(lora: Lora, rate: str) -> Cost:
    """One read of the factors; both Gram matrices, half of each by symmetry."""
    R = lora.total_rank
    flops = lora.modules * (lora.m + lora.n) * R * R
    return Cost(flops, lora.bytes + 2 * 8 * lora.modules * R * R, lora.bytes, rate)


def _gram_case(size: Size, lora: Lora, device: torch.device, peers: Callable[..., list[Contender]]) -> Case:
    B, A = factors(lora, device)
    wide = [(torch.cat(list(bs), 1).double(), torch.cat(list(as_), 0).double()) for bs, as_ in zip(B, A, strict=True)]
    truth = [x.T @ x for x, _ in wide] + [x @ x.T for _, x in wide]

    def error(result: tuple[list[Tensor], list[Tensor]]) -> float:
        return list_error([*result[0], *result[1]], truth)

    ours = [Contender("factor_gram", partial(kernels.factor_gram, B, A), "ours", GRAM), *peers(B, A)]
    plain = operations.cat_gram if lora.dtype == torch.float32 else operations.cat_gram_float32

    def by_compiler() -> Contender:
        name = compiled_name(ours[1].name)
        return Contender(name, compiled(name, plain, device, B, A), "torch", 1e-5, slow=True)

    # unrolled over W1's modules it compiles for half a minute: once is enough
    compile_it = size == "full" and (lora.dtype == torch.float32 or lora.modules == 1)
    contenders, missing = with_peers(ours, *([by_compiler] if compile_it else []))
    cost = gram_cost(lora, rate_of(lora.dtype, device))
    return Case(str(lora), contenders, error, "relative error of the Grams", cost, (), missing)


@entry("factor_gram", "kernels", gpu=True)
def factor_gram(size: Size, device: torch.device) -> Case:
    """Gram matrices of float32 factors."""
    # a float32 chain over 1024 products of mixed sign
    return _gram_case(
        size,
        factor_size(size, device, torch.float32),
        device,
        lambda B, A: [Contender("cat + mm", partial(operations.cat_gram, B, A), "torch", 1e-5)],
    )


@entry("factor_gram-bf16", "kernels", gpu=True)
def factor_gram_bf16(size: Size, device: torch.device) -> Case:
    """Gram matrices of bfloat16 factors; multiplied in bfloat16 they come back rounded to three digits."""
    return _gram_case(
        size,
        factor_size(size, device, torch.bfloat16),
        device,
        lambda B, A: [
            Contender("cat + float32 mm", partial(operations.cat_gram_float32, B, A), "torch", 1e-5),
            Contender(
                "cat + bf16 mm", partial(operations.cat_gram, B, A), "torch", 1e-5, note="output rounded to bf16"
            ),
        ],
    )


@entry("factor_cross", "kernels", gpu=True)
def factor_cross(size: Size, device: torch.device) -> Case:
    """Products of the stacked factors with a block of vectors: one step of subspace iteration, one alignment."""
    lora = factor_size(size, device, torch.float32)
    B, A = factors(lora, device)
    X_B, X_A = ([side[l][0].clone() for l in range(lora.modules)] for side in (B, A))
    truth = [torch.cat(list(bs), 1).double().T @ x.double() for bs, x in zip(B, X_B, strict=True)]
    truth += [torch.cat(list(as_), 0).double() @ x.double().T for as_, x in zip(A, X_A, strict=True)]
    contenders = [
        Contender("factor_cross", partial(kernels.factor_cross, B, A, X_B, X_A), "ours", GRAM),
        Contender("cat + mm", partial(operations.cat_cross, B, A, X_B, X_A), "torch", 1e-5),
    ]
    flops = 2 * lora.modules * (lora.m + lora.n) * lora.total_rank * lora.rank
    cost = Cost(flops, lora.bytes * (1 + 1 / lora.clients), lora.bytes, rate_of(lora.dtype, device))
    return Case(str(lora), contenders, lambda r: list_error([*r[0], *r[1]], truth), "relative error", cost)


def _combine_case(
    lora: Lora, device: torch.device, P: list[Tensor], Q: list[Tensor], plain: Callable[..., Any]
) -> Case:
    B, A = factors(lora, device)
    blocks_P = [_blocks(p, lora) for p in P]
    blocks_Q = [_blocks(q, lora).T if q.ndim == 1 else q for q in Q]
    truth = [torch.cat(list(bs), 1).double() @ p for bs, p in zip(B, blocks_P, strict=True)]
    truth += [q @ torch.cat(list(as_), 0).double() for as_, q in zip(A, blocks_Q, strict=True)]
    contenders = [
        # one rounding of the output type; on a GPU three tf32 products as well
        Contender(
            "factor_combine",
            partial(kernels.factor_combine, B, A, P, Q),
            "ours",
            1e-7 if device.type == "cpu" else 2e-6,
        ),
        Contender(plain.__doc__ or "", lambda: plain(B, A), "torch", 1e-5),
    ]
    # a scalar multiplies all r columns of a factor
    width = sum(p.numel() * (lora.rank if p.ndim == 1 else 1) for p in P)
    flops = 2 * (lora.m + lora.n) * width
    cost = Cost(flops, lora.bytes * (1 + 1 / lora.clients), lora.bytes, rate_of(lora.dtype, device))
    return Case(str(lora), contenders, lambda r: list_error([*r[0], *r[1]], truth), "relative error", cost)


def _blocks(p: Tensor, lora: Lora) -> Tensor:
    """Scalars as blocks: ``p_u I`` one below the other, (R, r)."""
    eye = torch.eye(lora.rank, dtype=p.dtype, device=p.device)
    return torch.cat([x * eye for x in p]) if p.ndim == 1 else p


@entry("factor_combine-scalars", "kernels", gpu=True)
def factor_combine_scalars(size: Size, device: torch.device) -> Case:
    """One scalar per client and side, all modules."""
    lora = factor_size(size, device, torch.float32)
    w = sample_weights(lora.clients).to(device)
    values = w.tolist()

    def plain(B: list[list[Tensor]], A: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """loop over clients"""
        left = [operations.weighted_sum(values, bs) for bs in B]
        return left, [operations.weighted_sum(values, as_) for as_ in A]

    return _combine_case(lora, device, [w] * lora.modules, [w] * lora.modules, plain)


@entry("factor_combine-blocks", "kernels", gpu=True)
def factor_combine_blocks(size: Size, device: torch.device) -> Case:
    """A block of coefficients per client and side, all modules."""
    lora = factor_size(size, device, torch.float32)
    random = torch.Generator().manual_seed(1)
    P = [
        torch.randn(lora.total_rank, lora.rank, dtype=torch.float64, generator=random).to(device)
        for _ in range(lora.modules)
    ]
    Q = [p.T.contiguous() for p in P]

    def plain(B: list[list[Tensor]], A: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """cat + mm"""
        return operations.cat_combine(B, A, P, Q)

    return _combine_case(lora, device, P, Q, plain)


@entry("lowrank_sum", "kernels", gpu=True)
def lowrank_sum(size: Size, device: torch.device) -> Case:
    """All clients' products added to one weight: merging, exact residuals; every contender makes a new weight."""
    return _sum_case(size, device, torch.float32 if device.type == "cpu" else torch.bfloat16)


@entry("lowrank_sum-bf16", "kernels")
def lowrank_sum_bf16(size: Size, device: torch.device) -> Case:
    """The same in bfloat16, which some processors multiply with a unit of their own."""
    return _sum_case(size, device, torch.bfloat16)


def _sum_case(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    side = {"full": 4096, "quick": 2048, "tiny": 24}[size]
    lora = replace(TINY, modules=1) if size == "tiny" else Lora(1, 10, side, side, 16, dtype)
    (B,), (A,) = factors(lora, device)
    W = torch.randn(lora.m, lora.n, generator=torch.Generator().manual_seed(2)).to(device, lora.dtype)
    c = sample_weights(lora.clients).to(device)
    truth = W.double() + dense_update(B, A, c)
    # one rounding of the output type, against a rounding of it per client
    one = {torch.float32: 1e-7, torch.bfloat16: 2.5e-3}[lora.dtype]
    contenders = [
        Contender("lowrank_sum", partial(kernels.lowrank_sum, W, B, A, c), "ours", one),
        Contender("W += c B A", partial(operations.dense_accumulate, W, B, A, c.tolist()), "torch", 10 * one),
        Contender("cat + addmm", partial(operations.cat_accumulate, W, B, A, c.tolist()), "torch", 10 * one),
    ]
    flops = 2 * lora.m * lora.n * lora.total_rank
    cost = Cost(flops, 2 * W.nbytes + lora.bytes, W.nbytes + lora.bytes, rate_of(lora.dtype, device))
    return Case(str(lora), contenders, lambda r: relative_error(r, truth), "relative error of W", cost)


@entry("lowrank_norm", "kernels", gpu=True)
def lowrank_norm(size: Size, device: torch.device) -> Case:
    """The norm behind every reported rho, without a dense matrix."""
    lora = replace(TINY, modules=1) if size == "tiny" else Lora(1, 10, 2048, 2048, 16)
    B, A = factors(lora, device)
    c = sample_weights(lora.clients).to(device)
    truth = dense_update(B[0], A[0], c).norm()

    def dense() -> Tensor:
        return (
            torch.cat([b.double() * x for b, x in zip(B[0], c, strict=True)], 1) @ torch.cat(A[0], 0).double()
        ).norm()

    contenders = [
        Contender("lowrank_norm", lambda: kernels.lowrank_norm(B, A, [c])[0], "ours", 1e-12),
        Contender("dense float64 norm", dense, "torch", 1e-12),
    ]
    R = lora.total_rank
    cost = Cost(2 * (lora.m + lora.n) * R * R, lora.bytes, lora.bytes, "float64")
    return Case(str(lora), contenders, lambda r: relative_error(r, truth), "relative error", cost)


@entry("factor_gram-many-clients", "kernels", gpu=True)
def factor_gram_many_clients(size: Size, device: torch.device) -> Case:
    """One module of the attention of a 7B Llama with 100 clients in bfloat16: bound by arithmetic."""
    lora = replace(TINY, modules=1, clients=6, dtype=torch.bfloat16)
    lora = {"full": W2_MODULE, "quick": replace(W2_MODULE, clients=20), "tiny": lora}[size]
    return _gram_case(
        size,
        lora,
        device,
        lambda B, A: [Contender("cat + float32 mm", partial(operations.cat_gram_float32, B, A), "torch", 1e-5)],
    )
