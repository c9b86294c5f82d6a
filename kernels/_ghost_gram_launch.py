"""Plans and launches of ``ghost_gram`` on Triton."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from . import _ghost_gram_triton as kernels
from ._memory import check_memory
from ._plan import WIDEST, PlanCache, check_runnable, place, to_device
from ._triton_common import float32_precision, generation, interpret_flag, options, precision
from .ghost_gram import RowBlock, row_blocks

Group = tuple[RowBlock, ...]  # the parts of one long task, or one block of several short ones


class GhostPlan:
    """Work lists that follow from the tasks' boundaries: tiles, and the blocks of the Gram matrix they add up to.

    Both are kept apart by whether a tile has several tasks on one side, or lies within one pair of tasks.
    """

    def __init__(self, offsets: tuple[int, ...], device: torch.device, tile: int) -> None:
        check_runnable(device)
        self.K, self.slots = len(offsets) - 1, 0
        work: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
        cells: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
        blocks = row_blocks(offsets, tile)
        groups = [tuple(g) for _, g in itertools.groupby(blocks, key=lambda b: (b.first, b.last))]
        for n, i in enumerate(groups):
            for j in groups[n:]:
                self._add(i, j, work, cells)
        self.work = {several: _table(rows, device) for several, rows in work.items() if rows}
        self.cells = {several: _table(rows, device) for several, rows in cells.items() if rows}
        self.tasks = to_device(np.repeat(np.arange(self.K, dtype=np.int32), np.diff(offsets)), device)

    def _add(self, i: Group, j: Group, work: dict, cells: dict) -> None:
        rows, columns = i[0].last - i[0].first, j[0].last - j[0].first
        several = rows > 1 or columns > 1
        tiles = _tiles(i, j)
        cells[several].append((self.slots, len(tiles), rows, columns, i[0].first, j[0].first, int(i is j)))
        for a, b, weight in tiles:
            sides = (a.start, a.stop - a.start, b.start, b.stop - b.start, a.first, rows, b.first, columns)
            work[several].append((*sides, self.slots, weight))
            self.slots += rows * columns


def _tiles(i: Group, j: Group) -> list[tuple[RowBlock, RowBlock, int]]:
    """Tiles and their weights: of a group with itself one triangle, with all beside its diagonal twice."""
    if i is not j:
        return [(a, b, 1) for a in i for b in j]
    return [(a, b, 1 if a is b else 2) for n, a in enumerate(i) for b in i[n:]]


def _table(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    return to_device(np.asarray(rows, dtype=np.int64), device)


PLANS: PlanCache[GhostPlan] = PlanCache()


def ghost_gram_triton(
    inputs: Tensor, output_grads: Tensor, offsets: tuple[int, ...], bias: bool, precise: bool
) -> Tensor:
    """``ghost_gram``."""
    check_memory((inputs, output_grads), ("inputs", "output_grads").__getitem__)
    tile, others = kernels.CHOICE
    plan = PLANS.get((place(inputs.device), offsets, tile), lambda: GhostPlan(offsets, inputs.device, tile))
    out = torch.zeros((plan.K, plan.K), dtype=torch.float64, device=inputs.device)
    partials = torch.empty(plan.slots, dtype=torch.float64, device=inputs.device)
    inputs, output_grads = inputs.detach().resolve_neg(), output_grads.detach().resolve_neg()
    tokens = inputs.ndim == 1
    inputs = inputs.contiguous() if tokens else _unit_stride(inputs)
    output_grads = _unit_stride(output_grads)
    types = {output_grads.dtype} if tokens else {inputs.dtype, output_grads.dtype}
    precise = precise or torch.float64 in types
    arguments = _products("G", output_grads, precise)
    arguments |= _products("I", output_grads if tokens else inputs, precise)
    arguments |= {"TOKENS": tokens, "BIAS": bias, "SUMMING": "fp64" if precise else float32_precision()}
    wide = min(arguments["VECTOR_I"], arguments["VECTOR_G"]) > 1
    warps, stages = kernels.warps_and_stages(generation(inputs.device), arguments["SUMMING"], wide=wide)
    warps = others or warps
    for several, work in plan.work.items():
        kernels.ghost_gram_kernel[(len(work),)](
            inputs, output_grads, plan.tasks, work, partials, inputs.stride(0), inputs.shape[-1],
            output_grads.stride(0), output_grads.shape[1], TILE=tile, SEVERAL=several, **arguments,
            INTERPRET=interpret_flag(), **options(warps, stages),
        )  # fmt: skip
    for several, cells in plan.cells.items():
        kernels.ghost_sum_kernel[(len(cells),)](
            partials, cells, out, plan.K, TILE=tile if several else kernels.SUM_SLOTS, SEVERAL=several,
            INTERPRET=interpret_flag(), **options(4, 2),
        )  # fmt: skip
    return out


def _products(suffix: str, rows: Tensor, precise: bool) -> dict:
    wide = rows.data_ptr() % WIDEST == 0 and rows.stride(0) * rows.itemsize % WIDEST == 0
    how = precision({rows.dtype}, precise=precise)
    return kernels.products_configuration(suffix, rows.dtype, how, wide)


def _unit_stride(rows: Tensor) -> Tensor:
    """The rows with their elements side by side; copied where they are not."""
    return rows if rows.stride(1) == 1 else rows.contiguous()
