"""What must not change the aggregate of any kind: the order of the clients, their splitting, zero rank, their gauge."""

from dataclasses import replace

import pytest
import torch

from fedgram import flora_na
from fedgram.bindings.matching import match_adapters
from fedgram.bindings.peft import load_adapters
from fedgram.flora_na import Adapter, LoraLayer
from fedgram_testing.peft_adapters import quietly
from fedgram_testing.peft_kinds import KINDS, write_kind

RANKS, ALPHAS, WEIGHTS = (3, 2, 4), (5, 3, 4), [1.0, 2.0, 5.0]
RHO = 1e-3
"""als stops once a sweep lowers its squared error by less than 1e-6 of it, in all modules of equal ranks at once. From
another start, or in other company, it ends elsewhere within that: at a rate q of its sweeps of up to 0.99, the squared
error is 1e-6 q / (1 - q) = 1e-4 above the optimum, and the product a few hundredths of the error away from it."""
PRODUCT = {"fedavg": 1e-4, "flora-na": 1e-4, "als": 2e-2, "svd": 1e-4, "stack": 1e-4}


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """kind -> three clients of different ranks and scalings, read from what PEFT wrote into memory."""
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp("kind")
            for i, (r, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
                write_kind(KINDS[name], root / f"c{i}", r=r, lora_alpha=alpha, seed=i)
            read = quietly(load_adapters, [root / f"c{i}" for i in range(3)], **KINDS[name].reading)
            made[name] = [replace(a, modules=dict(a.modules.items()), extras=dict(a.extras.items())) for a in read]
        return made[name]

    return make


def mapped(adapter, change):
    """The adapter with every layer's (A, B) changed."""
    layers = {}
    for name, layer in adapter.modules.items():
        A, B = change(layer.A.double(), layer.B.double())
        layers[name] = LoraLayer(A=A.float(), B=B.float(), scaling=layer.scaling)
    return replace(adapter, modules=layers)


def rotated(A, B):
    Q, _ = torch.linalg.qr(torch.randn(len(A), len(A), dtype=A.dtype, generator=torch.Generator().manual_seed(len(A))))
    return Q.T @ A, B @ Q


def run(adapters, weights, method, rank=None) -> Adapter:
    return flora_na.aggregate(adapters, weights, method=method, rank=rank).adapter


def assert_same(found: Adapter, expected: Adapter, tolerance=1e-4):
    """The same products relative to their size (float32 factors, solves in float64), and the same full tensors."""
    assert set(found.modules) == set(expected.modules)
    for name, layer in expected.modules.items():
        one, other = layer.delta().double(), found.modules[name].delta().double()
        assert float((one - other).norm()) <= tolerance * float(one.norm()), name
    assert set(found.extras) == set(expected.extras)
    for key, tensor in expected.extras.items():
        torch.testing.assert_close(found.extras[key], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", flora_na.METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_one_client_order_splitting_and_zero_rank_change_nothing(clients, name, method):
    a, b, c = clients(name)
    tolerance = PRODUCT[method]
    assert_same(run([a], [0.7], method), mapped_to_one(a))
    expected = run([a, b, c], WEIGHTS, method)
    assert_same(run([c, a, b], [5.0, 1.0, 2.0], method), expected, tolerance)
    assert_same(run([a, b, c, b], [1.0, 1.0, 5.0, 1.0], method), expected, tolerance)
    rank = None if method == "stack" else 2  # by default the result's rank is that of the widest client
    wide = mapped(b, lambda A, B: (torch.nn.functional.pad(A, (0, 0, 0, 1)), torch.nn.functional.pad(B, (0, 1))))
    assert_same(run([a, wide, c], WEIGHTS, method, rank), run([a, b, c], WEIGHTS, method, rank), tolerance)


def mapped_to_one(adapter):
    return replace(adapter, modules={n: replace(x, B=x.B * x.scaling, scaling=1.0) for n, x in adapter.modules.items()})


CHANGES = {"rescaled": lambda A, B: (A / 30, 30 * B), "rotated": rotated}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_the_gauge_of_a_client_does_not_matter_to_als_and_svd(clients, name, change):
    a, b, c = clients(name)
    other = mapped(b, CHANGES[change])
    for method in ("als", "svd"):
        before = flora_na.aggregate([a, b, c], WEIGHTS, method=method)
        after = flora_na.aggregate([a, other, c], WEIGHTS, method=method)
        assert after.report.rho == pytest.approx(before.report.rho, rel=RHO, abs=1e-6)
        if method == "svd":
            assert_same(after.adapter, before.adapter)


@pytest.mark.parametrize(("method", "change", "matters"), [
    ("fedavg", "rescaled", True), ("fedavg", "rotated", True), ("flora-na", "rotated", True),
    ("flora-na", "rescaled", False),
])  # fmt: skip
def test_averages_of_factors_depend_on_the_gauge(clients, method, change, matters):
    """The scalars of flora-na take up a rescaling; a rotation they cannot."""
    a, b, c = clients("experts")
    before, after = (
        flora_na.aggregate([a, x, c], WEIGHTS, method=method).report.rho for x in (b, mapped(b, CHANGES[change]))
    )
    assert (abs(after - before) > 1e-3) is matters


@pytest.mark.parametrize("name", ["embedding", "convolutions", "experts", "lora_bias", "tied embedding"])
def test_inspection_and_matching_take_every_kind(clients, name):
    adapters = clients(name)
    found = flora_na.inspect(adapters, WEIGHTS)
    assert set(found.modules) == set(adapters[0].modules)
    norms = [sum(float(x.delta().double().square().sum()) for x in a.modules.values()) ** 0.5 for a in adapters]
    assert found.client_norms.tolist() == pytest.approx(norms, rel=1e-5)
    matched = match_adapters(adapters, WEIGHTS, c=0.4, method="stack")
    for layer, result in matched.adapter.modules.items():
        parts = zip(matched.dual.coefficients.tolist(), adapters, strict=True)
        expected = sum(v * a.modules[layer].delta().double() for v, a in parts)
        torch.testing.assert_close(result.delta().double(), expected, rtol=1e-4, atol=1e-5)
    for key in (key for key, role in adapters[0].roles.items() if role == "update"):
        parts = zip(matched.dual.coefficients.tolist(), adapters, strict=True)
        torch.testing.assert_close(matched.adapter.extras[key], sum(v * a.extras[key] for v, a in parts))
