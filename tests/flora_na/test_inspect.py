"""``inspect`` against dense float64 references: ladder, curves, rank choice, rank collapse, clients, and the schema."""

import json
import math

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import Adapter, LoraLayer
from fedgram.flora_na import group as group_module
from fedgram_testing.factors import clients, dense, optimum

METHODS = ("fedavg", "flora-na", "als", "svd")


def adapters(ranks, shapes=((20, 30), (12, 30)), seed=0, scaling=2.0, **options):
    layers = [{} for _ in ranks]
    for i, (m, n) in enumerate(shapes):
        B, A = clients(ranks, m, n, seed=seed + i, **options)
        for u in range(len(ranks)):
            layers[u][f"m{i}"] = LoraLayer(A=A[u], B=B[u], scaling=scaling)
    return [Adapter(own) for own in layers]


def target(cohort, name, weights=None):
    layers = [a.modules[name] for a in cohort]
    return dense([x.B for x in layers], [x.A for x in layers], weights, [x.scaling for x in layers])


def smallest_rank(W, share):
    energy = torch.linalg.svdvals(W).square()
    kept = energy.cumsum(0) / energy.sum()
    return int((kept < share).sum()) + 1


@pytest.mark.parametrize("implicit", [False, True])
def test_curves_are_those_of_the_dense_matrices(implicit, monkeypatch):
    if implicit:
        monkeypatch.setattr(group_module, "GRAM_RANK_LIMIT", 0)
    cohort = adapters([2, 3, 4, 3], seed=3)
    found = flora_na.inspect(cohort, [1, 2, 3, 4])
    for name, module in found.modules.items():
        W = target(cohort, name, [1, 2, 3, 4])
        sigma = torch.linalg.svdvals(W)
        assert module.norm == pytest.approx(float(W.norm()), rel=1e-12)
        assert len(module.rank_curve) == 12  # min(m, n, R), and below four times the largest rank
        for rank, rho in enumerate(module.rank_curve, 1):
            assert rho == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), rel=1e-6, abs=1e-13)
        for method in METHODS:
            pair = flora_na.estimate(
                *([getattr(a.modules[name], side).double() for a in cohort] for side in ("B", "A")),
                [1, 2, 3, 4],
                [2.0] * 4,
                method=method,
            )
            assert module.rho[method] == pytest.approx(pair.rho, rel=1e-6)
        share = sigma / sigma.sum()
        entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
        assert module.effective_rank == pytest.approx(math.exp(entropy), rel=1e-6)
    errors = [m.rho["svd"] ** 2 * m.norm**2 for m in found.modules.values()]
    whole = math.sqrt(sum(errors) / sum(m.norm**2 for m in found.modules.values()))
    assert found.rank_curve[3] == pytest.approx(whole, rel=1e-6)


def test_small_tails_of_a_curve_are_true_where_grams_cannot_see_them():
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(40, 8, generator=g, dtype=torch.float64))[0] for _ in range(2))
    sigma = torch.logspace(0, -14, 8, dtype=torch.float64)
    module = flora_na.inspect([{"m": LoraLayer(A=V.mT.contiguous(), B=U * sigma)}]).modules["m"]
    for rank in range(1, 7):
        assert module.rank_curve[rank - 1] == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), rel=2e-3)


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 1 - 1e-9])
def test_auto_rank_is_the_smallest_that_keeps_the_share(share, implicit, monkeypatch):
    if implicit:
        monkeypatch.setattr(group_module, "GRAM_RANK_LIMIT", 0)
    cohort = adapters([4] * 5, shapes=((20, 30), (12, 30), (30, 9)), common=0.2, seed=7)
    expected = {name: smallest_rank(target(cohort, name), share) for name in cohort[0].modules}
    assert len(set(expected.values())) > 1 or share < 0.5
    found = flora_na.inspect(cohort, rank=f"auto:{share!r}")
    assert {name: m.rank for name, m in found.modules.items()} == expected
    for name, module in found.modules.items():
        assert module.rho["svd"] ** 2 <= 1 - share + 1e-12
        assert module.rho["svd"] == pytest.approx(optimum(target(cohort, name), module.rank), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_aggregate_takes_the_same_ranks(method):
    cohort = adapters([4] * 5, shapes=((20, 30), (12, 30), (30, 9)), spread=0.3, seed=7)
    result = flora_na.aggregate(cohort, method=method, rank="auto:0.95")
    chosen = flora_na.inspect(cohort, rank="auto:0.95")
    for name, layer in result.adapter.modules.items():
        assert layer.rank == chosen.modules[name].rank == smallest_rank(target(cohort, name), 0.95)
        report = result.report.modules[name]
        assert report.rank == layer.rank
        assert report.rho == pytest.approx(chosen.modules[name].rho[method], rel=1e-4)
        assert report.rho_optimal**2 <= 0.05


def test_auto_rank_of_a_zero_target_is_that_of_the_averages():
    cohort = [{"m": LoraLayer(A=torch.randn(3, 9), B=torch.zeros(8, 3))} for _ in range(2)]
    result = flora_na.aggregate(cohort, rank="auto:0.9")
    assert result.adapter.modules["m"].rank == 3
    module = flora_na.inspect(cohort, rank="auto:0.9").modules["m"]
    assert (module.rank, list(module.rank_curve), module.norm) == (3, [], 0.0)
    assert math.isnan(module.effective_rank)


@pytest.mark.parametrize(
    "rank", ["auto", "auto:", "auto:0", "auto:1", "auto:nan", "auto:1.5", "8", "auto:-0.5", True, 0]
)
def test_other_ranks_are_refused(rank):
    cohort = adapters([2, 2])
    for call in (flora_na.inspect, flora_na.aggregate):
        with pytest.raises(ValueError, match=r"rank: expected an integer from 1 to 16384, 'auto:SHARE'"):
            call(cohort, rank=rank)


def nested(ranks, coherent=1.0, seed=0, tail=1.0):
    """Clients that share one frame and fill its first directions; those of higher rank also fill the rest."""
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(40, 16, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(50, 16, generator=g, dtype=torch.float64))[0]
    out = []
    for r in ranks:
        scale = torch.ones(r, dtype=torch.float64)
        scale[4:] = tail
        own = torch.linalg.qr(U + (1 - coherent) * torch.randn(40, 16, generator=g, dtype=torch.float64))[0]
        out.append(Adapter({"m": LoraLayer(A=V[:, :r].mT.contiguous(), B=own[:, :r] * scale)}))
    return out


def test_rank_collapse_is_the_dilution_of_what_only_high_ranks_say():
    found = flora_na.inspect(nested([4, 4, 4, 16]))
    # the first four directions add up over all clients, the other twelve are one client's, at a quarter of the weight
    collapse = found.rank_collapse
    assert collapse.clients_share == pytest.approx(12 / 16)
    assert collapse.aggregate_share == pytest.approx((12 / 16) / (4 + 12 / 16))
    assert collapse.retained == pytest.approx(collapse.aggregate_share / collapse.clients_share)
    assert collapse.collapsed
    [warning] = [w for w in found.warnings if w["kind"] == "rank-collapse"]
    assert "1 of 1 modules" in warning["message"]
    assert "beyond rank 4" in warning["message"]


@pytest.mark.parametrize("implicit", [False, True])
def test_rank_collapse_against_dense_matrices(implicit, monkeypatch):
    if implicit:
        monkeypatch.setattr(group_module, "GRAM_RANK_LIMIT", 0)
    cohort, weights = nested([4, 16, 8, 4], coherent=0.6), [0.4, 0.3, 0.2, 0.1]
    collapse = flora_na.inspect(cohort, weights).modules["m"].rank_collapse

    def beyond(W):
        return float(torch.linalg.svdvals(W)[4:].square().sum())

    deltas = [a.modules["m"].delta() for a in cohort]
    W = sum(w * d for w, d in zip(weights, deltas, strict=True))
    high = [(w, d) for w, d, r in zip(weights, deltas, [4, 16, 8, 4], strict=True) if r > 4]
    assert collapse.aggregate_share == pytest.approx(beyond(W) / float(W.norm()) ** 2, rel=1e-6)
    assert collapse.clients_share == pytest.approx(
        sum(w * beyond(d) for w, d in high) / sum(w * float(d.norm()) ** 2 for w, d in high), rel=1e-6
    )


@pytest.mark.parametrize(
    ("cohort", "reason"),
    [
        (nested([16, 16, 16, 4]), "most clients have the higher rank"),
        (nested([4, 4, 4, 16], tail=0.01), "the higher ranks are hardly used"),
    ],
    ids=["shared", "unused"],
)
def test_no_collapse_where_nothing_is_lost(cohort, reason):
    found = flora_na.inspect(cohort)
    assert not found.rank_collapse.collapsed, reason
    assert not [w for w in found.warnings if w["kind"] == "rank-collapse"]


def test_equal_ranks_have_no_rank_collapse():
    assert flora_na.inspect(adapters([3, 3, 3])).rank_collapse is None


def test_clients_against_dense_updates():
    cohort = adapters([3] * 7, common=1.0, spread=0.3)
    cohort[5] = Adapter({k: LoraLayer(A=v.A, B=-9 * v.B, scaling=v.scaling) for k, v in cohort[5].modules.items()})
    cohort[6] = Adapter({k: LoraLayer(A=v.A, B=0 * v.B, scaling=v.scaling) for k, v in cohort[6].modules.items()})
    weights = torch.tensor([1.0, 2, 3, 4, 5, 1, 2], dtype=torch.float64) / 18
    found = flora_na.inspect(cohort, weights)
    X = torch.stack([torch.cat([x.delta().double().flatten() for x in a.modules.values()]) for a in cohort])
    mean = weights @ X
    assert torch.allclose(found.client_norms, X.norm(dim=1), rtol=1e-6)
    assert torch.allclose(found.cosines_to_mean, torch.cosine_similarity(X, mean.unsqueeze(0)), atol=1e-6)
    others = torch.stack([torch.cat([X[:u], X[u + 1 :]]).mean(0) for u in range(7)])
    distance = (X - others).norm(dim=1)
    spread = max(1.4826 * float((distance - distance.median()).abs().median()), 0.05 * float(distance.median()))
    assert torch.allclose(found.outlier_scores, (distance - distance.median()) / spread, rtol=1e-5)
    kinds = {(w["kind"], w["message"].split(":")[0]) for w in found.warnings}
    assert {("outlier", "client 5"), ("opposed", "client 5"), ("zero-update", "client 6")} <= kinds
    own = torch.stack([a.modules["m1"].delta().double().flatten() for a in cohort])
    assert torch.allclose(
        found.modules["m1"].cosines_to_mean, torch.cosine_similarity(own, (weights @ own).unsqueeze(0)), atol=1e-6
    )


def test_screening_shows_all_clients_and_the_ladder_of_those_that_pass():
    cohort = adapters([3] * 6)
    cohort[1] = Adapter({k: LoraLayer(A=v.A, B=-9 * v.B, scaling=v.scaling) for k, v in cohort[1].modules.items()})
    found = flora_na.inspect(cohort, clip="1.5x", min_cosine=0.1)
    assert found.screening.dropped == ["client 1"]
    assert len(found.names) == 6
    assert torch.allclose(found.gramian, flora_na.client_gramian(cohort), rtol=1e-12)
    result = flora_na.aggregate(cohort, clip="1.5x", min_cosine=0.1, method="als")
    assert found.ladder["als"] == pytest.approx(result.report.rho, rel=1e-5)
    assert list(found.modules["m0"].client_ranks) == [3, 0, 3, 3, 3, 3]


TOP = "schema_version rank ladder rank_curve clients client_cosines rank_collapse screening warnings modules"
MODULE = "rho rank norm rank_curve effective_rank rank_collapse client_ranks client_norms client_cosines_to_mean"
COLLAPSE = "smallest_rank largest_rank aggregate_share clients_share retained collapsed"
CLIENT = "weight norm cosine_to_mean outlier_score largest_rank"
SCREENING = "clip bound min_cosine clipped dropped dropped_weight clients"
REPORT = "schema_version method rho rho_fedavg rho_optimal clients screening modules"
MODULE_REPORT = "rho rho_fedavg rho_optimal norm rank status sweeps"


def keys(text):
    return set(text.split())


def test_the_schema_of_version_1():
    """Changing or removing a key asks for another version; adding one asks for a line here and in the docstring."""
    cohort = adapters([2, 3, 4, 4, 4])
    lacking = Adapter({"m0": cohort[2].modules["m0"]})
    cohort[2] = lacking
    found = flora_na.inspect(cohort, missing="zero", rank="auto:0.9", clip="2x", min_cosine=-1.0)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["schema_version"] == 1
    assert set(document) == keys(TOP)
    assert document["rank"] == "auto:0.9"
    assert set(document["ladder"]) == set(METHODS)
    assert list(document["clients"]) == [f"client {u}" for u in range(5)]
    assert all(set(client) == keys(CLIENT) for client in document["clients"].values())
    assert [client["largest_rank"] for client in document["clients"].values()] == [2, 3, 4, 4, 4]
    assert [len(row) for row in document["client_cosines"]] == [5] * 5
    assert set(document["rank_collapse"]) == keys(COLLAPSE)
    assert set(document["screening"]) == keys(SCREENING)
    for name, module in document["modules"].items():
        assert set(module) == keys(MODULE), name
        assert set(module["rank_collapse"]) == keys(COLLAPSE)
        assert set(module["rho"]) == set(METHODS)
        assert len(module["client_ranks"]) == len(module["client_norms"]) == len(module["client_cosines_to_mean"]) == 5
    assert document["modules"]["m1"]["client_ranks"] == [2, 3, 0, 4, 4]
    for text in (TOP, MODULE, COLLAPSE, CLIENT):
        for key in keys(text) - {"collapsed"}:
            assert f"``{key}``" in flora_na.Inspection.to_dict.__doc__, key
    report = flora_na.aggregate(cohort, missing="zero", clip="2x").report.to_dict()
    assert keys(REPORT) <= set(report)
    assert all(keys(MODULE_REPORT) <= set(module) for module in report["modules"].values())


def test_a_zero_round_is_json_too():
    cohort = [{"m": LoraLayer(A=torch.randn(3, 9), B=torch.zeros(8, 3))} for _ in range(6)]
    document = json.loads(json.dumps(flora_na.inspect(cohort).to_dict(), allow_nan=False))
    assert document["ladder"] == dict.fromkeys(METHODS)
    assert document["modules"]["m"]["effective_rank"] is None
    assert {w["kind"] for w in document["warnings"]} == {"zero-update"}
