"""``match_sharded``: every rank matches its shard of the gradients on the Gram matrix of all shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fedgram import stamp
from fedgram.kernels import grad_combine
from fedgram.stamp import Gramian, Match
from fedgram.stamp.dual import rescaling
from fedgram.stamp.gramian import WeightsLike, normalised_weights, one_hot, recentred
from fedgram.stamp.match import gramian_about
from fedgram.stamp.structure import STATISTICS, GradientLike, Inputs, average, finite, not_finite, read, unfit

from .ranks import Ranks, check_alike
from .watch import Watch

NOTHING = "\0"
"""Name of the empty tensor that stands for a share in which there is nothing to match."""


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
    same coefficients, and to the same bits in every run with this number of ranks and split. Where a gradient is so
    short that ``stamp.match`` would read once more, all ranks do.

    Args:
        gradients: this rank's shards, K of them, as ``stamp.match`` takes them. A rank without a share gives K empty
            lists or mappings. In state dicts, what is averaged instead of matched is averaged where it lies; it may be
            all that a rank has.
        weights, c, rescale, precise, backend: as in ``stamp.match``, the same on every rank.
        group: default the whole world; gloo or nccl, gradients on the CPU or an accelerator.
        watch: finds ranks that fail or die while others compute; see ``aggregate_sharded``.

    Returns:
        A Match whose direction is this rank's shard of the direction; all else is of the whole.

    Raises:
        ValueError: as ``stamp.match``, on the rank that found it; or ranks called with different arguments, or none
            of them with anything to match.
        RankError: on all other ranks, and where another rank has died.
    """
    ranks = Ranks(group, watch)
    with ranks.together():
        given = list(gradients)
        rescaling(rescale, c)  # refuse a bad option before the data is read
        u = torch.from_numpy(normalised_weights(weights, len(given)))
        _refuse_dtensors(given)
        nothing = all(map(_has_nothing, given))
        shards = [_with_nothing(one, ranks.device) for one in given] if nothing else given
        inputs = read(shards)
        local = gramian_about(inputs, u, None, precise, backend)
    told = ranks.gather(((len(given), u.tolist(), c, rescale, precise), nothing))
    check_alike([called for called, _ in told], "numbers of gradients, weights or options")
    if all(idle for _, idle in told):
        raise ValueError("gradients: no rank has a tensor to match")
    gramian = recentred(_summed(ranks, local), lambda k: _around(ranks, inputs, u, k, backend))
    dual = stamp.solve_dual(gramian, c, rescale=rescale)
    with ranks.together():
        averages = {name: average(tensors, u) for name, tensors in inputs.averaged.items()}
        if not finite(averages.values()):
            raise ValueError(not_finite(inputs))
        parts = grad_combine(inputs.tensors, dual.coefficients, backend=backend)
        if not finite(parts):
            raise ValueError(unfit(inputs, dict(zip(inputs.names, parts, strict=True)), "the direction"))
    direction = inputs.assemble(parts, averages)
    return Match(_without_nothing(direction) if nothing else direction, dual, gramian, inputs)


def _refuse_dtensors(given: Sequence[GradientLike]) -> None:
    for k, one in enumerate(given):
        parts = one.values() if isinstance(one, Mapping) else [one] if isinstance(one, Tensor | nn.Module) else one
        if any(hasattr(part, "placements") for part in parts):
            raise ValueError(f"gradients: task {k} holds a DTensor: give its local shard, DTensor.to_local()")


def _has_nothing(one: GradientLike) -> bool:
    """Whether nothing in a share enters the match; what is no gradient at all is for ``read`` to refuse."""
    if isinstance(one, nn.Module):
        return all(p.grad is None for p in one.parameters() if p.requires_grad)
    if isinstance(one, Mapping):
        return not any(_is_matched(name, entry) for name, entry in one.items())
    return isinstance(one, list | tuple) and all(entry is None for entry in one)


def _is_matched(name: str, entry: Any) -> bool:
    if not isinstance(entry, Tensor):
        return entry is not None
    return entry.is_floating_point() and name.rpartition(".")[2] not in STATISTICS


def _with_nothing(one: Any, device: torch.device) -> GradientLike:
    """A share in which nothing is matched with an empty tensor beside it, whose Gram matrix is zero."""
    empty = torch.zeros(0, device=device)
    if isinstance(one, list | tuple):
        return [*one, empty]
    return {**(one if isinstance(one, Mapping) else {}), NOTHING: empty}


def _without_nothing(direction: Any) -> Any:
    return direction[:-1] if isinstance(direction, list) else {n: t for n, t in direction.items() if n != NOTHING}


def _around(ranks: Ranks, inputs: Inputs, u: Tensor, k: int, backend: str) -> Gramian:
    """Another read, by all ranks alike: they have found the same gradient too short in the same sum."""
    with ranks.together():
        local = gramian_about(inputs, u, one_hot(k, len(u)), True, backend)
    return _summed(ranks, local)


def _summed(ranks: Ranks, local: Gramian) -> Gramian:
    """The Gram matrix of all shards: centring is column by column, so that the parts of the shards add up."""
    K = local.K
    first, *others = ranks.gather_numbers(torch.cat([local.n0.view(1), local.h, local.H.flatten()]))
    total = first.clone()
    for part in others:
        total += part
    return replace(local, n0=total[0], h=total[1 : K + 1], H=total[K + 1 :].view(K, K))
