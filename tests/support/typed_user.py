"""What a typed codebase writes against the public API: read by mypy (``make types``), never run.

``assert_type`` also fails on Any, which is what an untyped package would give.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

from fedgram import flora_na, kernels, stamp
from fedgram.bindings import peft
from fedgram.bindings.plain import aggregate_state_dicts, match_state_dicts


def modules(B: list[Tensor], A: list[Tensor]) -> Tensor:
    """One module, and many at once."""
    e = flora_na.estimate(B, A, [3.0, 1.0], method="svd", rank=4)
    assert_type(e, flora_na.Estimate)
    assert_type(e.rho, float)
    assert_type(e.rho_optimal, float)
    assert_type(e.residual(), tuple[Tensor, Tensor])
    many = flora_na.estimate_modules([B], [A], torch.ones(len(B)), method="als")
    assert_type(many.rho, Tensor)
    flora_na.estimate(B, A, method=4)  # type: ignore[arg-type]
    return e.B @ e.A


def adapters(folders: Sequence[Path], out: Path) -> float:
    """PEFT's directories."""
    clients = [peft.load_adapter(folder) for folder in folders]
    assert_type(clients, list[flora_na.Adapter])
    result = flora_na.aggregate(clients, [120, 80], method="als", rank="auto:0.9", residual=True)
    assert_type(result, flora_na.Aggregation)
    assert_type(result.report.rho, float)
    for name, layer in result.adapter.modules.items():
        assert_type(name, str)
        assert_type(layer.B, Tensor)
        assert_type(result.report.modules[name].rho_fedavg, float)
    peft.save_adapter(result.adapter, out)
    peft.save_adapter(result, out)  # type: ignore[arg-type]
    return result.report.rho


def plain(clients: list[dict[str, Tensor]], server: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dicts, of adapters and of models."""
    found = aggregate_state_dicts(clients, weights=[1, 2], lora_alpha=16)
    assert_type(found.state_dict, dict[str, Tensor])
    assert_type(found.residual, dict[str, Tensor] | None)
    matched = match_state_dicts(server, clients, counts=torch.tensor([1, 2]), c=0.25)
    assert_type(matched.clients, tuple[int, ...])
    return matched.state_dict


def matching(gradients: list[list[Tensor]], models: list[nn.Module]) -> Tensor:
    """Gradients as lists, and those that models hold."""
    m = stamp.match(gradients, weights=[3, 1, 1], c=0.25, rescale="mean")
    assert_type(m, stamp.Match)
    assert_type(m.coefficients, Tensor)
    assert_type(m.relative_gap, float)
    stamp.match_(models[0], models)
    stamp.match(gradients, c="strong")  # type: ignore[arg-type]
    return kernels.grad_gram(gradients).H


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of a batch."""
    X, y = batch
    return nn.functional.cross_entropy(model(X), y)


def training(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> int:
    """A client that keeps prototypes."""
    memory = stamp.PrototypeMemory(capacity=200)
    matcher = stamp.TemporalMatcher(model, loss, memory, c=0.5)
    for X, y in batches:
        assert_type(matcher.step((X, y)), stamp.TemporalStep)
        memory.update(X, y, task=3)
    assert_type(memory.task(3), tuple[Tensor, Tensor])
    server = stamp.SpatialMatcher(model.state_dict(), c=0.25)
    assert_type(server.step([model.state_dict()], [100]), stamp.SpatialStep)
    return memory.nbytes
