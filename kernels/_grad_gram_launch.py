"""Plans and launches of ``grad_gram`` on Triton."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _grad_gram_triton as kernels
from ._grad_gram_configurations import CENTRE_BLOCK, centre_configuration, configuration
from ._grad_inputs import Gradients, GradLayout, check_gradients, check_weights, flatten
from ._grad_work import (
    CHUNK,
    LARGEST_TILE,
    SEGMENT,
    Group,
    aligned_parameters,
    gathered,
    groups,
    padded_table,
    scattered,
    with_null,
)
from ._plan import PlanCache, addresses, alignments, check_runnable, describe, place, to_device
from ._triton_common import float32_precision, generation, interpret_flag, options
from .grad_gram import ROUNDING, recentred

Triple = tuple[Tensor, Tensor, Tensor]
PAIRS = 1 << 15  # of tiles in one launch: the second dimension of a grid ends at 65,535


class GradGramPlan:
    """What depends on the layout alone: tiles, work lists and the place of every address."""

    def __init__(self, gradients: Gradients, pointers: np.ndarray, precise: bool) -> None:
        self.layout: GradLayout = check_gradients(gradients)
        device, K = self.layout.device, self.layout.tasks
        check_runnable(device)
        self.copied = scattered(gradients)
        aligned = aligned_parameters(gradients, pointers, self.copied)
        self.groups = groups(self.layout, aligned, device)
        self.precise = precise
        self.tile = min(LARGEST_TILE, max(16, 1 << (K - 1).bit_length()))
        self.tiles = -(-K // self.tile)
        self.width = self.tiles * self.tile
        self.spare = self.tiles == 1 and self.tile > K
        self.length = self.tile * self.tile + self.tile + 1
        self.addresses = padded_table(K, len(self.layout.shapes), self.width, device)
        first, second = np.triu_indices(self.tiles)
        self.pairs: list[tuple[bool, int, Tensor]] = []  # on the diagonal or off it: the first of a launch, and all
        for on_diagonal in (True, False):
            pairs = np.stack([first, second], 1)[(first == second) == on_diagonal].astype(np.int32)
            parts = range(0, len(pairs), PAIRS)
            self.pairs += [(on_diagonal, i, to_device(pairs[i : i + PAIRS], device)) for i in parts]
        self.blocks = [to_device(a[first != second], device) for a in (first, second)]

    def run(self, gradients: Gradients, pointers: np.ndarray, u: Tensor) -> Triple:
        """The triple about g0 of tensors that lie at ``pointers``."""
        if self.copied:
            gradients = gathered(gradients, self.copied)
            pointers = addresses(flatten(gradients))
        table = self.addresses.of(with_null(pointers))
        weights = torch.nn.functional.pad(u, (0, self.width - len(u)))
        diagonal, off = (u.new_zeros((n, self.length)) for n in (self.tiles, self.tiles * (self.tiles - 1) // 2))
        for group in self.groups:
            for chunks in group.chunks.split(len(group.chunks) if self.tiles == 1 else SEGMENT):
                self._add(group, chunks, table, weights, diagonal, off)
        if self.tiles == 1:
            return self._recentred(diagonal, weights)
        return recentred(*self._assembled(diagonal, off), u)

    def _add(self, group: Group, chunks: Tensor, table: Tensor, weights: Tensor, diagonal: Tensor, off: Tensor) -> None:
        """Add the sums over these chunks to those of the pairs on and off the diagonal."""
        how = product_precision(group.dtype, self.precise)
        centre = self._centre(group, chunks, table, weights, how) if self.tiles > 1 else weights
        for on_diagonal, first, pairs in self.pairs:
            out = (diagonal if on_diagonal else off)[first : first + len(pairs)]
            chosen = configuration(
                generation(table.device), group.dtype, how, self.tile,
                wide=group.wide, inline=self.tiles == 1, diagonal=on_diagonal, spare=self.spare,
            )  # fmt: skip
            programs = min(len(chunks), max(1, chosen.programs // len(pairs)))
            partials = out.new_empty((len(pairs), programs, self.length))
            kernels.grad_gram_kernel[(programs, len(pairs))](
                table, chunks, weights, centre, pairs, partials, self.width, len(chunks), **chosen.arguments,
                INTERPRET=interpret_flag(), **options(chosen.warps, chosen.stages, chosen.registers),
            )  # fmt: skip
            extent = self.length if on_diagonal and not self.spare else self.tile * self.tile
            kernels.slot_sum_kernel[(-(-extent // kernels.ELEMENTS), len(pairs))](
                partials, out, programs, self.length, extent,
                SLOTS=kernels.SLOTS, ELEMENTS=kernels.ELEMENTS, INTERPRET=interpret_flag(), **options(4, 2),
            )  # fmt: skip

    def _centre(self, group: Group, chunks: Tensor, table: Tensor, weights: Tensor, how: str) -> Tensor:
        wide = torch.float64 if how == "fp64" else torch.float32
        centre = torch.empty((len(chunks), CHUNK), dtype=wide, device=table.device)
        arguments, warps, stages = centre_configuration(group.dtype, how, group.wide)
        kernels.grad_centre_kernel[(len(chunks), CHUNK // CENTRE_BLOCK)](
            table, chunks, weights, centre, self.width, self.tiles,
            **arguments, INTERPRET=interpret_flag(), **options(warps, stages),
        )  # fmt: skip
        return centre

    def _recentred(self, sums: Tensor, weights: Tensor) -> Triple:
        K = self.layout.tasks
        n0, h, H = sums.new_empty(()), sums.new_empty(K), sums.new_empty((K, K))
        kernels.recentre_kernel[(1,)](
            sums, weights, n0, h, H, K, TILE=self.tile, SPARE=self.spare, ROUNDING=ROUNDING, **options(8, 2)
        )
        return n0, h, H

    def _assembled(self, diagonal: Tensor, off: Tensor) -> Triple:
        """The whole matrix; tiles off the diagonal stand doubled in one triangle, which symmetrising sets right."""
        K, square = self.layout.tasks, self.tile * self.tile
        H = diagonal.new_zeros((self.tiles, self.tiles, self.tile, self.tile))
        H.diagonal(dim1=0, dim2=1).copy_(diagonal[:, :square].view(-1, self.tile, self.tile).permute(1, 2, 0))
        H[self.blocks[0], self.blocks[1]] = 2 * off[:, :square].view(-1, self.tile, self.tile)
        H = H.permute(0, 2, 1, 3).reshape(self.width, self.width)[:K, :K]
        return diagonal[0, -1], diagonal[:, square:-1].reshape(-1)[:K], H


PLANS: PlanCache[GradGramPlan] = PlanCache()


def grad_gram_triton(gradients: Gradients, weights: Tensor | None, precise: bool) -> Triple:
    """``grad_gram``; the gradients are checked when their layout is new."""
    tensors = flatten(gradients)
    pointers = addresses(tensors)
    lengths = tuple(len(g) for g in gradients)
    key = (place(tensors[0].device), precise, lengths, describe(tensors), alignments(pointers))
    plan = PLANS.get(key, lambda: GradGramPlan(gradients, pointers, precise))
    return plan.run(gradients, pointers, check_weights(weights, len(gradients), plan.layout.device))


def product_precision(dtype: torch.dtype, precise: bool) -> str:
    """How differences from the centre, float32 or wider, are multiplied: bf16 (in two parts), tf32x3, ieee or fp64."""
    if precise or dtype is torch.float64:
        return "fp64"
    return "bf16" if dtype is torch.bfloat16 else float32_precision()
