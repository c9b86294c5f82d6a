"""Triton kernels of ``grad_gram``: rows at any addresses, centred in registers, multiplied, and summed in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._grad_gram_configurations import centre_configuration, configuration, shipped
from ._triton_common import AotConfig, hidden, product, trips
from ._triton_split import split_bf16, split_tf32
from .grad_gram import ROUNDING

SLOTS, ELEMENTS = 64, 32  # tile of the sums over programs


@triton.jit
def gram_product(e_i, e_j, acc, SAME: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``acc + e_i e_j^T``; where the two are the SAME only its symmetric part is right, which saves a product.

    float32 is split here, not by the compiler, which would take three products on the diagonal too.
    """
    if PRECISION == "tf32x3":
        high_i, low_i = split_tf32(e_i)
        if SAME:
            acc = product(high_i, tl.trans(high_i), acc, "tf32", INTERPRET)
            acc = product(2 * high_i, tl.trans(low_i), acc, "tf32", INTERPRET)
        else:
            high_j, low_j = split_tf32(e_j)
            acc = product(high_i, tl.trans(high_j), acc, "tf32", INTERPRET)
            acc = product(high_i, tl.trans(low_j), acc, "tf32", INTERPRET)
            acc = product(low_i, tl.trans(high_j), acc, "tf32", INTERPRET)
    elif PRECISION == "bf16":
        high_i, low_i = split_bf16(e_i, INTERPRET)
        if SAME:
            acc = product(high_i, tl.trans(high_i), acc, "native", INTERPRET)
            acc = product(low_i, tl.trans(low_i), acc, "native", INTERPRET)
            acc = product((2 * high_i.to(tl.float32)).to(tl.bfloat16), tl.trans(low_i), acc, "native", INTERPRET)
        else:
            high_j, low_j = split_bf16(e_j, INTERPRET)
            acc = product(high_i, tl.trans(high_j), acc, "native", INTERPRET)
            acc = product(low_i, tl.trans(low_j), acc, "native", INTERPRET)
            acc = product(high_i, tl.trans(low_j), acc, "native", INTERPRET)
            acc = product(low_i, tl.trans(high_j), acc, "native", INTERPRET)
    else:
        acc = product(e_i, tl.trans(e_j), acc, PRECISION, INTERPRET)
    return acc


@triton.jit
def load_rows(p_rows, m_rows, d, n, TYPE: tl.constexpr, SUM: tl.constexpr, VECTOR: tl.constexpr, MASK: tl.constexpr):
    """Columns ``d`` of the rows, (rows, columns). The alignment is what the plan has proven of every address."""
    BYTES: tl.constexpr = VECTOR * (TYPE.primitive_bitwidth // 8)
    p = tl.max_contiguous(tl.multiple_of(p_rows[:, None] + d[None, :], (1, BYTES)), (1, VECTOR))
    m = m_rows[:, None]
    if MASK:
        m = m & (d < n)[None, :]
    x = tl.load(p, mask=m, other=0.0)
    if TYPE.primitive_bitwidth == 16 and SUM.is_fp64():
        x = hidden(x)
    return x.to(SUM)


@triton.jit
def step(
    p_i, m_i, p_j, m_j, b_u, p_c, d, n, acc, b_h, b_n,
    TYPE: tl.constexpr, SUM: tl.constexpr, VECTOR: tl.constexpr, INLINE: tl.constexpr, DIAGONAL: tl.constexpr,
    SPARE: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add columns ``d``: ``e_i e_j^T``, and on the diagonal ``<c, e_i>`` and ``c * c``.

    A row without a task is zero, and ``-c`` once it is centred: with a row to SPARE both come from the product itself.
    """
    x_i = load_rows(p_i, m_i, d, n, TYPE, SUM, VECTOR, MASK)
    if INLINE:
        c = tl.sum(b_u[:, None] * x_i, 0)
    elif MASK:
        c = tl.load(p_c + d, mask=d < n, other=0.0)
    else:
        c = tl.load(p_c + d)
    e_i = x_i - c[None, :]
    if DIAGONAL:
        acc = gram_product(e_i, e_i, acc, True, PRECISION, INTERPRET)
        if not SPARE:
            b_h += tl.sum(e_i * c[None, :], 1)
            b_n += c * c
    else:
        x_j = load_rows(p_j, m_j, d, n, TYPE, SUM, VECTOR, MASK)
        acc = gram_product(e_i, x_j - c[None, :], acc, False, PRECISION, INTERPRET)
    return acc, b_h, b_n


@triton.jit
def grad_gram_kernel(
    p_table,  # int64 (parameters, width): address of each parameter of each task, 0 beyond the last task
    p_chunks,  # int64 (chunks, 3): parameter, first column, columns
    p_weights,  # float64 (width,)
    p_centre,  # float32 or float64 (chunks, CHUNK): the centre of these chunks, if not INLINE
    p_pairs,  # int32 (pairs, 2): tiles i <= j
    p_partials,  # float64 (pairs, programs, TILE * TILE + TILE + 1): H, h, n
    width, n_chunks,
    TILE: tl.constexpr, BLOCK: tl.constexpr, FLUSH: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr,
    VECTOR: tl.constexpr, INLINE: tl.constexpr, DIAGONAL: tl.constexpr, SPARE: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One pair of tiles over every n-th chunk: float32 for FLUSH blocks and for a chunk, float64 beyond.

    The float64 sums are kept in memory: registers decide how many programs a processor holds.
    """
    SUM: tl.constexpr = tl.float64 if PRECISION == "fp64" else tl.float32
    LENGTH: tl.constexpr = TILE * TILE + TILE + 1
    pid = tl.program_id(0)
    n_programs = tl.num_programs(0)
    p_pair = p_pairs + 2 * tl.program_id(1)
    r = tl.arange(0, TILE)
    r_i = tl.load(p_pair) * TILE + r
    r_j = tl.load(p_pair + 1) * TILE + r
    b_u = tl.load(p_weights + r_i).to(SUM)
    p_slot = p_partials + (tl.program_id(1).to(tl.int64) * n_programs + pid) * LENGTH
    p = p_slot + r[:, None] * TILE + r[None, :]
    tl.store(p, tl.zeros((TILE, TILE), tl.float64))
    total_h = tl.zeros((TILE,), tl.float64)
    total_n = tl.zeros((BLOCK,), tl.float64)
    for s in range(trips((n_chunks - pid + n_programs - 1) // n_programs, INTERPRET)):
        chunk = (pid + s * n_programs).to(tl.int64)
        row = tl.load(p_chunks + chunk * 3) * width
        start = tl.load(p_chunks + chunk * 3 + 1)
        n = tl.load(p_chunks + chunk * 3 + 2).to(tl.int32)
        a_i = tl.load(p_table + row + r_i)
        a_j = tl.load(p_table + row + r_j)
        p_i = a_i.to(tl.pointer_type(TYPE)) + start
        p_j = a_j.to(tl.pointer_type(TYPE)) + start
        p_c = p_centre + chunk * CHUNK
        b = tl.zeros((TILE, TILE), SUM)
        acc = tl.zeros((TILE, TILE), SUM)
        b_h = tl.zeros((TILE,), SUM)
        b_n = tl.zeros((BLOCK,), SUM)
        n_blocks = n // BLOCK
        for t in range(trips(n_blocks, INTERPRET)):
            d = t * BLOCK + tl.arange(0, BLOCK)
            acc, b_h, b_n = step(
                p_i, a_i != 0, p_j, a_j != 0, b_u, p_c, d, n, acc, b_h, b_n,
                TYPE, SUM, VECTOR, INLINE, DIAGONAL, SPARE, PRECISION, INTERPRET, False,
            )  # fmt: skip
            if FLUSH > 0:  # noqa: SIM102 - FLUSH is a constant: tensor cores truncate, so they get short chains only
                if (t + 1) % FLUSH == 0:
                    b += acc
                    acc = tl.zeros((TILE, TILE), SUM)
        if n_blocks * BLOCK < n:
            d = n_blocks * BLOCK + tl.arange(0, BLOCK)
            acc, b_h, b_n = step(
                p_i, a_i != 0, p_j, a_j != 0, b_u, p_c, d, n, acc, b_h, b_n,
                TYPE, SUM, VECTOR, INLINE, DIAGONAL, SPARE, PRECISION, INTERPRET, True,
            )  # fmt: skip
        if FLUSH > 0:
            acc += b
        tl.debug_barrier()  # another thread may have stored what this one loads: in the last round, or the zeros
        tl.store(p, tl.load(p) + acc.to(tl.float64))
        total_h += b_h.to(tl.float64)
        total_n += b_n.to(tl.float64)
    p_h = p_slot + TILE * TILE + r
    if DIAGONAL and not SPARE:
        tl.store(p_h, total_h)
        tl.store(p_slot + TILE * TILE + TILE, tl.sum(total_n, 0))


@triton.jit
def mean(
    p_tasks, p_weights, start, d, n, n_tiles,
    TILE: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, VECTOR: tl.constexpr, MASK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """``sum_k u_k g_k`` on columns ``d``."""
    c = tl.zeros((d.shape[0],), SUM)
    for t in range(trips(n_tiles, INTERPRET)):
        r = t * TILE + tl.arange(0, TILE)
        a = tl.load(p_tasks + r)
        x = load_rows(a.to(tl.pointer_type(TYPE)) + start, a != 0, d, n, TYPE, SUM, VECTOR, MASK)
        c += tl.sum(tl.load(p_weights + r).to(SUM)[:, None] * x, 0)
    return c


@triton.jit
def grad_centre_kernel(
    p_table, p_chunks, p_weights,  # as above
    p_centre,  # float32 or float64 (chunks, CHUNK)
    width, n_tiles,
    TILE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    VECTOR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The weighted mean of all tasks on one chunk, for several tiles to share."""
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.load(p_chunks + chunk * 3) * width
    start = tl.load(p_chunks + chunk * 3 + 1)
    n = tl.load(p_chunks + chunk * 3 + 2).to(tl.int32)
    first = tl.program_id(1) * BLOCK
    if first < n:
        d = first + tl.arange(0, BLOCK)
        if first + BLOCK <= n:
            c = mean(p_table + row, p_weights, start, d, n, n_tiles, TILE, TYPE, SUM, VECTOR, False, INTERPRET)
        else:
            c = mean(p_table + row, p_weights, start, d, n, n_tiles, TILE, TYPE, SUM, VECTOR, True, INTERPRET)
        tl.store(p_centre + chunk * CHUNK + d, c)


@triton.jit
def slot_sum_kernel(
    p_partials,  # float64 (pairs, slots, length)
    p_out,  # float64 (pairs, length)
    n_slots, length, extent,
    SLOTS: tl.constexpr, ELEMENTS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the first ``extent`` elements of all slots to the output, always in one order."""
    pair = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    s = tl.arange(0, SLOTS)
    b = tl.zeros((SLOTS, ELEMENTS), tl.float64)
    for t in range(trips((n_slots + SLOTS - 1) // SLOTS, INTERPRET)):
        slot = t * SLOTS + s
        m = (slot < n_slots)[:, None] & (e < extent)[None, :]
        b += tl.load(p_partials + (pair * n_slots + slot)[:, None] * length + e[None, :], mask=m, other=0.0)
    p = p_out + pair * length + e
    tl.store(p, tl.load(p, mask=e < extent, other=0.0) + tl.sum(b, 0), mask=e < extent)


@triton.jit
def recentre_kernel(
    p_sums,  # float64 (TILE * TILE + TILE + 1,): H, h, n about the stored centre
    p_weights,  # float64 (TILE,)
    p_norm, p_h, p_H,  # float64 (), (tasks,), (tasks, tasks)
    tasks,
    TILE: tl.constexpr, SPARE: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """``recentred`` of grad_gram.py, term by term, for a single tile; with SPARE row ``tasks`` is minus the centre."""
    r = tl.arange(0, TILE)
    u = tl.load(p_weights + r)
    square = r[:, None] * TILE + r[None, :]
    H = (tl.load(p_sums + square) + tl.load(p_sums + r[None, :] * TILE + r[:, None])) / 2
    if SPARE:
        h = -(tl.load(p_sums + tasks * TILE + r) + tl.load(p_sums + r * TILE + tasks)) / 2
        n = tl.load(p_sums + tasks * TILE + tasks)
    else:
        h = tl.load(p_sums + TILE * TILE + r)
        n = tl.load(p_sums + TILE * TILE + TILE)
    Hu = tl.sum(H * u[None, :], 1)
    mm = tl.sum(Hu * u, 0)
    cm = tl.sum(h * u, 0)
    m = r < tasks
    tl.store(p_norm, n + 2 * cm + mm)
    tl.store(p_h + r, h - cm + Hu - mm, mask=m)
    centred = H - (Hu[:, None] + Hu[None, :]) + mm
    same = r[:, None] == r[None, :]
    own = tl.sum(tl.where(same, centred, 0.0), 1)
    terms = tl.sum(tl.where(same, H, 0.0), 1) + 2 * tl.abs(Hu) + mm
    apart = (own > ROUNDING * terms).to(tl.float64)
    centred = centred * apart[:, None] * apart[None, :]
    tl.store(p_H + r[:, None] * tasks + r[None, :], centred, mask=m[:, None] & m[None, :])


def aot_configs(generation: str) -> list[AotConfig]:
    """The shipped configurations of all kernels."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    configs = []
    rows = {"p_table": "*i64", "p_chunks": "*i64", "p_weights": "*fp64", "width": "i32"}
    for name, (dtype, precision, tile, wide, (inline, diagonal), spare) in shipped().items():
        c = configuration(generation, dtype, precision, tile, wide=wide, inline=inline, diagonal=diagonal, spare=spare)
        centre = "*fp64" if precision == "fp64" else "*fp32"
        signature = rows | {"p_centre": centre, "p_pairs": "*i32", "p_partials": "*fp64", "n_chunks": "i32"}
        fills = tile * c.arguments["BLOCK"] >= 32 * c.warps * c.arguments["VECTOR"]  # a vector for every thread
        config = AotConfig(
            f"grad_gram {name}", grad_gram_kernel, signature, c.arguments, c.warps, c.stages,
            tensor_cores=precision != "fp64", wide_loads=wide and fills, registers=c.registers,
        )  # fmt: skip
        configs.append(config)
    for dtype, precision, wide in (
        (bf16, "bf16", True), (fp32, "tf32x3", True), (fp64, "fp64", True),
        (fp32, "fp64", False), (fp64, "fp64", False),
    ):  # fmt: skip
        arguments, warps, stages = centre_configuration(dtype, precision, wide)
        signature = rows | {"p_centre": "*fp64" if precision == "fp64" else "*fp32", "n_tiles": "i32"}
        name = f"grad_centre {str(dtype).removeprefix('torch.')}{'' if wide else ' scalar loads precise'}"
        configs.append(
            AotConfig(
                name, grad_centre_kernel, signature, arguments, warps, stages, tensor_cores=False, wide_loads=wide
            )
        )
    sums = {"p_partials": "*fp64", "p_out": "*fp64", "n_slots": "i32", "length": "i32", "extent": "i32"}
    arguments = {"SLOTS": SLOTS, "ELEMENTS": ELEMENTS}
    configs.append(AotConfig("slot_sum", slot_sum_kernel, sums, arguments, 4, 2, tensor_cores=False, wide_loads=False))
    triple = dict.fromkeys(("p_sums", "p_weights", "p_norm", "p_h", "p_H"), "*fp64") | {"tasks": "i32"}
    for spare in (False, True):
        name = f"recentre{' from a row to spare' if spare else ''}"
        constants = {"TILE": 64, "SPARE": spare, "ROUNDING": ROUNDING}
        configs.append(AotConfig(name, recentre_kernel, triple, constants, 8, 2, tensor_cores=False, wide_loads=False))
    return configs
