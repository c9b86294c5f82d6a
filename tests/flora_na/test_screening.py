"""Clipping and filtering in weight space: what they define, their fixed points, and what is aggregated after them."""

import json

import numpy as np
import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import Adapter, LoraLayer
from fedgram.flora_na.screening import screen
from fedgram.flora_na.weight_space import mean_cosines, outlier_scores
from fedgram_testing.factors import clients


def adapters(count=6, scaling=2.0, seed=0, modules=2):
    """Clients around a common update, of different ranks."""
    ranks = [3 + u % 2 for u in range(count)]
    layers = [{} for _ in range(count)]
    for i in range(modules):
        B, A = clients(ranks, 14 + i, 18, spread=0.4, seed=seed + i)
        for u in range(count):
            layers[u][f"m{i}"] = LoraLayer(A=A[u], B=B[u], scaling=scaling)
    extras = [{"head": torch.full((2,), float(u))} for u in range(count)]
    return [Adapter(own, extra, {"r": 3}) for own, extra in zip(layers, extras, strict=True)]


def times(adapter, factor):
    return Adapter(
        {k: LoraLayer(A=v.A, B=v.B * factor, scaling=v.scaling) for k, v in adapter.modules.items()}, adapter.extras
    )


def flat(cohort):
    return torch.stack(
        [torch.cat([x.scaling * (x.B.double() @ x.A.double()).flatten() for x in a.modules.values()]) for a in cohort]
    )


def aggregated(result):
    return torch.cat([x.delta().double().flatten() for x in result.adapter.modules.values()])


@pytest.mark.parametrize("clip", [10.0, "1.2x"])
def test_clipping_is_the_mean_of_the_scaled_dense_updates(clip):
    cohort = [times(a, f) for a, f in zip(adapters(), [1, 1, 1, 30, 0.1, 1], strict=True)]
    X, w = flat(cohort), torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64) / 21
    bound = 10.0 if clip == 10.0 else 1.2 * float(X.norm(dim=1).quantile(0.5))
    factors = (bound / X.norm(dim=1)).clamp_max(1)
    result = flora_na.aggregate(cohort, w, method="stack", clip=clip)
    expected = w @ (factors.unsqueeze(1) * X)
    assert float((aggregated(result) - expected).norm()) < 1e-6 * float(expected.norm())
    report = result.report.screening
    assert report.bound == pytest.approx(bound)
    assert torch.allclose(report.factors, factors)
    assert report.clipped == [f"client {u}" for u in range(6) if factors[u] < 1]
    assert report.dropped == []
    assert torch.equal(result.adapter.extras["head"], flora_na.aggregate(cohort, w).adapter.extras["head"])


@pytest.mark.parametrize("who_says_so", [5, 1])
def test_updates_beside_the_factors_are_scaled_along_and_states_are_not(who_says_so):
    bias, state = torch.ones(3), torch.full((2,), 4.0)
    cohort = [
        Adapter(a.modules, {"bias": bias, "head": state}, None, {"bias": "update"} if u < who_says_so else {})
        for u, a in enumerate(adapters(5, modules=1))
    ]
    plain, result = (flora_na.aggregate(cohort, clip=clip) for clip in (None, "0.5x"))
    factors = result.report.screening.factors
    assert float(factors.max()) < 1
    assert torch.allclose(result.adapter.extras["bias"], plain.adapter.extras["bias"] * factors.float().mean())
    assert torch.equal(result.adapter.extras["head"], state)


def test_filtering_leaves_out_whole_clients_and_scales_the_weights():
    cohort = adapters()
    cohort[2] = times(cohort[2], -40.0)
    result = flora_na.aggregate(cohort, [1, 2, 3, 4, 5, 6], method="svd", clip="2x", min_cosine=0.2)
    report = result.report.screening
    assert report.dropped == ["client 2"]
    assert report.clipped == ["client 2"]
    rest, weights = [cohort[u] for u in (0, 1, 3, 4, 5)], [1, 2, 4, 5, 6]
    expected = flora_na.aggregate(rest, weights, method="svd")
    assert torch.allclose(aggregated(result), aggregated(expected), atol=1e-5)
    assert torch.allclose(result.adapter.extras["head"], expected.adapter.extras["head"])
    assert result.report.clients == pytest.approx(
        {f"client {u}": w / 18 for u, w in zip((0, 1, 3, 4, 5), weights, strict=True)}
    )
    mean = torch.tensor(weights, dtype=torch.float64) @ flat(rest)
    for u, other in zip((0, 1, 3, 4, 5), flat(rest), strict=True):
        assert float(report.cosines[u]) == pytest.approx(float(torch.cosine_similarity(other, mean, dim=0)))
    written = json.loads(json.dumps(result.report.to_dict()))["screening"]
    assert set(written) == {"clip", "bound", "min_cosine", "clipped", "dropped", "dropped_weight", "clients"}
    assert written["dropped_weight"] == pytest.approx(3 / 21)
    assert set(written["clients"]["client 2"]) == {"norm", "factor", "cosine_to_mean", "weight"}
    assert written["clients"]["client 2"]["weight"] == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_the_outcome_is_a_fixed_point_and_knows_no_order(seed):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(12, 5, generator=g, dtype=torch.float64) + 0.4
    w = torch.rand(12, generator=g, dtype=torch.float64) + 0.1
    w, names = w / w.sum(), tuple(f"c{u}" for u in range(12))
    once = screen(X @ X.T, w, names, clip=1.5, min_cosine=0.3)
    kept = once.weights > 0
    assert 0 < int(kept.sum()) < 12
    Y = X[kept] * once.factors[kept].unsqueeze(1)
    again = screen(Y @ Y.T, once.weights[kept], tuple(n for n, k in zip(names, kept, strict=True) if k), 1.5, 0.3)
    assert again.dropped == []
    assert torch.allclose(again.factors, torch.ones(len(Y), dtype=torch.float64))
    mean = once.weights[kept] @ Y
    assert float(torch.cosine_similarity(Y, mean.unsqueeze(0)).min()) >= 0.3 - 1e-9
    order = torch.randperm(12, generator=g)
    other = screen(X[order] @ X[order].T, w[order], tuple(names[i] for i in order), clip=1.5, min_cosine=0.3)
    assert sorted(other.dropped) == sorted(once.dropped)
    assert torch.allclose(other.factors, once.factors[order])


def test_a_median_bound_takes_no_notice_of_a_few_giants_or_of_zero_updates():
    norms = torch.tensor([1.0, 2.0, 3.0, 1e9, 1e12, 0.0, 0.0], dtype=torch.float64)
    found = screen(torch.diag(norms**2), torch.full((7,), 1 / 7, dtype=torch.float64), tuple("abcdefg"), clip="2x")
    assert found.bound == 6.0
    assert found.clipped == ["d", "e"]
    assert found.factors[5:].tolist() == [1.0, 1.0]


def test_equal_clients_fall_together_and_nobody_left_is_refused():
    cohort = adapters(1)
    opposed = [cohort[0], times(cohort[0], -1.0)]
    with pytest.raises(ValueError, match=r"^min_cosine: no client's update reaches a cosine of 0.1"):
        flora_na.aggregate(opposed, method="svd", min_cosine=0.1)
    assert flora_na.aggregate(opposed, method="svd", min_cosine=0.0).report.screening.dropped == []
    trio = [*opposed, cohort[0]]
    assert flora_na.aggregate(trio, method="svd", min_cosine=0.5).report.screening.dropped == ["client 1"]


def test_one_long_update_can_turn_the_filter_round_and_is_reported():
    cohort = adapters()
    cohort[4] = times(cohort[4], -1000.0)
    alone = flora_na.inspect(cohort, min_cosine=0.1)
    assert alone.screening.dropped == [f"client {u}" for u in (0, 1, 2, 3, 5)]
    assert alone.screening.doubtful
    assert "screening" in {warning["kind"] for warning in alone.warnings}
    clipped = flora_na.inspect(cohort, min_cosine=0.1, clip="1x")
    assert clipped.screening.dropped == ["client 4"]
    assert "screening" not in {warning["kind"] for warning in clipped.warnings}


def test_off_by_default_and_of_no_effect_where_nobody_is_concerned():
    cohort = adapters()
    plain = flora_na.aggregate(cohort)
    assert plain.report.screening is None
    assert plain.report.to_dict()["screening"] is None
    wide = flora_na.aggregate(cohort, clip=1e9, min_cosine=-1.0)
    for name, layer in plain.adapter.modules.items():
        assert torch.equal(layer.B, wide.adapter.modules[name].B)
    assert wide.report.screening.clipped == wide.report.screening.dropped == []


@pytest.mark.parametrize("clip", [np.float32(2), np.array(2.0), np.int64(2)])
def test_a_bound_of_numpy_is_a_number_in_the_report(clip):
    report = flora_na.aggregate(adapters(), clip=clip).report.to_dict()
    assert json.loads(json.dumps(report))["screening"]["clip"] == 2.0


def test_clients_of_weight_zero_are_not_judged():
    cohort = adapters()
    cohort[0] = times(cohort[0], 1e6)
    found = flora_na.aggregate(cohort, [0, 1, 1, 1, 1, 1], clip="3x").report.screening
    assert found.names == tuple(f"client {u}" for u in range(1, 6))


@pytest.mark.parametrize("missing", ["zero", "renormalize"])
def test_missing_modules_are_no_obstacle(missing):
    cohort = adapters()
    cohort[3] = Adapter({"m0": cohort[3].modules["m0"]}, cohort[3].extras)
    cohort[4] = times(cohort[4], -5.0)
    result = flora_na.aggregate(cohort, missing=missing, clip="1x", min_cosine=0.0)
    assert result.report.screening.dropped == ["client 4"]
    assert list(result.adapter.modules) == ["m0", "m1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clip=0.0), "clip: expected a positive norm"),
        (dict(clip="x"), "clip: expected a positive norm"),
        (dict(clip="-2x"), "clip: expected a positive norm"),
        (dict(clip=True), "clip: expected a positive norm"),
        (dict(clip=float("nan")), "clip: expected a positive norm"),
        (dict(min_cosine=1.5), "min_cosine: expected a number from -1 to 1"),
        (dict(min_cosine=float("nan")), "min_cosine: expected a number from -1 to 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    for call in (flora_na.aggregate, flora_na.inspect):
        with pytest.raises(ValueError, match=message):
            call(adapters(), **options)


def test_a_nan_is_named_before_it_spreads():
    cohort = adapters()
    cohort[1].modules["m1"].A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="m1: lora_A of client 1 contains NaN"):
        flora_na.aggregate(cohort, clip=1.0)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1.0, 1e30])
def test_cosines_and_scores_know_no_scale_and_score_no_rounding(scale):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(1, 40, generator=g, dtype=torch.float64) + 0.1 * torch.randn(
        9, 40, generator=g, dtype=torch.float64
    )
    X[4] *= 7
    w = torch.full((9,), 1 / 9, dtype=torch.float64)
    G, scaled = X @ X.T, (X * scale) @ (X * scale).T
    assert torch.allclose(mean_cosines(scaled, w), mean_cosines(G, w), rtol=1e-12)
    assert torch.allclose(outlier_scores(scaled), outlier_scores(G), rtol=1e-9)
    assert int(outlier_scores(G).argmax()) == 4
    same = (X[:1] * scale).expand(9, 40)
    assert float(outlier_scores(same @ same.T).abs().max()) < 1


def test_an_update_that_cancels_to_rounding_is_zero():
    """As of a client that returns the factors training started from, whose update is held against them."""
    [B], [A] = clients([7], 14, 18, seed=7)
    order = [3, 0, 6, 2, 5, 1, 4]
    zero = torch.cat([B, B[:, order]], 1), torch.cat([A, -A[order]])
    idle = [{"m0": LoraLayer(A=zero[1], B=zero[0] * c)} for c in (0.7, 3.0, 1.3)]
    cohort = [*({"m0": adapter.modules["m0"]} for adapter in adapters(5)), *idle]
    gramian = flora_na.client_gramian(cohort)
    assert gramian[5:].count_nonzero() == gramian[:, 5:].count_nonzero() == 0
    result = flora_na.aggregate(cohort, method="svd", clip="2x")
    assert result.report.screening.clipped == []
    seen = flora_na.inspect(cohort)
    zeros = [w["message"] for w in seen.warnings if w["kind"] == "zero-update"]
    assert zeros == [f"client {u}: the update is zero" for u in (5, 6, 7)]
    assert seen.to_dict()["clients"]["client 6"]["cosine_to_mean"] == 0
