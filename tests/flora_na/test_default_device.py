"""A default device of torch other than that of the factors changes nothing: every tensor is made where it belongs."""

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import METHODS, Adapter, LoraLayer, target
from fedgram.flora_na import group as groups
from fedgram.flora_na._compiled import SOLVER
from fedgram.flora_na.members import members_of_rows
from fedgram_testing.factors import clients

RANKS = [2, 3, 4]


def cohort():
    """One module for the compiled solvers, one that is zero, hence for the general path."""
    B, A = clients(RANKS, 16, 20, seed=3)
    extras = {"head": torch.ones(3), "steps": torch.ones(2, dtype=torch.int64)}
    return [
        Adapter({"q": LoraLayer(A=a, B=b, scaling=2.0), "v": LoraLayer(A=a, B=0 * b)}, extras)
        for a, b in zip(A, B, strict=True)
    ]


def everything(adapters):
    """What depends on any tensor that the room makes by itself."""

    def modules(result):
        return {name: (layer.B, layer.A) for name, layer in result.adapter.modules.items()}

    found = [modules(flora_na.aggregate(adapters, [1, 2, 3], method=method)) for method in METHODS]
    found += [modules(flora_na.aggregate(adapters, method=method, rank=6)) for method in METHODS[:-1]]
    for options in ({"rank": "auto:0.9"}, {"align_to": adapters[0], "rank": 4}, {"clip": "1x", "min_cosine": -1.0}):
        found.append(modules(flora_na.aggregate(adapters, **options)))
    for options in ({"shared": True}, {"anchor": adapters[0]}):
        found.append(modules(flora_na.aggregate(adapters, method="flora-na", **options)))
    found += [modules(result) for result in flora_na.aggregate_for_clients(adapters)]
    found += [modules(part) for part in flora_na.iter_aggregate(adapters)]
    found.append(flora_na.client_gramian(adapters, [1, 2, 3]))
    found.append(repr(flora_na.inspect(adapters).to_dict()))
    B, A = ([[getattr(a.modules["q"], side) for a in adapters]] for side in "BA")
    found.append(flora_na.estimate_modules(B, A, [1, 2, 3]))
    return torch.utils._pytree.tree_leaves(found)


@pytest.mark.parametrize("path", ["compiled", "general", "implicit"])
def test_the_default_device_is_not_looked_at(path, monkeypatch):
    if path != "compiled":
        monkeypatch.setattr(SOLVER, "missing", "not wanted")
    if path == "implicit":
        monkeypatch.setattr(groups, "GRAM_RANK_LIMIT", 0)
    adapters = cohort()
    expected = everything(adapters)
    remembered = members_of_rows, target._vector
    for cache in remembered:
        cache.cache_clear()
    torch.set_default_device("meta")
    try:
        found = everything(adapters)
    finally:
        torch.set_default_device(None)
        for cache in remembered:
            cache.cache_clear()
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
