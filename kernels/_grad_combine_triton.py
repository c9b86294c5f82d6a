"""Triton kernel of ``grad_combine``: a weighted sum over tensors at any addresses, many parameters in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._plan import WIDEST
from ._triton_common import TYPES, AotConfig, rounded, trips

BLOCK = 1024  # columns of one program
UNROLL = 4  # loads in flight


@triton.jit(do_not_specialize=["base"])
def grad_combine_kernel(
    p_table,  # int64 (parameters, tasks): addresses
    p_out,  # int64 (parameters,): addresses, less ``base``
    p_chunks,  # int64 (programs, 3): parameter, first column, columns
    p_coefficients,  # float64 (tasks,), or with MANY int64 (parameters,): addresses of such
    base: tl.int64,
    tasks,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, TYPE: tl.constexpr, OUT: tl.constexpr, SUM: tl.constexpr,
    VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, MANY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``sum_k v_k g_k`` on one chunk, summed in SUM and rounded once."""
    p_row = p_chunks + tl.program_id(0).to(tl.int64) * 3
    parameter = tl.load(p_row)
    start = tl.load(p_row + 1)
    n = tl.load(p_row + 2).to(tl.int32)
    d = tl.arange(0, BLOCK)
    p_task = p_table + parameter * tasks
    p_target = (tl.load(p_out + parameter) + base).to(tl.pointer_type(OUT)) + start
    if MANY:
        p_coefficients = tl.load(p_coefficients + parameter).to(tl.pointer_type(tl.float64))
    if n == BLOCK:  # a bound that is read from memory would narrow the loads
        b = combined(p_task, p_coefficients, start, d, n, tasks, BLOCK, UNROLL, TYPE, SUM, VECTOR, INTERPRET, False)
        store(p_target, d, n, b, OUT, OUT_VECTOR, INTERPRET, False)
    else:
        b = combined(p_task, p_coefficients, start, d, n, tasks, BLOCK, UNROLL, TYPE, SUM, VECTOR, INTERPRET, True)
        store(p_target, d, n, b, OUT, OUT_VECTOR, INTERPRET, True)


@triton.jit
def combined(
    p_task, p_coefficients, start, d, n, tasks,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, VECTOR: tl.constexpr,
    INTERPRET: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The sum over all tasks, UNROLL of them at a time."""
    b = tl.zeros((BLOCK,), SUM)
    groups = tasks // UNROLL
    for s in range(trips(groups, INTERPRET)):
        for t in tl.static_range(UNROLL):
            b += term(p_task, p_coefficients, s * UNROLL + t, start, d, n, TYPE, SUM, VECTOR, MASK)
    for t in range(trips(tasks - groups * UNROLL, INTERPRET)):
        b += term(p_task, p_coefficients, groups * UNROLL + t, start, d, n, TYPE, SUM, VECTOR, MASK)
    return b


@triton.jit
def term(
    p_task, p_coefficients, k, start, d, n,
    TYPE: tl.constexpr, SUM: tl.constexpr, VECTOR: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """``v_k g_k``."""
    BYTES: tl.constexpr = VECTOR * (TYPE.primitive_bitwidth // 8)
    p = tl.load(p_task + k).to(tl.pointer_type(TYPE)) + start + d
    p = tl.max_contiguous(tl.multiple_of(p, BYTES), VECTOR)
    if MASK:
        x = tl.load(p, mask=d < n, other=0.0)
    else:
        x = tl.load(p)
    return tl.load(p_coefficients + k).to(SUM) * x.to(SUM)


@triton.jit
def store(p_target, d, n, b, OUT: tl.constexpr, VECTOR: tl.constexpr, INTERPRET: tl.constexpr, MASK: tl.constexpr):
    """Round and write."""
    BYTES: tl.constexpr = VECTOR * (OUT.primitive_bitwidth // 8)
    p = tl.max_contiguous(tl.multiple_of(p_target + d, BYTES), VECTOR)
    if MASK:
        tl.store(p, rounded(b, OUT, INTERPRET), mask=d < n)
    else:
        tl.store(p, rounded(b, OUT, INTERPRET))


def configuration(dtype: torch.dtype, out: torch.dtype, wide: bool) -> dict[str, Any]:
    """Compile-time arguments of ``grad_combine_kernel``."""
    return {
        "BLOCK": BLOCK, "UNROLL": UNROLL, "TYPE": TYPES[dtype], "OUT": TYPES[out],
        "SUM": tl.float64 if dtype.itemsize >= 4 or out.itemsize > 4 else tl.float32,
        "VECTOR": WIDEST // dtype.itemsize if wide else 1, "OUT_VECTOR": WIDEST // out.itemsize if wide else 1,
    }  # fmt: skip


def aot_configs(generation: str) -> list[AotConfig]:
    """The shipped configurations."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    signature = {"p_table": "*i64", "p_out": "*i64", "p_chunks": "*i64", "p_coefficients": "*fp64"}
    signature |= {"base": "i64", "tasks": "i32"}
    configs = []
    for dtype, out, wide in (
        (fp32, fp32, True), (fp32, fp32, False), (bf16, bf16, True), (bf16, fp32, True), (fp64, fp64, True),
    ):  # fmt: skip
        names = " to ".join(str(t).removeprefix("torch.") for t in (dtype, out))
        name = f"grad_combine {names}{'' if wide else ' scalar loads'}"
        arguments = configuration(dtype, out, wide) | {"MANY": False}
        configs.append(
            AotConfig(name, grad_combine_kernel, signature, arguments, 4, 2, tensor_cores=False, wide_loads=wide)
        )
    for dtype in (bf16, fp32):
        name = f"grad_combine {str(dtype).removeprefix('torch.')} of many modules"
        many, arguments = signature | {"p_coefficients": "*i64"}, configuration(dtype, dtype, True) | {"MANY": True}
        configs.append(AotConfig(name, grad_combine_kernel, many, arguments, 4, 2, tensor_cores=False))
    return configs
