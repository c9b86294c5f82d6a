"""Triton kernels of ``ghost_gram``: tiles of ``(a a^T) * (d d^T)``, each summed over its pairs of tasks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._plan import WIDEST
from ._triton_common import TYPES, AotConfig, product, trips
from ._triton_split import split_tf32

SUM_SLOTS = 512  # tiles of one pair of tasks that are summed at a time


class Choice(NamedTuple):
    """What a launch may do otherwise, within the same error."""

    tile: int = 64  # rows of one side
    warps: int | None = None  # others than those of ``warps_and_stages``


CHOICE = Choice()
# small tiles make more programs of few rows; with fewer warps those of 16-bit types spill
TRIALS = {
    torch.float32: {"tile 32, 2 warps": Choice(32, 2), "tile 32, 4 warps": Choice(32, 4)},
    torch.bfloat16: {"tile 32, 4 warps": Choice(32, 4)},
}


@triton.jit
def row_products(
    p_rows, stride, width, i, n_i, j, n_j,
    TILE: tl.constexpr, BLOCK: tl.constexpr, FLUSH: tl.constexpr, TYPE: tl.constexpr, VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Inner products of rows i.. and j.., (TILE, TILE): short chains of products, summed in the products' type."""
    SUM: tl.constexpr = tl.float64 if PRECISION == "fp64" else tl.float32
    BYTES: tl.constexpr = VECTOR * (TYPE.primitive_bitwidth // 8)
    r = tl.arange(0, TILE)
    p_i = p_rows.to(tl.pointer_type(TYPE)) + (i + r) * stride
    p_j = p_rows.to(tl.pointer_type(TYPE)) + (j + r) * stride
    m_i = (r < n_i)[:, None]
    m_j = (r < n_j)[:, None]
    total = tl.zeros((TILE, TILE), SUM)
    acc = tl.zeros((TILE, TILE), SUM)
    n_blocks = width // BLOCK
    for s in range(trips(n_blocks, INTERPRET)):
        d = s * BLOCK + tl.arange(0, BLOCK)
        p = tl.max_contiguous(tl.multiple_of(p_i[:, None] + d[None, :], (1, BYTES)), (1, VECTOR))
        q = tl.max_contiguous(tl.multiple_of(p_j[:, None] + d[None, :], (1, BYTES)), (1, VECTOR))
        x = tl.load(p, mask=m_i, other=0.0)
        y = tl.load(q, mask=m_j, other=0.0)
        acc = product(x, tl.trans(y), acc, PRECISION, INTERPRET)
        if FLUSH > 0:  # noqa: SIM102 - FLUSH is a constant: tensor cores truncate, so they get short chains only
            if (s + 1) % FLUSH == 0:
                total += acc
                acc = tl.zeros((TILE, TILE), SUM)
    if n_blocks * BLOCK < width:
        d = n_blocks * BLOCK + tl.arange(0, BLOCK)
        m = (d < width)[None, :]
        x = tl.load(p_i[:, None] + d[None, :], mask=m_i & m, other=0.0)
        y = tl.load(p_j[:, None] + d[None, :], mask=m_j & m, other=0.0)
        acc = product(x, tl.trans(y), acc, PRECISION, INTERPRET)
    return total + acc


@triton.jit
def selected(x, y, SECOND: tl.constexpr, SUMMING: tl.constexpr, INTERPRET: tl.constexpr):
    """``x @ y`` where one is made of zeros and ones: tf32 holds it, so only the other (SECOND or first) is split."""
    acc = tl.zeros((x.shape[0], y.shape[1]), x.dtype)
    if SUMMING == "tf32x3":
        if SECOND:
            high, low = split_tf32(y)
            acc = product(x, low, acc, "tf32", INTERPRET)
            acc = product(x, high, acc, "tf32", INTERPRET)
        else:
            high, low = split_tf32(x)
            acc = product(low, y, acc, "tf32", INTERPRET)
            acc = product(high, y, acc, "tf32", INTERPRET)
    else:
        acc = product(x, y, acc, SUMMING, INTERPRET)
    return acc


@triton.jit
def ghost_gram_kernel(
    p_inputs,  # (N, p) rows, or int64 (N,) token numbers
    p_grads,  # (N, q) rows
    p_tasks,  # int32 (N,): the task of each row
    p_work,  # int64 (programs, 10): row i, rows, row j, rows, first task i, tasks, first task j, tasks, slot, weight
    p_partials,  # float64: slots of (tasks i, tasks j)
    input_stride, input_width, grad_stride, grad_width,
    TILE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_G: tl.constexpr, FLUSH_I: tl.constexpr, FLUSH_G: tl.constexpr,
    TYPE_I: tl.constexpr, TYPE_G: tl.constexpr, VECTOR_I: tl.constexpr, VECTOR_G: tl.constexpr,
    PRECISION_I: tl.constexpr, PRECISION_G: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
    SEVERAL: tl.constexpr, SUMMING: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of rows by rows. Without SEVERAL it lies within one pair of tasks and is one number."""
    p_row = p_work + tl.program_id(0).to(tl.int64) * 10
    i = tl.load(p_row)
    n_i = tl.load(p_row + 1)
    j = tl.load(p_row + 2)
    n_j = tl.load(p_row + 3)
    r = tl.arange(0, TILE)
    b = row_products(
        p_grads, grad_stride, grad_width, i, n_i, j, n_j,
        TILE, BLOCK_G, FLUSH_G, TYPE_G, VECTOR_G, PRECISION_G, INTERPRET,
    )  # fmt: skip
    if TOKENS:
        t_i = tl.load(p_inputs + i + r, mask=r < n_i, other=-1)
        t_j = tl.load(p_inputs + j + r, mask=r < n_j, other=-1)
        b = tl.where(t_i[:, None] == t_j[None, :], b, 0.0)
    else:
        a = row_products(
            p_inputs, input_stride, input_width, i, n_i, j, n_j,
            TILE, BLOCK_I, FLUSH_I, TYPE_I, VECTOR_I, PRECISION_I, INTERPRET,
        )  # fmt: skip
        if BIAS:
            a += 1
        b *= a
    p_slot = p_partials + tl.load(p_row + 8)
    if SEVERAL:
        k_i = tl.load(p_tasks + i + r, mask=r < n_i, other=-1) - tl.load(p_row + 4).to(tl.int32)
        k_j = tl.load(p_tasks + j + r, mask=r < n_j, other=-1) - tl.load(p_row + 6).to(tl.int32)
        tasks_i = tl.load(p_row + 5)
        tasks_j = tl.load(p_row + 7)
        if SUMMING == "fp64":
            # without float64 tensor cores (sm100) a product over 64 rows does not fit the registers: sum task by task
            for c in range(trips(tasks_j, INTERPRET)):
                column = tl.sum(tl.where((k_j == c)[None, :], b, 0.0), 1)
                sums = tl.sum(tl.where(r[:, None] == k_i[None, :], column[None, :], 0.0), 1)
                tl.store(p_slot + r * tasks_j + c, sums.to(tl.float64), mask=r < tasks_i)
        else:
            m_i = (r[:, None] == k_i[None, :]).to(b.dtype)  # (tasks, rows)
            m_j = (k_j[:, None] == r[None, :]).to(b.dtype)  # (rows, tasks)
            b = selected(m_i, selected(b, m_j, False, SUMMING, INTERPRET), True, SUMMING, INTERPRET)
            m = (r < tasks_i)[:, None] & (r < tasks_j)[None, :]
            tl.store(p_slot + r[:, None] * tasks_j + r[None, :], b.to(tl.float64), mask=m)
    else:
        total = tl.sum(
            tl.reshape(b.to(tl.float64), (TILE * TILE,)), 0
        )  # of both axes in turn breaks Triton 3.6 on sm100
        tl.store(p_slot, total * tl.load(p_row + 9).to(tl.float64))


@triton.jit
def ghost_sum_kernel(
    p_partials,  # as above
    p_cells,  # int64 (cells, 7): slot, tiles, tasks i, tasks j, first task i, first task j, whether i is j
    p_out,  # float64 (K, K)
    K,
    TILE: tl.constexpr, SEVERAL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sum the tiles of one block of the Gram matrix in their order, and mirror it."""
    p_row = p_cells + tl.program_id(0).to(tl.int64) * 7
    p_slot = p_partials + tl.load(p_row)
    tiles = tl.load(p_row + 1)
    i = tl.load(p_row + 4)
    j = tl.load(p_row + 5)
    r = tl.arange(0, TILE)
    if SEVERAL:
        n_i = tl.load(p_row + 2)
        n_j = tl.load(p_row + 3)
        m = (r < n_i)[:, None] & (r < n_j)[None, :]
        b = tl.zeros((TILE, TILE), tl.float64)
        for t in range(trips(tiles, INTERPRET)):
            b += tl.load(p_slot + t * n_i * n_j + r[:, None] * n_j + r[None, :], mask=m, other=0.0)
        if tl.load(p_row + 6) != 0:  # a single tile, with rounding errors of its own in either triangle
            b = (b + tl.load(p_slot + r[None, :] * n_j + r[:, None], mask=m, other=0.0)) / 2
        tl.store(p_out + (i + r)[:, None] * K + (j + r)[None, :], b, mask=m)
        tl.store(p_out + (j + r)[None, :] * K + (i + r)[:, None], b, mask=m)
    else:
        total = tl.zeros((TILE,), tl.float64)
        for t in range(trips((tiles + TILE - 1) // TILE, INTERPRET)):
            total += tl.load(p_slot + t * TILE + r, mask=t * TILE + r < tiles, other=0.0)
        b = tl.sum(total, 0)
        tl.store(p_out + i * K + j, b)
        tl.store(p_out + j * K + i, b)


def products_configuration(suffix: str, dtype: torch.dtype, precision: str, wide: bool) -> dict[str, Any]:
    """Compile-time arguments of one of the two factors: I (inputs) or G (output gradients)."""
    block, chain = {"native": (64, 256), "fp64": (16, 0)}.get(precision, (16, 128))
    return {
        f"BLOCK_{suffix}": block, f"FLUSH_{suffix}": chain // block, f"TYPE_{suffix}": TYPES[dtype],
        f"VECTOR_{suffix}": WIDEST // dtype.itemsize if wide else 1, f"PRECISION_{suffix}": precision,
    }  # fmt: skip


def warps_and_stages(generation: str, summing: str, *, wide: bool) -> tuple[int, int]:
    """Warps, and loads in flight: four warps are faster, and spill where they are not given here."""
    if summing == "fp64":
        return 8, 2
    return 4 if wide and generation != "sm100" else 8, 3


def aot_configs(generation: str) -> list[AotConfig]:
    """The shipped configurations of both kernels."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    shipped = {
        "bf16 within tasks": (bf16, "native", True, False, False),
        "bf16 several tasks": (bf16, "native", True, False, True),
        "fp32 within tasks": (fp32, "tf32x3", True, False, False),
        "fp32 several tasks": (fp32, "tf32x3", True, False, True),
        "fp32 tokens several tasks": (fp32, "tf32x3", True, True, True),
        "fp32 scalar loads": (fp32, "tf32x3", False, False, False),
        "bf16 within tasks precise": (bf16, "fp64", True, False, False),
        "bf16 several tasks precise": (bf16, "fp64", True, False, True),
        "fp32 several tasks precise": (fp32, "fp64", True, False, True),
        "fp64 within tasks": (fp64, "fp64", True, False, False),
    }
    rows = [(name, *how, Choice()) for name, how in shipped.items()]
    tried = ("fp32 within tasks", "fp32 several tasks", "bf16 within tasks", "bf16 several tasks")
    rows += [(f"{n}, {trial}", *shipped[n], c) for n in tried for trial, c in TRIALS[shipped[n][0]].items()]
    names = {bf16: "*bf16", fp32: "*fp32", fp64: "*fp64"}
    strides = {"input_stride": "i32", "input_width": "i32", "grad_stride": "i32", "grad_width": "i32"}
    tables = {"p_tasks": "*i32", "p_work": "*i64", "p_partials": "*fp64"}
    configs = []
    for name, dtype, precision, wide, tokens, several, choice in rows:
        arguments = products_configuration("I", dtype, precision, wide)
        arguments |= products_configuration("G", dtype, precision, wide)
        arguments |= {"TILE": choice.tile, "TOKENS": tokens, "BIAS": not tokens, "SEVERAL": several}
        arguments["SUMMING"] = "fp64" if precision == "fp64" else "tf32x3"
        types = {"p_inputs": "*i64" if tokens else names[dtype], "p_grads": names[dtype]} | tables | strides
        warps, stages = warps_and_stages(generation, arguments["SUMMING"], wide=wide)
        warps = choice.warps or warps
        fills = choice.tile * arguments["BLOCK_G"] >= 32 * warps * arguments["VECTOR_G"]  # a vector for every thread
        config = AotConfig(
            f"ghost_gram {name}", ghost_gram_kernel, types, arguments, warps, stages,
            tensor_cores=precision != "fp64", wide_loads=wide and fills,
        )  # fmt: skip
        configs.append(config)
    sums = {"p_partials": "*fp64", "p_cells": "*i64", "p_out": "*fp64", "K": "i32"}
    for several in (False, True):
        name = f"ghost_sum {'several tasks' if several else 'within tasks'}"
        arguments = {"TILE": Choice().tile if several else SUM_SLOTS, "SEVERAL": several}
        configs.append(AotConfig(name, ghost_sum_kernel, sums, arguments, 4, 2, tensor_cores=False, wide_loads=False))
    return configs
