"""Spatial matching of LoRA updates in weight space against stamp.match on the dense updates."""

from dataclasses import replace

import pytest
import torch

from fedgram import flora_na, stamp
from fedgram.bindings.matching import match_adapters
from fedgram.flora_na import Adapter, LoraLayer
from fedgram_testing.factors import clients

SHAPES = {"q": (20, 30), "v": (12, 30)}


def cohort(count=5, spread=0.8, scaling=2.0):
    modules = [{} for _ in range(count)]
    for i, (name, (m, n)) in enumerate(SHAPES.items()):
        B, A = clients([2, 3, 2, 4, 3][:count], m, n, common=0.2, spread=spread, seed=i)
        for u in range(count):
            modules[u][name] = LoraLayer(A=A[u], B=B[u], scaling=scaling)
    return [Adapter(m, {"head": torch.full((2,), float(u))}) for u, m in enumerate(modules)]


def dense(adapter):
    return [layer.scaling * layer.B.double() @ layer.A.double() for layer in adapter.modules.values()]


@pytest.mark.parametrize("weights", [None, [5.0, 1.0, 1.0, 2.0, 1.0]])
def test_the_matched_combination_is_that_of_the_dense_updates(weights):
    adapters = cohort()
    expected = stamp.match([dense(a) for a in adapters], weights, c=0.4, rescale="mean")
    found = match_adapters(adapters, weights, c=0.4, method="stack")
    assert torch.allclose(found.dual.coefficients, expected.coefficients, atol=1e-8)
    assert found.dual.relative_gap < 1e-9
    for W, layer in zip(expected.direction, found.adapter.modules.values(), strict=True):
        assert float((W - layer.delta().double()).norm()) < 1e-5 * float(W.norm())


def test_the_estimate_is_the_best_pair_of_the_combination():
    adapters = cohort()
    exact = match_adapters(adapters, c=0.4, method="stack")
    found = match_adapters(adapters, c=0.4, method="svd", rank=3, residual=True)
    for name, layer in found.adapter.modules.items():
        W = exact.adapter.modules[name].delta().double()
        rho = float((W - layer.delta().double()).norm() / W.norm())
        assert rho == pytest.approx(found.report.modules[name].rho, rel=1e-3)
        whole = layer.delta().double() + found.residual.modules[name].delta().double()
        assert float((W - whole).norm()) < 1e-5 * float(W.norm())


@pytest.mark.parametrize("rescale", ["mean", False])
def test_the_report_has_the_norms_of_the_combination(rescale):
    adapters = cohort()
    found = match_adapters(adapters, c=0.5, rescale=rescale, method="stack")
    v = found.dual.coefficients.tolist()
    combined = [
        sum(x * W for x, W in zip(v, column, strict=True)) for column in zip(*map(dense, adapters), strict=True)
    ]
    for (name, report), W in zip(found.report.modules.items(), combined, strict=True):
        assert report.norm == pytest.approx(float(W.norm()), rel=1e-5)
        assert report.rho_optimal == pytest.approx(0.0, abs=1e-5), name
    assert sum(found.report.clients.values()) == pytest.approx(1.0)


def test_without_strength_it_is_plain_aggregation():
    adapters, weights = cohort(), [1.0, 2.0, 3.0, 4.0, 5.0]
    plain = flora_na.aggregate(adapters, weights, method="svd")
    found = match_adapters(adapters, weights, c=0.0, rescale=False, method="svd")
    for name, layer in found.adapter.modules.items():
        assert torch.allclose(layer.delta(), plain.adapter.modules[name].delta(), atol=1e-4)
    assert torch.equal(found.adapter.extras["head"], plain.adapter.extras["head"])


def test_agreeing_clients_give_their_mean():
    [one] = cohort(1)
    found = match_adapters([one, one, one], c=0.3, method="svd")
    for name, layer in found.adapter.modules.items():
        assert torch.allclose(layer.delta(), one.modules[name].delta(), atol=1e-4)


def test_a_negative_coefficient_is_carried_by_the_scaling(monkeypatch):
    adapters = cohort(3)
    v = torch.tensor([0.7, -0.2, 0.5], dtype=torch.float64)
    solved = stamp.solve_dual(flora_na.client_gramian(adapters), 0.3)
    monkeypatch.setattr(stamp, "solve_dual", lambda *_, **__: replace(solved, coefficients=v))
    found = match_adapters(adapters, method="stack")
    updates = [dense(a) for a in adapters]
    for i, layer in enumerate(found.adapter.modules.values()):
        W = sum(x * u[i] for x, u in zip(v, updates, strict=True))
        assert float((W - layer.delta().double()).norm()) < 1e-5 * float(W.norm())


def test_missing_modules_count_as_zero_updates_or_are_refused():
    adapters = cohort()
    adapters[2] = Adapter({"q": adapters[2].modules["q"]}, adapters[2].extras)
    updates = [dense(a) for a in adapters]
    updates[2].append(torch.zeros(12, 30, dtype=torch.float64))
    expected = stamp.match(updates, c=0.4, rescale="mean")
    found = match_adapters(adapters, c=0.4, method="stack")
    assert torch.allclose(found.dual.coefficients, expected.coefficients, atol=1e-8)
    with pytest.raises(ValueError, match="v: client 2 has no such module"):
        match_adapters(adapters, missing="error")
    with pytest.raises(ValueError, match="expected 'zero' or 'error'"):
        match_adapters(adapters, missing="renormalize")
