"""One result per client: each gets, for every module it has, the pair of its own rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .aggregation import Aggregation, Progress, module_report
from .cohort import average_extras, client_labels, extra_roles, make_cohort, read_layer
from .estimation import estimate_targets
from .inner_products import screen_cohort
from .layer import Adapter, AdapterLike, LoraLayer, as_adapter
from .methods import check_method
from .portions import chunks
from .report import ModuleReport, Report
from .screening import Clip
from .target import Target
from .weights import Weights

Result = tuple[LoraLayer, ModuleReport]


@torch.no_grad()
def aggregate_for_clients(
    adapters: Sequence[AdapterLike],
    weights: Weights = None,
    *,
    method: str = "als",
    missing: str = "error",
    clip: Clip = None,
    min_cosine: float | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
    names: Sequence[str] | None = None,
) -> list[Aggregation]:
    """Aggregate once for clients of different ranks: one target per module, and for every client a pair of its rank.

    The target ``dW = sum_u w_u s_u B_u A_u`` is that of ``aggregate`` (arXiv:2509.26399), the same for all clients;
    with ``svd`` each client gets the best pair of its own rank (Eckart-Young). Pairs of equal rank are the same
    tensors. The factors are read once (with screening twice).

    Args:
        adapters, weights, missing, clip, min_cosine, backend, progress, names: as in ``aggregate``. Clients of weight
            zero, or dropped ones, add nothing to the target but get a result.
        method: ``fedavg``, ``flora-na``, ``als`` or ``svd``.

    Returns:
        One Aggregation per client, in their order: its own modules only, the averaged full tensors that it has, its
        own configuration.

    Raises:
        ValueError: as ``aggregate``; ``stack`` has no rank to choose.
    """
    check_method(method, 1, False)
    adapters = list(adapters)
    cohort = make_cohort(adapters, weights, names=names, missing=missing)
    cohort, screening = screen_cohort(cohort, clip, min_cosine, backend)
    labels = client_labels(names, len(adapters))
    clients = {label: as_adapter(adapter, label) for label, adapter in zip(labels, adapters, strict=True)}
    found: dict[str, dict[str, Result]] = {label: {} for label in clients}
    done = 0
    for targets in chunks(cohort, None, whole=False):
        wanted = [_ranks(clients, target) for target in targets]
        for rank in sorted({r for ranks in wanted for r in ranks.values()}):
            some = [i for i, ranks in enumerate(wanted) if rank in ranks.values()]
            estimates = estimate_targets([targets[i] for i in some], method=method, rank=rank, backend=backend)
            for i, e in zip(some, estimates, strict=True):
                pair = LoraLayer(A=e.A, B=e.B), module_report(e, targets[i], cohort)
                for label in (label for label, own in wanted[i].items() if own == rank):
                    found[label][targets[i].name] = pair
        done += len(targets)
        if progress is not None:
            progress(done, len(cohort.modules), targets[-1].name)
    extras, roles = average_extras(cohort), extra_roles(cohort)
    shares = dict(zip(cohort.names, cohort.weights.tolist(), strict=True))
    return [
        Aggregation(
            Adapter(
                {name: layer for name, (layer, _) in found[label].items()},
                {name: tensor for name, tensor in extras.items() if name in client.extras},
                client.config,
                roles,
            ),
            None,
            Report(method, shares, {name: report for name, (_, report) in found[label].items()}, screening),
        )
        for label, client in clients.items()
    ]


def _ranks(clients: Mapping[str, Adapter], target: Target) -> dict[str, int]:
    """Every client that has the target's module -> its rank there, at least 1; read for those without a part in it."""
    name, known = target.name, dict(zip(target.clients, target.ranks, strict=True))
    return {
        label: max(known[label] if label in known else read_layer(client, name, label).rank, 1)
        for label, client in clients.items()
        if name in client.modules
    }
