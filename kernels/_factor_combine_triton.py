"""Triton kernel of ``factor_combine``: ``X C`` over columns that lie anywhere in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._factor_combine_plan import BLOCK_C, CombinePlan, Variant, is_narrow
from ._plan import WIDEST
from ._triton_common import (
    TYPES,
    AotConfig,
    column_tile,
    float32_precision,
    generation,
    interpret_flag,
    options,
    product,
    rounded,
    trips,
)

FLUSH = 4  # steps of BLOCK_C columns that one float32 chain of the tensor cores sums


@triton.jit
def coefficient_tile(
    p_c, client, position, c, j, n_columns, rank, transposed, SCALARS: tl.constexpr,
):  # fmt: skip
    """Coefficients (c, j) of the stacked columns ``c``, zero beyond the last one; C or its transpose is row-major."""
    m = (c < n_columns)[:, None] & (j < rank)[None, :]
    if SCALARS:
        b = tl.load(p_c + client, mask=c < n_columns, other=0.0)
        b = tl.where((position[:, None] == j[None, :]) & m, b[:, None], 0.0)
    else:
        stride_c = tl.where(transposed != 0, 1, rank)
        stride_j = tl.where(transposed != 0, n_columns, 1)
        b = tl.load(p_c + c[:, None] * stride_c + j[None, :] * stride_j, mask=m, other=0.0)
    return b


@triton.jit
def weigh(b_c, b_x, acc, LEFT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``acc + b_c @ b_x``, or without LEFT ``acc + b_x @ b_c``.

    ``bf16x3``: the coefficients as the sum of three bf16 numbers, exact to 2^-25, so that the native product serves.
    """
    TERMS: tl.constexpr = 3 if PRECISION == "bf16x3" else 1
    KIND: tl.constexpr = "native" if PRECISION == "bf16x3" else PRECISION
    if PRECISION == "bf16x3":
        b_c = b_c.to(tl.float32)
    for _ in tl.static_range(TERMS):
        b_term = b_c.to(b_x.dtype) if PRECISION == "bf16x3" else b_c
        if LEFT:
            acc = product(b_term, b_x, acc, KIND, INTERPRET)
        else:
            acc = product(b_x, b_term, acc, KIND, INTERPRET)
        if PRECISION == "bf16x3":
            b_c -= b_term.to(tl.float32)
    return acc


@triton.jit
def combine(
    p_table, p_strides, p_clients, p_positions, p_c, first, n_columns, k, length, j, rank, transposed,
    TYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
    BLOCK_C: tl.constexpr, FLUSH: tl.constexpr, SCALARS: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """The tile (TILE_K, TILE_R) of the output, or with WIDE its transpose."""
    SUM: tl.constexpr = tl.float64 if PRECISION == "fp64" else tl.float32
    SHAPE: tl.constexpr = (TILE_R, TILE_K) if WIDE else (TILE_K, TILE_R)
    total = tl.zeros(SHAPE, SUM)
    acc = tl.zeros(SHAPE, SUM)
    for s in range(trips(tl.cdiv(n_columns, BLOCK_C), INTERPRET)):
        c = s * BLOCK_C + tl.arange(0, BLOCK_C)
        p = tl.load(p_table + first + c).to(tl.pointer_type(TYPE))
        strides = tl.load(p_strides + first + c)
        client = tl.load(p_clients + first + c)
        position = tl.load(p_positions + first + c)
        b_x = column_tile(p, strides, k, length, TYPE, WIDE, VECTOR, True)
        b_c = coefficient_tile(p_c, client, position, c, j, n_columns, rank, transposed, SCALARS)
        if WIDE:
            acc = weigh(tl.trans(b_c), b_x, acc, True, PRECISION, INTERPRET)
        else:
            acc = weigh(b_c, b_x, acc, False, PRECISION, INTERPRET)
        if FLUSH > 0:  # noqa: SIM102 - FLUSH is a constant: tensor cores truncate, so they get short chains only
            if (s + 1) % FLUSH == 0:
                total += acc
                acc = tl.zeros(SHAPE, SUM)
    return total + acc


@triton.jit
def factor_combine_kernel(
    p_table,  # int64 (columns,): addresses of the stacked columns
    p_strides,  # int32 (columns,): elements from row to row
    p_clients,  # int32 (columns,): client of the column
    p_positions,  # int32 (columns,): column of its client
    p_coefficients,  # int64 (modules,): addresses of the modules' float64 coefficients
    p_work,  # int64 (programs, 10): see CombinePlan
    p_out,  # flat outputs
    TYPE: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
    BLOCK_C: tl.constexpr, FLUSH: tl.constexpr, SCALARS: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one module's output."""
    p_row = p_work + tl.program_id(0) * 10
    wide = tl.load(p_row)
    transposed = tl.load(p_row + 1)
    first = tl.multiple_of(tl.load(p_row + 2), BLOCK_C)
    n_columns = tl.load(p_row + 3)
    k = tl.multiple_of(tl.load(p_row + 4), TILE_K) + tl.arange(0, TILE_K)
    length = tl.load(p_row + 5)
    j = tl.load(p_row + 6) + tl.arange(0, TILE_R)
    rank = tl.load(p_row + 7)
    p = p_out + tl.multiple_of(tl.load(p_row + 8), 16)
    p_c = tl.load(p_coefficients + tl.load(p_row + 9)).to(tl.pointer_type(tl.float64))
    if wide != 0:
        length = tl.multiple_of(length, WIDE)
        b_wide = combine(
            p_table, p_strides, p_clients, p_positions, p_c, first, n_columns, k, length, j, rank, transposed,
            TYPE, True, WIDE, TILE_K, TILE_R, BLOCK_C, FLUSH, SCALARS, PRECISION, INTERPRET,
        )  # fmt: skip
        m_wide = (j < rank)[:, None] & (k < length)[None, :]
        tl.store(p + j[:, None] * length + k[None, :], rounded(b_wide, p_out.dtype.element_ty, INTERPRET), mask=m_wide)
    else:
        b = combine(
            p_table, p_strides, p_clients, p_positions, p_c, first, n_columns, k, length, j, rank, transposed,
            TYPE, False, TALL, TILE_K, TILE_R, BLOCK_C, FLUSH, SCALARS, PRECISION, INTERPRET,
        )  # fmt: skip
        m = (k < length)[:, None] & (j < rank)[None, :]
        tl.store(p + k[:, None] * rank + j[None, :], rounded(b, p_out.dtype.element_ty, INTERPRET), mask=m)


def configuration(v: Variant, generation: str) -> tuple[dict[str, Any], int, int]:
    """Compile-time arguments, warps and stages of a variant: the fastest on an H100 of those that spill nowhere.

    Coefficients are read and taken apart by every program: many rows make up for that. Outputs of 16 bits are rounded
    by far more than what a long chain of the tensor cores loses, and need no second sum.
    """
    arguments = {
        "TYPE": TYPES[v.dtype], "TALL": v.tall, "WIDE": v.wide, "TILE_K": v.tile_k, "TILE_R": v.tile_r,
        "BLOCK_C": BLOCK_C, "FLUSH": FLUSH if v.out_dtype.itemsize > 2 else 0, "SCALARS": v.scalars,
        "PRECISION": v.precision,
    }  # fmt: skip
    fewer = arguments | {"BLOCK_C": BLOCK_C // 2}
    vector = min(v.tall, v.wide)
    narrow, half = is_narrow(vector, v.dtype), vector * v.dtype.itemsize == 8  # bytes of a load
    if v.precision == "fp64":
        return _doubles(v, generation, narrow, arguments, fewer)
    if v.precision == "bf16x3":
        return _three_terms(v, generation, narrow, half, arguments, fewer)
    # scalars of 32 columns spill in fewer warps on sm90 and sm100, of 16 where half-wide loads are widened
    widened = half and v.scalars and v.dtype.itemsize < v.out_dtype.itemsize and generation in ("sm90", "sm100")
    few = 4 if widened else 2
    warps = 8 if narrow or (v.scalars and v.tile_r == 32) else few if v.tile_r == 16 else 4
    # with Triton 3.9 a third stage of narrow float32 scalars does, and on sm100 more columns of narrow loads
    tall = narrow and v.scalars and v.tile_r == 16 and v.dtype == torch.float32
    crowded = narrow and generation == "sm100" and (v.tile_r == 32 or (v.scalars and v.dtype == torch.float16))
    return fewer if crowded else arguments, warps, 2 if tall else 3


def _doubles(
    v: Variant, generation: str, narrow: bool, arguments: dict[str, Any], fewer: dict[str, Any]
) -> tuple[dict[str, Any], int, int]:
    """The same of float64 products, which spill on sm100 (Triton 3.6): with more columns of numbers to widen or of
    scalars, with a third stage of them, and narrow float32 with a second; scalars of 16 in fewer warps (3.9)."""
    new = generation == "sm100"
    if v.dtype == torch.float64 and new and v.scalars:
        return fewer, 16 if v.tile_r == 16 and v.out_dtype.itemsize > 2 else 8, 2
    if v.dtype == torch.float64:
        return arguments, 8, 3
    return fewer, 8, 3 if new and narrow and v.tile_r == 32 and v.dtype == torch.float32 else 2


def _three_terms(
    v: Variant, generation: str, narrow: bool, half: bool, arguments: dict[str, Any], fewer: dict[str, Any]
) -> tuple[dict[str, Any], int, int]:
    """The same of bf16, which spills (Triton 3.6) in fewer warps on sm80 or where loads are narrow or half as wide,
    with more columns of half-wide loads on sm80, and a third stage of the largest tiles on sm80 or sm100."""
    old = generation == "sm80"
    if v.tile_r == 64:
        return fewer if old and half else arguments, 8 if narrow or old or (half and v.scalars) else 4, 2
    crowded = (old and (half or v.out_dtype.itemsize > 2)) or (generation == "sm100" and narrow)
    warps = 8 if v.tile_r == 32 and crowded else 4
    return arguments, warps, 2 if v.tile_k == 256 and generation != "sm90" else 3


def factor_combine_triton(
    plan: CombinePlan, pointers: np.ndarray, coefficients: np.ndarray
) -> dict[torch.dtype, Tensor]:
    """Run a plan on factors at ``pointers`` and coefficients at ``coefficients``; returns flat buffers by type."""
    table, p_c = plan.addresses.of(pointers), plan.coefficients.of(coefficients)
    buffers = {t: torch.empty(n, dtype=t, device=table.device) for t, n in plan.sizes.items()}
    for variant, work in plan.launches:
        arguments, warps, stages = configuration(variant, generation(table.device))
        factor_combine_kernel[(len(work),)](
            table, plan.strides, plan.clients, plan.positions, p_c, work, buffers[variant.out_dtype],
            **arguments, INTERPRET=interpret_flag(), **options(warps, stages),
        )  # fmt: skip
    return buffers


def aot_configs(generation: str) -> list[AotConfig]:
    """The shipped configurations."""
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    x3, b3 = float32_precision(), "bf16x3"
    variants = {
        "bf16 rank 16 blocks": Variant(256, 16, False, bf16, bf16, b3, 8, 8),
        "bf16 rank 16 scalars": Variant(256, 16, True, bf16, bf16, b3, 8, 8),
        "bf16 rank 16 blocks into fp32": Variant(128, 16, False, bf16, fp32, b3, 8, 8),
        "bf16 rank 32 blocks": Variant(128, 32, False, bf16, bf16, b3, 8, 8),
        "bf16 rank 64 blocks": Variant(64, 64, False, bf16, bf16, b3, 8, 8),
        "bf16 rank 16 blocks scalar loads": Variant(128, 16, False, bf16, bf16, b3, 1, 1),
        "bf16 rank 64 blocks scalar loads": Variant(64, 64, False, bf16, bf16, b3, 1, 1),
        "fp32 rank 32 scalar loads": Variant(64, 32, True, fp32, fp32, x3, 1, 1),
        "fp32 rank 16 blocks": Variant(64, 16, False, fp32, fp32, x3, 4, 4),
        "fp32 rank 32 blocks": Variant(64, 32, False, fp32, fp32, x3, 4, 4),
        "fp32 rank 16 scalars": Variant(64, 16, True, fp32, fp32, x3, 4, 4),
        "fp32 rank 32 scalars": Variant(64, 32, True, fp32, fp32, x3, 4, 4),
        "fp16 rank 32 scalars into fp32": Variant(64, 32, True, fp16, fp32, x3, 8, 8),
        "fp32 rank 16 scalars scalar loads": Variant(128, 16, True, fp32, fp32, x3, 1, 1),
        "fp16 rank 32 blocks": Variant(64, 32, False, fp16, fp16, x3, 8, 8),
        "fp16 rank 16 blocks": Variant(64, 16, False, fp16, fp16, x3, 8, 8),
        "bf16 rank 16 blocks into fp64": Variant(128, 16, False, bf16, fp64, "fp64", 8, 8),
        "bf16 rank 32 blocks into fp64": Variant(64, 32, False, bf16, fp64, "fp64", 8, 8),
        "fp16 rank 16 blocks into fp64": Variant(128, 16, False, fp16, fp64, "fp64", 8, 8),
        "bf16 rank 16 scalars into fp64 scalar loads": Variant(128, 16, True, bf16, fp64, "fp64", 1, 1),
        "fp32 rank 16 blocks into fp64": Variant(128, 16, False, fp32, fp64, "fp64", 4, 4),
        "fp64 rank 32 blocks": Variant(64, 32, False, fp64, fp64, "fp64", 2, 2),
        "fp64 rank 16 blocks": Variant(128, 16, False, fp64, fp64, "fp64", 2, 2),
        "bf16 rank 32 scalars into fp32": Variant(128, 32, True, bf16, fp32, b3, 8, 8),
        "bf16 rank 32 blocks half-wide loads into fp32": Variant(128, 32, False, bf16, fp32, b3, 4, 4),
        "bf16 rank 32 blocks scalar loads": Variant(64, 32, False, bf16, bf16, b3, 1, 1),
        "bf16 rank 64 blocks half-wide loads": Variant(64, 64, False, bf16, bf16, b3, 4, 4),
        "bf16 rank 64 scalars half-wide loads into fp32": Variant(64, 64, True, bf16, fp32, b3, 4, 4),
        "fp16 rank 16 scalars half-wide loads into fp32": Variant(64, 16, True, fp16, fp32, x3, 4, 4),
        "fp16 rank 16 scalars scalar loads into fp32": Variant(128, 16, True, fp16, fp32, x3, 1, 1),
        "fp16 rank 32 blocks scalar and wide loads": Variant(64, 32, False, fp16, fp16, x3, 1, 8),
        "fp32 rank 32 blocks scalar loads into fp64": Variant(64, 32, False, fp32, fp64, "fp64", 1, 1),
        "fp64 rank 16 scalars": Variant(128, 16, True, fp64, fp64, "fp64", 2, 2),
        "fp64 rank 32 scalars": Variant(64, 32, True, fp64, fp64, "fp64", 2, 2),
        "fp64 rank 16 scalars into bf16": Variant(128, 16, True, fp64, bf16, "fp64", 2, 2),
    }
    signature = {
        "p_table": "*i64", "p_strides": "*i32", "p_clients": "*i32", "p_positions": "*i32", "p_coefficients": "*i64",
        "p_work": "*i64",
    }  # fmt: skip
    types = {bf16: "*bf16", fp16: "*fp16", fp32: "*fp32", fp64: "*fp64"}
    configs = []
    for name, v in variants.items():
        arguments, warps, stages = configuration(v, generation)
        fills = v.tile_k * arguments["BLOCK_C"] >= 32 * warps * v.tall  # a vector for every thread
        signature = {**signature, "p_out": types[v.out_dtype]}
        config = AotConfig(
            f"factor_combine {name}", factor_combine_kernel, signature, arguments, warps, stages,
            tensor_cores=v.precision != "fp64", wide_loads=v.tall * v.dtype.itemsize == WIDEST and fills,
        )  # fmt: skip
        configs.append(config)
    return configs
