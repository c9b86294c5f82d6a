"""``match_sharded``: every rank matches its shard of the gradients on the Gram matrix of all shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fedgram import stamp
from fedgram.kernels import grad_combine
from fedgram.stamp import Gramian, Match
from fedgram.stamp.gramian import WeightsLike, normalised_weights
from fedgram.stamp.structure import GradientLike, Inputs, average, read

from .ranks import Ranks, check_alike
from .watch import Watch


@torch.no_grad()
def match_sharded(
    gradients: Iterable[GradientLike],
    weights: WeightsLike | None = None,
    *,
    c: float = 0.25,
    rescale: bool | str = False,
    precise: bool = True,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    watch: Watch | None = None,
) -> Match:
    """``stamp.match`` (arXiv:2506.12031) of K gradients that lie in shards over the ranks of a process group.

    Every number of a gradient must lie on exactly one rank: whole tensors, or slices of them as FSDP keeps them (give
    the local tensors, not DTensors), in any split that is the same for all K. The ranks exchange their parts of the
    centred Gram matrix, ``K^2 + K + 1`` numbers in float64, which each adds up in rank order: all ranks come to the
    same coefficients, and to the same bits in every run with this number of ranks and split.

    Args:
        gradients: this rank's shards, K of them, as ``stamp.match`` takes them. A rank without a share gives K empty
            lists or mappings. In state dicts, what is averaged instead of matched is averaged where it lies.
        weights, c, rescale, precise, backend: as in ``stamp.match``, the same on every rank.
        group: default the whole world; gloo or nccl, gradients on the CPU or an accelerator.
        watch: finds ranks that fail or die while others compute; see ``aggregate_sharded``.

    Returns:
        A Match whose direction is this rank's shard of the direction; all else is of the whole.

    Raises:
        ValueError: as ``stamp.match``, on the rank that found it; or ranks called with different arguments.
        RankError: on all other ranks, and where another rank has died.
    """
    ranks, how = Ranks(group, watch), {"precise": precise, "backend": backend}
    with ranks.together():
        given = list(gradients)
        u = torch.from_numpy(normalised_weights(weights, len(given)))
        inputs = _read(given)
        local = _zero(len(given), ranks.device) if inputs is None else stamp.gramian(given, weights, **how)
    check_alike(ranks.gather((len(given), u.tolist(), c, rescale, precise)), "numbers of gradients, weights or options")
    gramian = _summed(ranks, local, u)
    dual = stamp.solve_dual(gramian, c, rescale=rescale)
    if inputs is None:
        return Match({} if isinstance(given[0], Mapping) else [], dual, gramian)
    averages = {name: average(tensors, u) for name, tensors in inputs.averaged.items()}
    direction = grad_combine(inputs.tensors, dual.coefficients, backend=backend)
    return Match(inputs.assemble(direction, averages), dual, gramian, inputs)


def _read(given: Sequence[GradientLike]) -> Inputs | None:
    """The shards taken apart, or None for a rank without a share."""
    if all(isinstance(one, Sequence | Mapping) and not one for one in given):
        return None
    for k, one in enumerate(given):
        parts = one.values() if isinstance(one, Mapping) else [one] if isinstance(one, Tensor | nn.Module) else one
        if any(hasattr(part, "placements") for part in parts):
            raise ValueError(f"gradients: task {k} holds a DTensor: give its local shard, DTensor.to_local()")
    return read(given)


def _zero(K: int, device: torch.device) -> Gramian:
    zeros = torch.zeros(1 + K + K * K, dtype=torch.float64, device=device)
    return Gramian(zeros[0], zeros[1 : K + 1], zeros[K + 1 :].view(K, K))


def _summed(ranks: Ranks, local: Gramian, u: Tensor) -> Gramian:
    """The Gram matrix of all shards: centring is column by column, so that the parts of the shards add up."""
    K = local.K
    first, *others = ranks.gather_numbers(torch.cat([local.n0.view(1), local.h, local.H.flatten()]))
    total = first.clone()
    for part in others:
        total += part
    return Gramian(total[0], total[1 : K + 1], total[K + 1 :].view(K, K), u.to(total.device))
