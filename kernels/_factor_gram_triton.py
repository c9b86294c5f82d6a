"""Triton kernels of ``factor_gram`` and ``factor_cross``: ``X_i^T X_j`` over columns that lie anywhere in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._factor_gram_plan import GramPlan, Variant, is_narrow
from ._triton_common import (
    TYPES,
    AotConfig,
    column_tile,
    float32_precision,
    generation,
    interpret_flag,
    options,
    product,
    trips,
)

REDUCE_ROWS = 16


@triton.jit
def step(
    p_i, s_i, p_j, s_j, k, k1, acc,
    TYPE_I: tl.constexpr, TYPE_J: tl.constexpr, WIDE: tl.constexpr, VECTOR_I: tl.constexpr, VECTOR_J: tl.constexpr,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products of rows ``k``."""
    b_i = column_tile(p_i, s_i, k, k1, TYPE_I, WIDE, VECTOR_I, MASK)
    b_j = b_i if DIAGONAL else column_tile(p_j, s_j, k, k1, TYPE_J, WIDE, VECTOR_J, MASK)
    if WIDE:
        acc = product(b_i, tl.trans(b_j), acc, PRECISION, INTERPRET)
    else:
        acc = product(tl.trans(b_i), b_j, acc, PRECISION, INTERPRET)
    return acc


@triton.jit
def contract(
    p_table, p_strides, i, j, k0, k1,
    TILE_I: tl.constexpr, TILE_J: tl.constexpr, TYPE_I: tl.constexpr, TYPE_J: tl.constexpr, WIDE: tl.constexpr,
    VECTOR_I: tl.constexpr, VECTOR_J: tl.constexpr, BLOCK_K: tl.constexpr, FLUSH: tl.constexpr, DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The tile (TILE_I, TILE_J) of rows ``k0:k1``: whole blocks without masks, then the tail."""
    SUM: tl.constexpr = tl.float64 if PRECISION == "fp64" else tl.float32
    c_i = i + tl.arange(0, TILE_I)
    c_j = j + tl.arange(0, TILE_J)
    p_i = tl.load(p_table + c_i).to(tl.pointer_type(TYPE_I))
    p_j = tl.load(p_table + c_j).to(tl.pointer_type(TYPE_J))
    s_i = tl.load(p_strides + c_i)
    s_j = tl.load(p_strides + c_j)
    if WIDE:
        k1 = tl.multiple_of(k1, VECTOR_I if VECTOR_I < VECTOR_J else VECTOR_J)
    total = tl.zeros((TILE_I, TILE_J), SUM)
    acc = tl.zeros((TILE_I, TILE_J), SUM)
    n_blocks = (k1 - k0) // BLOCK_K
    for s in range(trips(n_blocks, INTERPRET)):
        k = k0 + s * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = step(
            p_i, s_i, p_j, s_j, k, k1, acc,
            TYPE_I, TYPE_J, WIDE, VECTOR_I, VECTOR_J, DIAGONAL, PRECISION, INTERPRET, False,
        )  # fmt: skip
        if FLUSH > 0:  # noqa: SIM102 (the outer one is decided when compiling)
            if (s + 1) % FLUSH == 0:  # tensor cores truncate: only short chains are left to them
                total += acc
                acc = tl.zeros((TILE_I, TILE_J), SUM)
    if k0 + n_blocks * BLOCK_K < k1:
        k = k0 + n_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = step(
            p_i, s_i, p_j, s_j, k, k1, acc,
            TYPE_I, TYPE_J, WIDE, VECTOR_I, VECTOR_J, DIAGONAL, PRECISION, INTERPRET, True,
        )  # fmt: skip
    return total + acc


@triton.jit
def factor_gram_kernel(
    p_table,  # int64 (columns,): addresses of the stacked columns
    p_strides,  # int32 (columns,): elements from row to row
    p_work,  # int32 (programs, 8): wide, column i, column j, k0, k1, slot, rows, columns
    p_partials,  # float32 or float64: slots of (TILE_I, TILE_J)
    TILE_I: tl.constexpr, TILE_J: tl.constexpr, TYPE_I: tl.constexpr, TYPE_J: tl.constexpr,
    TALL_I: tl.constexpr, TALL_J: tl.constexpr, WIDE_I: tl.constexpr, WIDE_J: tl.constexpr,
    BLOCK_K: tl.constexpr, FLUSH: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of one product over one range of rows, into its own slot."""
    p_row = p_work + tl.program_id(0) * 8
    i = tl.multiple_of(tl.load(p_row + 1), 16)
    j = tl.multiple_of(tl.load(p_row + 2), 16)
    k0 = tl.multiple_of(tl.load(p_row + 3), 16)
    k1 = tl.load(p_row + 4)
    if tl.load(p_row) != 0:
        b = contract(
            p_table, p_strides, i, j, k0, k1, TILE_I, TILE_J, TYPE_I, TYPE_J, True, WIDE_I, WIDE_J,
            BLOCK_K, FLUSH, DIAGONAL, PRECISION, INTERPRET,
        )  # fmt: skip
    else:
        b = contract(
            p_table, p_strides, i, j, k0, k1, TILE_I, TILE_J, TYPE_I, TYPE_J, False, TALL_I, TALL_J,
            BLOCK_K, FLUSH, DIAGONAL, PRECISION, INTERPRET,
        )  # fmt: skip
    r = tl.arange(0, TILE_I)
    c = tl.arange(0, TILE_J)
    m = (r[:, None] < tl.load(p_row + 6)) & (c[None, :] < tl.load(p_row + 7))
    if DIAGONAL:
        m = m & (r[:, None] <= c[None, :])
    slot = tl.load(p_row + 5).to(tl.int64)
    tl.store(p_partials + slot + r[:, None] * TILE_J + c[None, :], b, mask=m)


@triton.jit
def gram_reduce_kernel(
    p_partials,  # as above
    p_tiles,  # int64 (tiles, 8): slot, slots, out, rows, columns, row, column, 0
    p_out,  # float64: row-major matrices
    TILE_I: tl.constexpr, TILE_J: tl.constexpr, ROWS: tl.constexpr, SYMMETRIC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sum a tile over its slots in float64, in their order, and mirror a symmetric one."""
    p_row = p_tiles + tl.program_id(0) * 8
    slot = tl.multiple_of(tl.load(p_row), 16)
    n_slots = tl.load(p_row + 1)
    p_matrix = p_out + tl.load(p_row + 2)
    n_rows = tl.load(p_row + 3)
    n_columns = tl.load(p_row + 4)
    row0 = tl.load(p_row + 5)
    column0 = tl.load(p_row + 6)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, TILE_J)
    # read more than was written there, whole groups of four, so that loads stay wide; the store keeps what is real
    m_read = (r < n_rows - row0)[:, None] & (c < (n_columns - column0 + 3) // 4 * 4)[None, :]
    p = p_partials + slot + r[:, None] * TILE_J + c[None, :]
    b = tl.zeros((ROWS, TILE_J), tl.float64)
    for s in range(trips(n_slots, INTERPRET)):
        part = tl.load(p + s * (TILE_I * TILE_J), mask=m_read, other=0.0)
        if INTERPRET:  # NumPy warns when it widens what was never written
            written = (r < n_rows - row0)[:, None] & (c < n_columns - column0)[None, :]
            if SYMMETRIC:
                written = written & ((row0 + r)[:, None] <= (column0 + c)[None, :])
            part = tl.where(written, part, 0.0)
        b += part.to(tl.float64)
    row = (row0 + r)[:, None]
    column = (column0 + c)[None, :]
    m = (row < n_rows) & (column < n_columns)
    if SYMMETRIC:
        m = m & (row <= column)
    tl.store(p_matrix + row * n_columns + column, b, mask=m)
    if SYMMETRIC:
        tl.store(p_matrix + column * n_columns + row, b, mask=m)


def configuration(v: Variant, generation: str) -> tuple[dict[str, Any], int, int]:
    """Compile-time arguments, warps and stages of a variant: few warps, since barriers cost more than longer loops."""
    largest, area = max(v.tile_i, v.tile_j), v.tile_i * v.tile_j
    narrow = any(is_narrow(min(x), t) for *x, t in zip(v.tall, v.wide, (v.dtype_i, v.dtype_j), strict=True))
    block_k = {"native": 32 if narrow else 64, "fp64": 32 if largest == 16 else 16}.get(v.precision, 32)
    chain = {"native": 256, "fp64": 0}.get(v.precision, 128)
    arguments = {
        "TILE_I": v.tile_i, "TILE_J": v.tile_j, "TYPE_I": TYPES[v.dtype_i], "TYPE_J": TYPES[v.dtype_j],
        "TALL_I": v.tall[0], "TALL_J": v.tall[1], "WIDE_I": v.wide[0], "WIDE_J": v.wide[1],
        "BLOCK_K": block_k, "FLUSH": chain // block_k, "DIAGONAL": v.diagonal, "PRECISION": v.precision,
    }  # fmt: skip
    doubles = v.precision == "fp64"
    widening = doubles and min(v.dtype_i.itemsize, v.dtype_j.itemsize) == 2
    # registers are short where no tensor cores take float64
    crowded = generation not in ("sm80", "sm90") and (widening or (doubles and v.dtype_i != v.dtype_j))
    if area > 64 * 64:
        # eight warps of so many registers have a processor to themselves: a fourth stage costs nothing
        return arguments, 8, 4 if generation == "sm90" and not narrow else 3
    if narrow or largest > 32 or (largest == 32 and doubles):
        warps = 4
        if crowded and area > 32 * 64:
            warps = 8
        elif widening and area > 32 * 64 and generation == "sm90" and not narrow:
            warps = 2  # faster with tensor cores for float64
        elif doubles and narrow and v.diagonal and largest == 16 and generation == "sm90":
            warps = 1  # more spill, four with Triton 3.6 and two with 3.9
    elif largest == 16:  # one warp spills: of numbers to widen on sm100, of float32 on sm90 (Triton 3.6)
        # but two of float64 itself do (Triton 3.9)
        converted = doubles and v.dtype_i != torch.float64
        warps = 2 if (converted and v.diagonal) or (crowded and generation == "sm100") else 1
    else:
        warps = 2
    return arguments, warps, 3


def factor_gram_triton(plan: GramPlan, pointers: np.ndarray) -> Tensor:
    """Run a plan on tensors at ``pointers``; returns all its matrices in one flat float64 tensor."""
    table = plan.addresses.of(pointers)
    out = torch.empty(plan.numel, dtype=torch.float64, device=table.device)
    flag = interpret_flag()
    for batch in plan.batches:
        sums = torch.float64 if batch.wide_sums else torch.float32
        partials = torch.empty(batch.elements, dtype=sums, device=table.device)
        for variant, work in batch.launches:
            arguments, warps, stages = configuration(variant, generation(table.device))
            factor_gram_kernel[(len(work),)](
                table, plan.strides, work, partials, **arguments, INTERPRET=flag, **options(warps, stages)
            )
        for r in batch.reductions:
            gram_reduce_kernel[(len(r.tiles), r.tile_i // REDUCE_ROWS)](
                partials, r.tiles, out, TILE_I=r.tile_i, TILE_J=r.tile_j, ROWS=REDUCE_ROWS, SYMMETRIC=r.symmetric,
                INTERPRET=flag, **options(4, 2),
            )  # fmt: skip
    return out


def aot_configs(generation: str) -> list[AotConfig]:
    """The shipped configurations of both kernels."""
    bf16, fp32, fp64, x3 = torch.bfloat16, torch.float32, torch.float64, float32_precision()
    variants = {
        "bf16 tile 128 off": Variant(128, 128, False, bf16, bf16, "native", (8, 8), (8, 8)),
        "bf16 tile 64 off scalar loads": Variant(64, 64, False, bf16, bf16, "native", (1, 1), (1, 1)),
        "bf16 tile 128 off half-wide loads": Variant(128, 128, False, bf16, bf16, "native", (4, 4), (8, 8)),
        "fp32 tile 64 off scalar loads": Variant(64, 64, False, fp32, fp32, x3, (1, 1), (1, 1)),
        "bf16 tile 32 off": Variant(32, 32, False, bf16, bf16, "native", (8, 8), (8, 8)),
        "bf16 tile 32": Variant(32, 32, True, bf16, bf16, "native", (8, 8), (8, 8)),
        "bf16 tile 16": Variant(16, 16, True, bf16, bf16, "native", (8, 8), (8, 8)),
        "bf16 tile 128 x 16": Variant(128, 16, False, bf16, bf16, "native", (8, 8), (8, 8)),
        "bf16 tile 64 x fp32 16": Variant(64, 16, False, bf16, fp32, x3, (8, 4), (8, 4)),
        "fp32 tile 64": Variant(64, 64, True, fp32, fp32, x3, (4, 4), (4, 4)),
        "fp32 tile 64 off": Variant(64, 64, False, fp32, fp32, x3, (4, 4), (4, 4)),
        "fp32 tile 32": Variant(32, 32, True, fp32, fp32, x3, (4, 4), (4, 4)),
        "fp32 tile 16": Variant(16, 16, True, fp32, fp32, x3, (4, 4), (4, 4)),
        "bf16 tile 16 precise": Variant(16, 16, True, bf16, bf16, "fp64", (8, 8), (8, 8)),
        "bf16 tile 16 scalar loads precise": Variant(16, 16, True, bf16, bf16, "fp64", (1, 1), (1, 1)),
        "bf16 tile 16 off precise": Variant(16, 16, False, bf16, bf16, "fp64", (8, 8), (8, 8)),
        "bf16 tile 32 off precise": Variant(32, 32, False, bf16, bf16, "fp64", (8, 8), (8, 8)),
        "bf16 tile 64 off precise": Variant(64, 64, False, bf16, bf16, "fp64", (8, 8), (8, 8)),
        "bf16 tile 64 off scalar loads precise": Variant(64, 64, False, bf16, bf16, "fp64", (1, 1), (1, 1)),
        "bf16 tile 64 x 16 precise": Variant(64, 16, False, bf16, bf16, "fp64", (8, 8), (8, 8)),
        "bf16 tile 64 x fp64 16": Variant(64, 16, False, bf16, fp64, "fp64", (8, 2), (8, 2)),
        "fp32 tile 16 precise": Variant(16, 16, True, fp32, fp32, "fp64", (4, 4), (4, 4)),
        "fp32 tile 16 scalar loads precise": Variant(16, 16, True, fp32, fp32, "fp64", (1, 1), (1, 1)),
        "fp32 tile 16 off precise": Variant(16, 16, False, fp32, fp32, "fp64", (4, 4), (4, 4)),
        "fp32 tile 32 off precise": Variant(32, 32, False, fp32, fp32, "fp64", (4, 4), (4, 4)),
        "fp32 tile 64 off precise": Variant(64, 64, False, fp32, fp32, "fp64", (4, 4), (4, 4)),
        "fp32 tile 32 x 16 precise": Variant(32, 16, False, fp32, fp32, "fp64", (4, 4), (4, 4)),
        "fp64 tile 16": Variant(16, 16, True, fp64, fp64, "fp64", (2, 2), (2, 2)),
        "fp64 tile 64 off": Variant(64, 64, False, fp64, fp64, "fp64", (2, 2), (2, 2)),
        "bf16 tile 16 x fp64 16": Variant(16, 16, False, bf16, fp64, "fp64", (8, 2), (8, 2)),
        "fp64 tile 16 x bf16 16": Variant(16, 16, False, fp64, bf16, "fp64", (2, 8), (2, 8)),
        "fp64 tile 16 x fp32 16": Variant(16, 16, False, fp64, fp32, "fp64", (2, 4), (2, 4)),
        "fp64 tile 64 x fp32 64": Variant(64, 64, False, fp64, fp32, "fp64", (2, 4), (2, 4)),
    }
    pointers = {"p_table": "*i64", "p_strides": "*i32", "p_work": "*i32"}
    configs = []
    for name, v in variants.items():
        arguments, warps, stages = configuration(v, generation)
        signature = {**pointers, "p_partials": "*fp64" if v.precision == "fp64" else "*fp32"}
        fills = v.tile_i * arguments["BLOCK_K"] >= 32 * warps * v.tall[0]  # a vector for every thread
        config = AotConfig(
            f"factor_gram {name}", factor_gram_kernel, signature, arguments, warps, stages,
            tensor_cores=v.precision != "fp64", wide_loads=max(v.tall) > 1 and fills,
        )  # fmt: skip
        configs.append(config)
    for tile, symmetric in ((128, True), (64, False)):
        arguments = {"TILE_I": tile, "TILE_J": tile, "ROWS": REDUCE_ROWS, "SYMMETRIC": symmetric}
        signature = {"p_partials": "*fp32", "p_tiles": "*i64", "p_out": "*fp64"}
        name = f"gram_reduce tile {tile}{' symmetric' if symmetric else ''}"
        configs.append(AotConfig(name, gram_reduce_kernel, signature, arguments, 4, 2, tensor_cores=False))
    return configs
