"""Triton kernel of ``subset_select``: the whole descent of one subset by swaps in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._plan import check_runnable
from ._subset_swaps import MemberRows, Starts, descend, most_swaps, taken_rows, tolerance
from ._triton_common import AotConfig, interpret_flag, options, trips

SLOTS, ROWS = 8, 64  # tile of the search for the best swap: larger ones spill on one target or another
WARPS, STAGES = 8, 2


@triton.jit(do_not_specialize=["n", "m", "most"])  # known multiples of 16 (rows of a class, often) spill everywhere
def descend_kernel(
    p_gram,  # float64 (classes, n, n)
    p_diagonal,  # float64 (classes, n)
    p_counts,  # int64 (classes,): members that count
    p_limit,  # float64 (classes,): a swap must change the square of the members' sum by less than this
    p_members,  # int64 (classes, starts, m)
    p_taken,  # int8 (classes, starts, n): rows that cannot come
    p_r,  # float64 (classes, starts, n): scratch, K times the indicator of the members
    n, m, most,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Exchange the best pair of a member and another row until none lowers the error; all Grams are centred."""
    c = tl.program_id(0).to(tl.int64)
    start = c * tl.num_programs(1) + tl.program_id(1)
    p_gram += c * n * n
    p_diagonal += c * n
    p_members += start * m
    p_taken += start * n
    p_r += start * n
    count = tl.load(p_counts + c).to(tl.int32)
    limit = tl.load(p_limit + c)
    s = tl.arange(0, SLOTS)
    d = tl.arange(0, ROWS)
    row_blocks = (n + ROWS - 1) // ROWS
    slot_blocks = (count + SLOTS - 1) // SLOTS
    for block in range(trips(row_blocks, INTERPRET)):
        j = block * ROWS + d
        b = tl.zeros((ROWS,), tl.float64)
        for t in range(trips(count, INTERPRET)):
            b += tl.load(p_gram + tl.load(p_members + t) * n + j, mask=j < n, other=0.0)
        tl.store(p_r + j, b, mask=j < n)
    swaps = 0
    improved = count > 0
    while improved:
        tl.debug_barrier()  # what this program has just stored is read by its other threads
        best = tl.full((SLOTS, ROWS), float("inf"), tl.float64)
        where = tl.zeros((SLOTS, ROWS), tl.int32)
        for block in range(trips(row_blocks, INTERPRET)):
            j = block * ROWS + d
            free = tl.load(p_taken + j, mask=j < n, other=1) == 0
            r_j = tl.load(p_r + j, mask=j < n, other=0.0)
            comes = tl.where(free, tl.load(p_diagonal + j, mask=j < n, other=0.0) + 2 * r_j, float("inf"))
            for slots in range(trips(slot_blocks, INTERPRET)):
                t = slots * SLOTS + s
                i = tl.load(p_members + t, mask=t < count, other=0)
                goes = tl.load(p_diagonal + i) - 2 * tl.load(p_r + i)
                goes = tl.where(t < count, goes, float("inf"))
                b = tl.load(
                    p_gram + i[:, None] * n + j[None, :], mask=(t < count)[:, None] & (j < n)[None, :], other=0.0
                )
                change = comes[None, :] + goes[:, None] - 2 * b
                where = tl.where(change < best, t[:, None] * n + j[None, :], where)
                best = tl.minimum(change, best)
        least = tl.min(tl.min(best, 1), 0)
        found = tl.min(tl.min(tl.where(best == least, where, 2147483647), 1), 0)
        improved = (least < limit) & (swaps < most)
        if improved:
            coming = found % n
            p_slot = p_members + found // n
            leaving = tl.load(p_slot)
            tl.debug_barrier()
            tl.store(p_slot, coming.to(tl.int64))
            tl.store(p_taken + leaving, 0)
            tl.store(p_taken + coming, 1)
            for block in range(trips(row_blocks, INTERPRET)):
                j = block * ROWS + d
                b = tl.load(p_r + j, mask=j < n, other=0.0)
                b += tl.load(p_gram + coming.to(tl.int64) * n + j, mask=j < n, other=0.0)
                b -= tl.load(p_gram + leaving * n + j, mask=j < n, other=0.0)
                tl.store(p_r + j, b, mask=j < n)
        swaps += 1


def descend_triton(rows: MemberRows, starts: Starts) -> Tensor:
    """``descend``: the kernel makes the swaps, and one look of the torch twin confirms that none is left.

    Without a Gram (large classes) its rows are matrix products, which the torch twin makes as well as any kernel.
    """
    if rows.gram is not None:
        check_runnable(rows.gram.device)
        C, S, m = starts.members.shape
        n = rows.diagonal.shape[1]
        taken = taken_rows(rows, starts).to(torch.int8)
        scratch = torch.empty((C, S, n), dtype=torch.float64, device=taken.device)
        descend_kernel[(C, S)](
            rows.gram, rows.diagonal, starts.counts, -tolerance(rows, starts), starts.members, taken, scratch,
            n, m, most_swaps(m, n), SLOTS=SLOTS, ROWS=ROWS, INTERPRET=interpret_flag(), **options(WARPS, STAGES),
        )  # fmt: skip
    return descend(rows, starts, look=1)


def aot_configs(generation: str) -> list[AotConfig]:
    """The shipped configuration."""
    doubles = dict.fromkeys(("p_gram", "p_diagonal", "p_limit", "p_r"), "*fp64")
    integers = {"p_counts": "*i64", "p_members": "*i64", "p_taken": "*i8", "n": "i32", "m": "i32", "most": "i32"}
    arguments = {"SLOTS": SLOTS, "ROWS": ROWS}
    signature = doubles | integers
    return [
        AotConfig(
            "subset_descend", descend_kernel, signature, arguments, WARPS, STAGES, tensor_cores=False, wide_loads=False
        )
    ]
