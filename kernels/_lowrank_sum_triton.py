"""Triton kernel of ``lowrank_sum``: one pass over W, the clients' factors read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._factor_plan import Piece, is_narrow, tile_of, vector_width
from ._plan import AddressTable, to_device
from ._triton_common import TYPES, AotConfig, interpret_flag, options, precision, product, rounded, trips
from .native_calls import bits

LARGEST_DEPTH = {"native": 64, "tf32x3": 32, "ieee": 32, "fp64": 16}
NARROW_DEPTH = 32  # of one step where loads are narrow: addresses take registers
GROUP = 8  # rows of tiles that run together: their columns of A stay in the cache


class Choice(NamedTuple):
    """What a launch may do otherwise, for the same bits."""

    w_first: bool = False  # W is loaded before the factors, and arrives while they are multiplied
    warps: int | None = None  # others than those of ``configuration``


CHOICE = Choice()
TRIALS = {torch.bfloat16: {"W first": Choice(True), "W first, 4 warps": Choice(True, 4)}}  # float32 spills


@triton.jit(do_not_specialize=["beta_bits"])
def lowrank_sum_kernel(
    p_w, p_out,  # (m, n)
    p_table,  # int64 (2, steps): addresses of the first column of a piece of B, and of the first row of one of A
    p_steps,  # int64 (steps, 8): depth, client, strides of B (rows, ranks), strides of A (ranks, columns), 0, 0
    p_coefficients,  # float64 (clients,)
    beta_bits: tl.int64,  # a float64, which a launch would otherwise round to float32
    n_steps, m, n_vectors, w_rows, w_columns, out_rows, out_columns,
    TYPE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, VECTOR_B: tl.constexpr, VECTOR_A: tl.constexpr, HAS_W: tl.constexpr,
    W_FIRST: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of ``beta W + sum_u c_u B_u A_u``. A step is one client's next DEPTH ranks, so that the coefficient
    scales a finished product in the type of the sum, and never a stored number."""
    SUM: tl.constexpr = tl.float64 if PRECISION == "fp64" else tl.float32
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    n = n_vectors * VECTOR_A  # so that the mask of the columns is known to cover whole vectors
    tiles_m = tl.cdiv(m, TILE_M)
    tiles_n = tl.cdiv(n, TILE_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    i = (group * GROUP + tl.program_id(0) % (GROUP * tiles_n) % height) * TILE_M
    j = tl.program_id(0) % (GROUP * tiles_n) // height * TILE_N
    rows = i.to(tl.int64) + tl.arange(0, TILE_M)
    columns = j.to(tl.int64) + tl.arange(0, TILE_N)
    m_rows = (i + tl.arange(0, TILE_M) < m)[:, None]
    m_columns = (j + tl.arange(0, TILE_N) < n)[None, :]
    t = tl.arange(0, DEPTH)
    if HAS_W and W_FIRST:
        w = tl.load(p_w + rows[:, None] * w_rows + columns[None, :] * w_columns, mask=m_rows & m_columns, other=0.0)
    b = tl.zeros((TILE_M, TILE_N), SUM)
    for s in range(trips(n_steps, INTERPRET)):
        p_step = p_steps + s * 8
        depth = tl.multiple_of(tl.load(p_step), VECTOR_B)
        m_t = t < depth
        c = tl.load(p_coefficients + tl.load(p_step + 1)).to(SUM)
        p_b = tl.load(p_table + s).to(tl.pointer_type(TYPE))
        p_a = tl.load(p_table + n_steps + s).to(tl.pointer_type(TYPE))
        if VECTOR_B > 1:  # proven by the plan: neighbouring ranks are neighbours in memory
            p_b += rows[:, None] * tl.load(p_step + 2) + t[None, :]
            p_b = tl.max_contiguous(tl.multiple_of(p_b, (1, VECTOR_B * SIZE)), (1, VECTOR_B))
        else:
            p_b += rows[:, None] * tl.load(p_step + 2) + t[None, :] * tl.load(p_step + 3)
        if VECTOR_A > 1:
            p_a += t[:, None] * tl.load(p_step + 4) + columns[None, :]
            p_a = tl.max_contiguous(tl.multiple_of(p_a, (1, VECTOR_A * SIZE)), (1, VECTOR_A))
        else:
            p_a += t[:, None] * tl.load(p_step + 4) + columns[None, :] * tl.load(p_step + 5)
        x = tl.load(p_b, mask=m_rows & m_t[None, :], other=0.0)
        y = tl.load(p_a, mask=m_t[:, None] & m_columns, other=0.0)
        b += c * product(x, y, tl.zeros((TILE_M, TILE_N), SUM), PRECISION, INTERPRET)
    if HAS_W:
        beta = beta_bits.to(tl.float64, bitcast=True).to(SUM)
        if not W_FIRST:
            w = tl.load(p_w + rows[:, None] * w_rows + columns[None, :] * w_columns, mask=m_rows & m_columns, other=0.0)
        b += beta * w.to(SUM)
    p = p_out + rows[:, None] * out_rows + columns[None, :] * out_columns
    tl.store(p, rounded(b, p_out.dtype.element_ty, INTERPRET), mask=m_rows & m_columns)


@dataclass(frozen=True)
class Variant:
    """What a launch is compiled for."""

    dtype: torch.dtype
    precision: str
    depth: int
    vector_b: int
    vector_a: int


class SumPlan:
    """Everything a call needs beside the addresses: one step per client and at most ``depth`` of its ranks."""

    def __init__(self, B: Sequence[Piece], A: Sequence[Piece], out: torch.dtype, device: torch.device) -> None:
        dtype = B[0].dtype
        kind = precision({dtype} | ({out} & {torch.float64}), precise=False)
        vector_b, vector_a = vector_width(B, wide=False), vector_width(A, wide=True)
        most = min(LARGEST_DEPTH[kind], NARROW_DEPTH if is_narrow(min(vector_b, vector_a), dtype) else 64)
        depth = tile_of(max(p.rank for p in B), most)
        self.variant = Variant(dtype, kind, depth, vector_b, vector_a)
        steps = [(u, t, min(depth, b.rank - t)) for u, b in enumerate(B) for t in range(0, b.rank, depth)]
        rows = [(d, u, B[u].stride_k, B[u].stride_c, A[u].stride_c, A[u].stride_k, 0, 0) for u, _, d in steps]
        size = dtype.itemsize
        source = [B[u].index for u, _, _ in steps] + [A[u].index for u, _, _ in steps]
        offset = [t * B[u].stride_c * size for u, t, _ in steps] + [t * A[u].stride_c * size for u, t, _ in steps]
        self.addresses = AddressTable(np.array(source, np.int64), np.array(offset, np.int64), device)
        self.steps = to_device(np.array(rows, np.int64).reshape(-1, 8), device)


def configuration(v: Variant) -> tuple[dict[str, Any], int, int]:
    """Compile-time arguments, warps and stages of a variant: the fastest on an H100 of those that spill nowhere."""
    narrow = is_narrow(min(v.vector_b, v.vector_a), v.dtype)
    small = v.precision == "fp64" or not (narrow or (v.precision == "native" and v.depth > 32))
    arguments = {
        "TYPE": TYPES[v.dtype], "TILE_M": 64, "TILE_N": 64 if small else 128, "DEPTH": v.depth,
        "GROUP": GROUP, "VECTOR_B": v.vector_b, "VECTOR_A": v.vector_a, "PRECISION": v.precision,
    }  # fmt: skip
    if v.precision == "fp64":
        return arguments, 8, 3
    if small:
        return arguments, 2 if v.precision == "native" or v.depth == 16 else 4, 3
    return arguments, 4 if v.precision == "native" and not narrow else 8, 3


def lowrank_sum_triton(
    plan: SumPlan, pointers: np.ndarray, W: Tensor | None, coefficients: Tensor, beta: float, out: Tensor
) -> Tensor:
    """Write ``beta W + sum_u c_u B_u A_u`` for factors at ``pointers`` into ``out``."""
    m, n = out.shape
    if not m * n:
        return out
    w = out if W is None else W
    arguments, warps, stages = configuration(plan.variant)
    arguments["W_FIRST"], warps = CHOICE.w_first, CHOICE.warps or warps
    grid = (triton.cdiv(m, arguments["TILE_M"]) * triton.cdiv(n, arguments["TILE_N"]),)
    lowrank_sum_kernel[grid](
        w, out, plan.addresses.of(pointers), plan.steps, coefficients,
        bits(beta), len(plan.steps), m, n // plan.variant.vector_a, *w.stride(), *out.stride(),
        **arguments, HAS_W=W is not None and beta != 0, INTERPRET=interpret_flag(), **options(warps, stages),
    )  # fmt: skip
    return out


def aot_configs(generation: str) -> list[AotConfig]:
    """The shipped configurations."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    variants = {
        "bf16 rank 16": (Variant(bf16, "native", 16, 8, 8), "*bf16"),
        "bf16 rank 64": (Variant(bf16, "native", 64, 8, 8), "*bf16"),
        "bf16 rank 16 into fp32": (Variant(bf16, "native", 16, 8, 8), "*fp32"),
        "bf16 rank 16 scalar loads": (Variant(bf16, "native", 16, 1, 1), "*bf16"),
        "bf16 rank 32 scalar loads": (Variant(bf16, "native", 32, 1, 1), "*bf16"),
        "fp32 rank 32 scalar loads": (Variant(fp32, "tf32x3", 32, 1, 1), "*fp32"),
        "fp32 rank 16": (Variant(fp32, "tf32x3", 16, 4, 4), "*fp32"),
        "fp32 rank 32": (Variant(fp32, "tf32x3", 32, 4, 4), "*fp32"),
        "bf16 rank 16 into fp64": (Variant(bf16, "fp64", 16, 8, 8), "*fp64"),
        "fp64 rank 16": (Variant(fp64, "fp64", 16, 2, 2), "*fp64"),
    }
    rows = [(name, *of, Choice()) for name, of in variants.items()]
    rows += [(f"bf16 rank 16, {trial}", *variants["bf16 rank 16"], choice) for trial, choice in TRIALS[bf16].items()]
    integers = ("n_steps", "m", "n_vectors", "w_rows", "out_rows")
    configs = []
    for name, v, out, choice in rows:
        arguments, warps, stages = configuration(v)
        arguments |= {"HAS_W": True, "W_FIRST": choice.w_first}
        arguments |= {"w_columns": 1, "out_columns": 1}  # what a launch specialises for contiguous W
        signature = {"p_w": out, "p_out": out, "p_table": "*i64", "p_steps": "*i64", "p_coefficients": "*fp64"}
        signature |= {"beta_bits": "i64"} | dict.fromkeys(integers, "i32")
        config = AotConfig(
            f"lowrank_sum {name}", lowrank_sum_kernel, signature, arguments, choice.warps or warps, stages,
            divisible=("w_rows", "out_rows") if v.vector_a > 1 else (),
            tensor_cores=v.precision != "fp64", wide_loads=v.vector_a > 1,
        )  # fmt: skip
        configs.append(config)
    return configs
