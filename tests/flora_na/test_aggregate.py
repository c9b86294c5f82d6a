"""Whole adapters: reports, extras, residuals, missing modules, lazy mappings, scope."""

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch

from fedgram import flora_na, kernels
from fedgram.flora_na import Adapter, LoraLayer, ScalarLeastSquares
from fedgram.flora_na._compiled import SOLVER
from fedgram_testing.cohorts import SHAPES, cohort
from fedgram_testing.factors import clients, dense_target


@pytest.mark.parametrize("method", flora_na.METHODS)
def test_every_module_is_estimated_and_reported(method):
    adapters = cohort(ranks=[3, 2, 4, 3])
    result = flora_na.aggregate(adapters, [1, 2, 3, 4], method=method)
    errors, energies = 0.0, 0.0
    for name in SHAPES:
        W, layer = dense_target(adapters, name, [1, 2, 3, 4]), result.adapter.modules[name]
        assert layer.scaling == 1.0
        error = float((W - layer.B.double() @ layer.A.double()).norm())
        report = result.report.modules[name]
        assert report.rho == pytest.approx(error / float(W.norm()), rel=5e-4)
        assert report.norm == pytest.approx(float(W.norm()))
        assert report.rank == layer.rank
        errors, energies = errors + error**2, energies + float(W.norm()) ** 2
    assert result.report.rho == pytest.approx(math.sqrt(errors / energies), rel=5e-4)
    written = json.loads(json.dumps(result.report.to_dict()))
    assert written["rho"] == result.report.rho
    assert list(written["modules"]) == list(SHAPES)
    assert written["clients"]["client 3"] == pytest.approx(0.4)


def test_a_mapping_will_do_and_order_of_modules_is_kept():
    adapters = [a.modules for a in cohort()]
    assert list(flora_na.aggregate(adapters).adapter.modules) == list(SHAPES)


def test_extras_are_averaged_by_weight_never_dropped():
    result = flora_na.aggregate(cohort(), [0.0, 1.0, 1.0, 2.0])
    assert torch.equal(result.adapter.extras["classifier.weight"], torch.full((2, 3), 2.25))
    assert result.adapter.config == {"r": 3}


def test_residual_makes_any_method_exact():
    adapters = cohort()
    result = flora_na.aggregate(adapters, method="fedavg", residual=True)
    for name in SHAPES:
        W = dense_target(adapters, name)
        whole = result.adapter.modules[name].delta().double() + result.residual.modules[name].delta().double()
        assert float((W - whole).norm()) < 1e-5 * float(W.norm())
    assert flora_na.aggregate(adapters).residual is None


def test_missing_modules_follow_the_policy():
    adapters = cohort()
    lacking = Adapter({k: v for k, v in adapters[1].modules.items() if k != "layer.0.value"}, adapters[1].extras)
    adapters[1] = lacking
    with pytest.raises(ValueError, match=r"layer.0.value: client 1 has no such module, 3 other"):
        flora_na.aggregate(adapters)
    present = [adapters[u] for u in (0, 2, 3)]
    for policy, factor in (("renormalize", 1.0), ("zero", 0.75)):
        layer = flora_na.aggregate(adapters, method="stack", missing=policy).adapter.modules["layer.0.value"]
        W = factor * dense_target(present, "layer.0.value")
        assert float((W - layer.delta().double()).norm()) < 1e-5 * float(W.norm())
    with pytest.raises(ValueError, match="expected one of error, renormalize, zero"):
        flora_na.aggregate(adapters, missing="skip")
    with pytest.raises(ValueError, match="shared: needs every module"):
        flora_na.aggregate(adapters, method="flora-na", shared=True, missing="zero")


def test_shared_scope_uses_one_pair_for_all_modules():
    adapters = cohort(6)
    shared = flora_na.aggregate(adapters, [9, 1, 1, 1, 1, 1], method="flora-na", shared=True)
    own = flora_na.aggregate(adapters, [9, 1, 1, 1, 1, 1], method="flora-na")
    fedavg = flora_na.aggregate(adapters, [9, 1, 1, 1, 1, 1], method="fedavg")
    assert own.report.rho <= shared.report.rho <= fedavg.report.rho
    coefficients = []
    for name in SHAPES:
        stack = torch.stack([a.modules[name].B.flatten() for a in adapters], 1)
        result = shared.adapter.modules[name].B.flatten().unsqueeze(1)
        coefficients.append(torch.linalg.lstsq(stack, result).solution.flatten())
    assert torch.allclose(coefficients[0], coefficients[1], atol=1e-4)
    assert torch.allclose(coefficients[0], coefficients[2], atol=1e-4)
    with pytest.raises(ValueError, match="exists for 'flora-na' only"):
        flora_na.aggregate(adapters, method="als", shared=True)


def test_shared_scope_cut_to_a_smaller_rank_is_no_worse_than_averages():
    """What is best whole is not always best cut."""
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        modules = [
            {
                f"m{i}": LoraLayer(
                    A=torch.randn(r, 5, generator=g, dtype=torch.float64),
                    B=torch.randn(6, r, generator=g, dtype=torch.float64),
                )
                for i, r in enumerate((2, 3))
            }
            for _ in range(2)
        ]
        for rank in (1, "auto:0.5"):
            options = {"method": "flora-na", "shared": True, "rank": rank}
            report = flora_na.aggregate([Adapter(m, {}) for m in modules], **options).report
            assert report.rho <= report.rho_fedavg * (1 + 1e-9)


def test_align_to_keeps_the_product_and_stays_near():
    adapters, later = cohort(), cohort(seed=0)
    first = flora_na.aggregate(adapters, method="svd")
    turned = {
        name: LoraLayer(A=-layer.A.flip(0), B=-layer.B.flip(1), scaling=1.0)
        for name, layer in first.adapter.modules.items()
    }
    again = flora_na.aggregate(later, method="svd", align_to=turned)
    for name in SHAPES:
        assert torch.allclose(again.adapter.modules[name].B, turned[name].B, atol=1e-3)


@pytest.mark.parametrize("method", ["als", "svd"])
@pytest.mark.parametrize("rank", [None, "auto:0.01"])
def test_align_to_a_higher_rank_gives_a_result_of_that_rank(method, rank):
    """A round of clients of lower ranks: as if the rank had been asked for, where the earlier one is higher."""
    adapters, name = cohort(), next(iter(SHAPES))
    earlier = dict(flora_na.aggregate(adapters, method="svd", rank=1).adapter.modules)
    earlier[name] = flora_na.aggregate(adapters, method="svd", rank=9).adapter.modules[name]
    result = flora_na.aggregate(adapters, method=method, rank=rank, align_to=earlier)
    asked = flora_na.aggregate(adapters, method=method, rank=9, align_to=earlier).adapter.modules[name]
    assert result.adapter.modules[name].rank == 9
    torch.testing.assert_close(result.adapter.modules[name].delta(), asked.delta(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.adapter.modules[name].B, asked.B, rtol=1e-3, atol=1e-4)
    plain = flora_na.aggregate(adapters, method=method, rank=rank).adapter.modules
    assert [x.rank for n, x in result.adapter.modules.items() if n != name] == [
        x.rank for n, x in plain.items() if n != name
    ]
    assert result.report.rho <= result.report.rho_optimal * (1 + 1e-3)
    with pytest.raises(ValueError, match="rank 9 is above the result's rank 8"):
        flora_na.aggregate(adapters, method=method, rank=8, align_to=earlier)


def test_anchor_must_have_every_module():
    adapters = cohort()
    with pytest.raises(ValueError, match=r"anchor: has no module layer.0.value"):
        flora_na.aggregate(adapters, method="flora-na", anchor={"layer.0.query": adapters[0].modules["layer.0.query"]})


@pytest.mark.skipif(SOLVER.missing is not None, reason=str(SOLVER.missing))
@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd"])
@pytest.mark.parametrize("kind", ["zero", "alike"])
def test_a_doubtful_module_leaves_the_others_as_they_are_alone(method, kind):
    """One module that only the general path solves: the others keep the bits, the status and the sweeps."""
    adapters = cohort(ranks=[4] * 4)
    odd = "layer.0.value"
    for adapter in adapters:
        layer, first = adapter.modules[odd], adapters[0].modules[odd]
        B, A = (torch.zeros_like(layer.B), layer.A) if kind == "zero" else (first.B.clone(), first.A.clone())
        adapter.modules[odd] = LoraLayer(A=A, B=B, scaling=2.0)
    found = flora_na.aggregate(adapters, method=method)
    for name in SHAPES:
        alone = flora_na.aggregate([{name: a.modules[name]} for a in adapters], method=method)
        layer, expected = found.adapter.modules[name], alone.adapter.modules[name]
        assert torch.equal(layer.A, expected.A)
        assert torch.equal(layer.B, expected.B)
        assert found.report.to_dict()["modules"][name] == alone.report.to_dict()["modules"][name]
    report = found.report.modules[odd]
    assert report.status == "zero-target" if kind == "zero" else report.rho < 1e-6


@pytest.mark.skipif(SOLVER.missing is not None, reason=str(SOLVER.missing))
def test_a_doubtful_module_does_not_take_the_others_off_the_compiled_path(monkeypatch):
    adapters, odd, seen = cohort(ranks=[4] * 4), "layer.0.value", []
    for adapter in adapters:
        adapter.modules[odd] = LoraLayer(A=adapter.modules[odd].A, B=torch.zeros(12, 4), scaling=2.0)
    general = ScalarLeastSquares.solve
    monkeypatch.setattr(
        ScalarLeastSquares,
        "solve",
        lambda self, groups, **o: seen.extend(t.name for g in groups for t in g.targets) or general(self, groups, **o),
    )
    flora_na.aggregate(adapters, method="flora-na")
    assert seen == [odd]


@pytest.mark.skipif(SOLVER.missing is not None, reason=str(SOLVER.missing))
def test_each_module_has_its_own_status_and_sweeps():
    B, A = clients([4] * 4, 40, 50, seed=5)
    same = [LoraLayer(A=A[0] + 0.3 * a, B=B[0] + 0.3 * b) for a, b in zip(A, B, strict=True)]
    adapters = [{"quick": s, "slow": LoraLayer(A=a, B=b)} for s, a, b in zip(same, A, B, strict=True)]
    both = flora_na.aggregate(adapters, method="flora-na").report.modules
    alone = {n: flora_na.aggregate([{n: a[n]} for a in adapters], method="flora-na").report.modules[n] for n in both}
    assert {n: (m.status, m.sweeps) for n, m in both.items()} == {n: (m.status, m.sweeps) for n, m in alone.items()}
    assert both["quick"].sweeps < both["slow"].sweeps


def test_als_of_many_modules_without_error_stops_at_rounding():
    """All clients have one A, so nothing is left to gain: of 32 modules one or another always seems to gain 1e-16."""
    adapters = [{} for _ in range(4)]
    for i in range(32):
        B, A = clients([4] * 4, 40, 50, seed=i)
        for u, adapter in enumerate(adapters):
            adapter[f"m{i}"] = LoraLayer(A=A[0], B=B[u])
    for module in flora_na.aggregate(adapters, method="als").report.modules.values():
        assert module.status == "converged"  # the sweeps run out where any gain counts
        assert module.rho < 1e-6


def test_fedavg_reads_the_factors_once(monkeypatch):
    adapters = cohort(ranks=[3, 2, 4, 3])
    expected = flora_na.aggregate(adapters, [1, 2, 3, 4], method="flora-na").report

    def read_again(*_, **__):
        raise AssertionError("the factors are read again")

    monkeypatch.setattr(kernels, "factor_combine", read_again)
    monkeypatch.setattr(kernels, "factor_gram", read_again)
    found = flora_na.aggregate(adapters, [1, 2, 3, 4], method="fedavg")
    for name in SHAPES:
        W, layer = dense_target(adapters, name, [1, 2, 3, 4]), found.adapter.modules[name]
        error = float((W - layer.B.double() @ layer.A.double()).norm() / W.norm())
        assert found.report.modules[name].rho == pytest.approx(error, rel=5e-4)
        assert found.report.modules[name].rho == pytest.approx(expected.modules[name].rho_fedavg, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(adapters=[]), "at least one client"),
        (lambda a: dict(adapters=[{}, {}]), "no client has a LoRA module"),
        (lambda a: dict(adapters=a[0].modules), "adapters: expected a sequence, one adapter per client, got a dict"),
        (lambda a: dict(adapters=["a/", "b/"]), "client 0: expected an Adapter, or a mapping .* got a str"),
        (
            lambda a: dict(adapters=[{"q.lora_A": torch.ones(1, 2)}]),
            "q.lora_A: client 0 has a Tensor there: expected a",
        ),
        (lambda a: dict(adapters=a, align_to="a/"), "align_to: expected an Adapter"),
        (lambda a: dict(adapters=a, names=["x"]), "names: expected 4"),
        (lambda a: dict(adapters=a, weights=[1, 2]), "expected 4"),
        (lambda a: dict(adapters=[a[0], Adapter(a[1].modules)]), "classifier.weight: client 1 has no such tensor"),
        (
            lambda a: dict(adapters=[a[0], Adapter(a[1].modules, {"classifier.weight": torch.ones(3)})]),
            r"client 1 has shape \(3,\)",
        ),
        (
            lambda a: dict(adapters=[a[0], Adapter(a[1].modules, {"classifier.weight": torch.ones(2, 3) / 0})]),
            "the tensor of client 1 contains NaN or Inf",
        ),
        (
            lambda a: dict(adapters=[Adapter(a[0].modules, {"w": torch.ones(3).to(torch.float8_e4m3fn)})]),
            "w: client 0 has dtype torch.float8_e4m3fn, which is not averaged",
        ),
        (lambda a: dict(adapters=[Adapter(a[0].modules, {"w": [1.0]})]), "w: client 0 has a list: expected a torch"),
        (
            lambda a: dict(adapters=[a[0], Adapter(a[1].modules, {"classifier.weight": torch.ones(2, 3).int()})]),
            "expected floating point",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        flora_na.aggregate(**change(cohort()))


def test_names_appear_in_errors():
    adapters = cohort()
    adapters[2].modules["layer.1.query"].A[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^layer.1.query: lora_A of hospital-3 contains NaN$"):
        flora_na.aggregate(adapters, names=["a", "b", "hospital-3", "d"])


def test_client_gramian_is_the_gram_of_the_dense_updates():
    adapters = cohort(ranks=[1, 2, 3, 4])
    flat = torch.stack(
        [torch.cat([(x.scaling * x.B.double() @ x.A.double()).flatten() for x in a.modules.values()]) for a in adapters]
    )
    G = flora_na.client_gramian(adapters)
    assert torch.allclose(G, flat @ flat.T, rtol=1e-10)
    w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert torch.allclose(flora_na.client_gramian(adapters, w), (flat @ flat.T) * w * w[:, None], rtol=1e-10)


def test_client_gramian_counts_a_missing_module_as_zero():
    adapters = cohort()
    adapters[0] = Adapter({"layer.0.query": adapters[0].modules["layer.0.query"]}, adapters[0].extras)
    G = flora_na.client_gramian(adapters, missing="zero")
    expected = float(
        (2 * adapters[0].modules["layer.0.query"].B.double() @ adapters[0].modules["layer.0.query"].A.double()).norm()
    )
    assert float(G[0, 0].sqrt()) == pytest.approx(expected)


def test_inspection_agrees_with_aggregation():
    adapters = cohort(5, ranks=[2, 3, 3, 3, 3])
    adapters[4] = Adapter({k: LoraLayer(A=v.A, B=-20 * v.B, scaling=v.scaling) for k, v in adapters[4].modules.items()})
    adapters = [Adapter(a.modules) for a in adapters]
    found = flora_na.inspect(adapters, [1, 2, 3, 4, 5])
    for method in ("fedavg", "flora-na", "als", "svd"):
        report = flora_na.aggregate(adapters, [1, 2, 3, 4, 5], method=method).report
        assert found.ladder[method] == pytest.approx(report.rho, rel=1e-5)
    module = found.modules["layer.0.query"]
    assert module.rank_curve[2] == pytest.approx(module.rho["svd"], rel=1e-6)
    assert module.rank_curve == sorted(module.rank_curve, reverse=True)
    assert torch.allclose(found.gramian, flora_na.client_gramian(adapters), rtol=1e-12)
    assert int(found.outlier_scores.argmax()) == 4
    assert float(found.outlier_scores[4]) > 3
    assert float(found.cosines_to_mean[4]) > 0 > float(found.cosines_to_mean[0])
    assert torch.allclose(found.cosines, found.cosines.mT)
    assert torch.allclose(found.cosines.diagonal(), torch.ones(5, dtype=torch.float64))
    json.dumps(found.to_dict())


class Merging(dict):
    """A configuration that allows one rank, and adds up what it is given."""

    def merged(self, configs, names):
        for config, name in zip(configs, names, strict=True):
            if config is not None and config["r"] != self["r"]:
                raise ValueError(f"{name}: rank {config['r']} is not {self['r']}")
        return {"of": sum(config is not None for config in configs)}


def test_configurations_that_can_are_checked_and_merged():
    given = [replace(a, config=c) for a, c in zip(cohort(), (None, Merging(r=3), {"r": 3}, {"r": 9}), strict=True)]
    for weights in ([1, 1, 1, 0], [0, 1, 1, 0]):  # clients without weight do not count
        result = flora_na.aggregate(given, weights, residual=True)
        assert result.adapter.config == result.residual.config == {"of": 2}
        assert [part.adapter.config for part in flora_na.iter_aggregate(given, weights)] == [{"of": 2}]
    for run in (flora_na.aggregate, flora_na.inspect, flora_na.client_gramian, flora_na.aggregate_for_clients):
        with pytest.raises(ValueError, match="d: rank 9 is not 3"):
            run(given, names="abcd")


@pytest.mark.parametrize("configs", [(None, {"r": 2}, None, None), ({"r": 3}, {"r": 2}, None, None)])
def test_of_plain_configurations_the_first_clients_is_the_results(configs):
    given = [replace(a, config=config) for a, config in zip(cohort(), configs, strict=True)]
    assert flora_na.aggregate(given).adapter.config == configs[0]


def test_equal_names_are_numbered():
    adapters = cohort(5)
    report = flora_na.aggregate(adapters, names=["a", "a", "b", "a (2)", "a"]).report
    assert list(report.clients) == ["a", "a (3)", "b", "a (2)", "a (4)"]
    assert len(flora_na.inspect(adapters, names=["a"] * 5).to_dict()["clients"]) == 5


def test_an_aggregation_can_be_pickled_and_copied():
    result = flora_na.aggregate(cohort(), method="fedavg", clip="2x", residual=True)
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert again.report.to_dict() == result.report.to_dict()
        for name, layer in result.adapter.modules.items():
            assert torch.equal(again.adapter.modules[name].B, layer.B)
