"""What is sent to the receivers: an aggregate under the clients' names, in its last dtypes, and the rho that it has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedgram.flora_na import Adapter, LoraLayer, Report
from fedgram.flora_na.cohort import Cohort
from fedgram.flora_na.divergence import measured_errors
from fedgram.flora_na.grouping import make_groups
from fedgram.flora_na.stack import residual_factors
from fedgram.flora_na.target import Target
from fedgram.stamp.structure import finite

from .adapters import StateDictClients
from .keys import restored

Dtypes = Mapping[str, torch.dtype]


def as_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in ``dtype``, to the nearest whole number where that is one of integers.

    Raises:
        ValueError: a number that is finite no longer is; the message begins with ``name``.
    """
    whole = tensor.is_floating_point() and not dtype.is_floating_point
    result = (tensor.round() if whole else tensor).to(dtype)
    if dtype.is_floating_point and not finite([result]) and finite([tensor]):
        raise ValueError(f"{name}: the new value exceeds {torch.finfo(dtype).max:.5g}, the largest number of {dtype}")
    return result


def sent_layers(clients: StateDictClients, adapter: Adapter, dtypes: Dtypes) -> dict[str, LoraLayer]:
    """The pairs that the receivers multiply by the output's scalings; ``scaling`` is that one in the module's unit.

    Raises:
        ValueError: names the factor that its dtype cannot hold.
    """
    sent = {}
    for module, layer in adapter.modules.items():
        scaling, keys = clients.relative(module), clients.layout[module]
        root = abs(scaling) ** -0.5
        A = _sent(layer.A, root, keys["A"].key, dtypes)
        B = _sent(layer.B, math.copysign(root, scaling), keys["B"].key, dtypes)
        sent[module] = LoraLayer(A=A, B=B, scaling=scaling)
    return sent


def named_state(
    clients: StateDictClients, layers: Mapping[str, LoraLayer], extras: Mapping[str, Tensor], dtypes: Dtypes
) -> dict[str, Tensor]:
    """The state dict of layers and extras, under the names that the clients used."""
    state = {}
    for module, layer in layers.items():
        keys = clients.layout[module]
        state[keys["A"].key] = restored(layer.A, keys["A"])
        state[keys["B"].key] = restored(layer.B, keys["B"])
    for name, tensor in extras.items():
        key = clients.extras[name]
        state[key] = as_dtype(tensor, dtypes.get(key, tensor.dtype), key)
    return state


def measured(report: Report, cohort: Cohort, estimated: Adapter, sent: Mapping[str, LoraLayer]) -> Report:
    """The report with the rho of what is sent, where that is not the pair as it was estimated."""
    modules = dict(report.modules)
    for name, layer in sent.items():
        own = estimated.modules[name]
        if modules[name].norm > 0 and not (_holds(layer.A, own.A) and _holds(layer.B, own.B) and layer.scaling == 1):
            modules[name] = replace(modules[name], rho=_rho(cohort.target(name), layer))
    return replace(report, modules=modules)


def residuals(cohort: Cohort, sent: Mapping[str, LoraLayer]) -> Adapter:
    """What the pairs, as they are sent, leave out of the targets: layers of float32 or wider."""
    rests = {}
    for name, layer in sent.items():
        B = layer.B if layer.scaling == 1 else layer.B.double() * layer.scaling
        rest_B, rest_A = residual_factors(cohort.target(name), B, layer.A)
        rests[name] = LoraLayer(A=rest_A, B=rest_B)
    return Adapter(rests)


def _sent(factor: Tensor, number: float, key: str, dtypes: Dtypes) -> Tensor:
    scaled = factor if number == 1 else factor.double() * number
    return as_dtype(scaled, dtypes.get(key, factor.dtype), key)


def _holds(sent: Tensor, estimated: Tensor) -> bool:
    return torch.promote_types(sent.dtype, estimated.dtype) == sent.dtype


def _rho(target: Target, layer: LoraLayer) -> float:
    """``||dW - scaling B A|| / ||dW||`` of a given pair, in float64."""
    wide = replace(target, B=tuple(b.double() for b in target.B), A=tuple(a.double() for a in target.A))
    [(group, _)] = make_groups([wide], "auto")
    [errors] = measured_errors([group], [([layer.B.double() * layer.scaling], [layer.A.double()])])
    return errors.rho[0]
