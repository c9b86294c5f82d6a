"""Aggregation over plain state dicts, for any server loop: ``dict[str, Tensor]`` in, ``dict[str, Tensor]`` out.

``aggregate_state_dicts`` is FLoRA-NA on the clients' adapters, ``match_state_dicts`` is STAMP's spatial matching on
whole states. Neither keeps anything between rounds; ``fedgram.bindings.modules`` has thin modules that do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TypeVar

import torch
from torch import Tensor

from fedgram import stamp
from fedgram.flora_na import Report
from fedgram.flora_na.aggregation import aggregate_cohort
from fedgram.flora_na.cohort import client_labels, make_cohort
from fedgram.flora_na.inner_products import screen_cohort
from fedgram.flora_na.weights import normalise_weights
from fedgram.kernels import FLOATS
from fedgram.stamp import Dual, Gramian
from fedgram.stamp.structure import finite

from ._plain.adapters import Numbers, Settings, read_states
from ._plain.sent import measured, named_state, residuals, sent_layers

__all__ = ["StateDictAggregation", "StateDictMatch", "aggregate_state_dicts", "match_state_dicts"]

StateDict = Mapping[str, Tensor]
Sent = Mapping[str, Tensor | None]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class StateDictAggregation:
    """The global adapter of one round.

    Attributes:
        state_dict: name -> tensor, with the names that the first client with a module used, wrappers' prefixes
            included; dtypes and devices as they came. Load it with ``set_peft_model_state_dict`` or
            ``load_state_dict(strict=False)``.
        report: rho of the aggregate, of the averaged factors and of the optimum, module by module and in all;
            ``report.to_dict()`` is JSON-ready.
        scalings: module, as PEFT's patterns see it -> factor by which the pair is to be multiplied,
            ``scalings[m] * B @ A``: the clients' own.
        residual: what the pair leaves out, a state dict of the same form and scalings, or None.
    """

    state_dict: dict[str, Tensor]
    report: Report
    scalings: dict[str, float]
    residual: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class StateDictMatch:
    """The global state of one round.

    Attributes:
        state_dict: name -> tensor, in the names, order and dtypes of the server's state.
        dual: the matching over the clients that took part, with its certificate (``dual.gap``, ``dual.status``).
        gramian: the inner products of their deltas.
        clients: positions of the clients that took part.
    """

    state_dict: dict[str, Tensor]
    dual: Dual
    gramian: Gramian
    clients: tuple[int, ...]


@torch.no_grad()
def aggregate_state_dicts(
    state_dicts: Iterable[StateDict],
    weights: Sequence[float] | Tensor | None = None,
    *,
    lora_alpha: Numbers = None,
    scalings: Numbers = None,
    config: Settings = None,
    output_scaling: float | Mapping[str, float] | None = None,
    method: str = "als",
    rank: int | str | None = None,
    shared: bool = False,
    anchor: StateDict | None = None,
    align_to: StateDict | None = None,
    missing: str = "error",
    clip: float | str | None = None,
    min_cosine: float | None = None,
    residual: bool = False,
    backend: str = "auto",
    names: Sequence[str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> StateDictAggregation:
    """Aggregate the clients' LoRA state dicts into one (FLoRA-NA, arXiv:2509.26399).

    Names are those of PEFT, with or without ``base_model.model.`` in front (and ``module.`` or ``_orig_mod.`` before
    it, of DistributedDataParallel and torch.compile), as ``x.lora_A.weight`` or ``x.lora_A.default.weight``;
    embeddings (``x.lora_embedding_A``), convolutions, and ``x.lora_A``, ``x.lora_a.weight`` of other libraries are
    read, too. Every other floating-point tensor in the state dicts (a classifier, biases) is averaged by weight.

    The clients' scalings (``alpha / r``) are told by at most one of ``lora_alpha``, ``scalings`` and ``config``. With
    none of them the clients are taken to share one, whatever it is: the result is then to be used with it. That needs
    equal ranks, and is refused where they differ. Of LoRA on experts (``target_parameters``) the names alone do not
    tell: only with ``config`` is it refused.

    Args:
        state_dicts: one per client: ``get_peft_model_state_dict(model)``, or any mapping as above. Read in place.
        weights: one per client (its sample count); uniform by default. Clients of weight 0 take no part.
        lora_alpha: one number for all clients or one per client; the scaling of a layer is ``lora_alpha / r``.
        scalings: one number for all clients or one per client.
        config: a ``peft.LoraConfig`` or the mapping in ``adapter_config.json``; one for all or one per client.
            rsLoRA and the rank and alpha patterns are heeded; kinds whose update is not ``B @ A`` are refused.
        output_scaling: what the receivers will multiply by, one number or module -> number. By default the scaling
            that the clients share; where theirs differ it must be given, and where ``anchor`` or ``align_to`` has a
            higher rank than they, at which ``lora_alpha`` or ``config`` would make it another.
        method, rank, shared, missing, clip, min_cosine, backend: as in ``flora_na.aggregate``. A ``rank`` other than
            the clients' gives factors of that rank: receivers need a configuration with it, and ``scalings``.
        anchor: the previous round's ``state_dict``; see ``flora_na.aggregate``. Its scaling is the output's. Where it
            is of a wider dtype than the clients', the factors come back in that.
        align_to: an earlier ``state_dict`` to rotate the result towards (als and svd only). Its rank is that of the
            result where it is above the clients', unless ``rank`` is a number.
        residual: also return what the pair leaves out (rank R + r, float32 or wider).
        names: the clients' labels in errors and in the report.
        dtypes: name -> dtype that the entry is to be returned in; by default the one that the clients' (and, of
            factors, the anchor's) promote to.

    Returns:
        The global state dict, with its report, whose rho is that of the state dict as it is returned. bfloat16 comes
        back as bfloat16; everything is computed in float32 or wider and rounded at the end (with ``shared``, ``clip``
        or ``min_cosine`` once more in modules whose scaling is not that of the first one; with ``dtypes`` of fewer
        bits than the clients' once more, too).

    Raises:
        ValueError: names the client, module or argument: scalings that cannot be known, other kinds of adapter
            (DoRA, lora_bias, ...), tensors that are not finite or do not fit, and whatever ``flora_na.aggregate``
            refuses.
    """
    states = _each_client(state_dicts, "state_dicts")
    labels = client_labels(names, len(states))
    shares = normalise_weights(weights, len(states), labels)
    took_part = (shares > 0).tolist()
    spans_modules = shared or clip is not None or min_cosine is not None
    clients = read_states(states, labels, took_part, lora_alpha, scalings, config, output_scaling, spans_modules)
    cohort = make_cohort(clients.adapters, shares[shares > 0], names=list(compress(labels, took_part)), missing=missing)
    cohort, screening = screen_cohort(cohort, clients.clip(clip), min_cosine, backend)
    result = aggregate_cohort(
        cohort,
        screening,
        method=method,
        rank=rank,
        shared=shared,
        anchor=None if anchor is None else clients.earlier(anchor, "anchor", rank),
        align_to=None if align_to is None else clients.earlier(align_to, "align_to", rank),
        backend=backend,
    )
    dtypes = {} if dtypes is None else dtypes
    sent = sent_layers(clients, result.adapter, dtypes)
    report = clients.report(measured(result.report, cohort, result.adapter, sent))
    rest = named_state(clients, sent_layers(clients, residuals(cohort, sent), {}), {}, {}) if residual else None
    return StateDictAggregation(
        named_state(clients, sent, result.adapter.extras, dtypes), report, dict(clients.scalings), rest
    )


def match_state_dicts(
    server_state: StateDict,
    client_states: Iterable[Sent],
    counts: Sequence[float] | Tensor | None = None,
    *,
    c: float = 0.25,
    lr: float = 1.0,
    rescale: bool | str = "mean",
    deltas: bool = False,
    precise: bool = True,
    backend: str = "auto",
    names: Sequence[str] | None = None,
) -> StateDictMatch:
    """Move the server's state along the matched direction of the clients' deltas (STAMP, arXiv:2506.12031).

    The direction helps the worst-off client most, within ``c`` times the mean step of the mean step. Statistics of
    normalisation layers, integers and bools become the clients' weighted mean (see ``stamp.SpatialMatcher``).

    Args:
        server_state: name -> tensor, what the clients started from; not written to.
        client_states: one per client that answered, with the same names and shapes. Their dtypes may differ from the
            server's: what is wider of the two is computed with, and the result has the server's.
        counts: numbers of samples, one per client; equal by default. A client of count 0 takes no part.
        c: strength of the matching in [0, 1); 0 is federated averaging.
        lr: the server's learning rate.
        rescale, precise, backend: as in ``stamp.match``.
        deltas: the clients sent ``their state - server state``, or None for an entry that did not change.
        names: the clients' labels in errors.

    Returns:
        The new state, with its certificate.

    Raises:
        ValueError: as ``stamp.SpatialMatcher``; the message names the client and the entry.
    """
    sent = _each_client(client_states, "client_states")
    labels = client_labels(names, len(sent))
    dtypes = _common_dtypes(server_state, sent)
    matcher = stamp.SpatialMatcher(
        _cast(server_state, dtypes), c=c, lr=lr, rescale=rescale, precise=precise, backend=backend
    )
    take_step = matcher.step_deltas if deltas else matcher.step
    step = take_step([_cast(state, dtypes) for state in sent], counts, names=labels)
    state = {name: step.state[name].to(tensor.dtype) for name, tensor in server_state.items()}
    for name, tensor in state.items():  # the step is finite, in the wider dtype it was made in
        if not finite([tensor]):
            raise ValueError(f"server_state: {name!r} would exceed the range of its {tensor.dtype}")
    return StateDictMatch(state, step.dual, step.gramian, step.clients)


def _each_client(states: Iterable[T], argument: str) -> list[T]:
    """The clients' states as a list; what is one state, or nothing to iterate over, is refused by ``argument``."""
    if isinstance(states, Mapping | Tensor | str) or not isinstance(states, Iterable):
        raise ValueError(f"{argument}: expected one state dict per client, got one {type(states).__name__}")
    return list(states)


def _common_dtypes(server: StateDict, clients: Sequence[Sent]) -> dict[str, torch.dtype]:
    """Per floating-point entry the widest dtype among server and clients; what does not fit is left to the matcher."""
    dtypes: dict[str, torch.dtype] = {}
    for state in (server, *clients):
        for name, tensor in state.items() if isinstance(state, Mapping) else ():
            if isinstance(tensor, Tensor) and tensor.dtype in FLOATS:
                dtypes[name] = torch.promote_types(dtypes.get(name, tensor.dtype), tensor.dtype)
    return dtypes


def _cast(state: Sent, dtypes: Mapping[str, torch.dtype]) -> Sent:
    """The state with its floating-point entries in ``dtypes``; an entry that has it already is not copied."""
    if not isinstance(state, Mapping):
        return state
    return {
        name: tensor.detach().to(dtypes[name]) if isinstance(tensor, Tensor) and tensor.dtype in FLOATS else tensor
        for name, tensor in state.items()
    }
