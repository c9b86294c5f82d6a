"""Four gloo ranks on the loopback address, and two of them as a group: the bits of one process, errors, traffic."""

import pytest
import torch

from fedgram import stamp
from fedgram.bindings import sizing
from fedgram.bindings.distributed import aggregate_sharded, match_sharded
from fedgram.bindings.sizing import Module
from fedgram.flora_na import METHODS, Adapter, aggregate
from fedgram.stamp import Gramian
from fedgram_testing.ranks import run_ranks
from fedgram_testing.sharded_rounds import (
    NAMES,
    OWN,
    SIZES,
    WEIGHTS,
    adapters,
    gradients,
    network,
    shard,
    task_gradients,
    uneven_gradients,
    wide,
    without,
)

GROUPS = {"world": 4, "pair": 2}
HEADERS = 20_000
"""Bytes of names, shapes and sizes that go along with factors."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(4, "fedgram_testing.sharded_rounds", "everything", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=GROUPS)
def group(request, ranks):
    """What the ranks of one group found, in rank order."""
    return [rank[request.param] for rank in ranks if request.param in rank]


def module_by_module(clients, **options):
    """What one process makes of every module by itself."""
    parts = {}
    for name in SIZES:
        cut = [Adapter({n: x for n, x in c.modules.items() if n == name}) for c in clients]
        parts[name] = aggregate(cut, WEIGHTS, names=NAMES, **options)
    return parts


def same_bits(found, parts, names=SIZES):
    assert list(found["layers"]) == list(names)
    for name in names:
        A, B, scaling = found["layers"][name]
        layer = parts[name].adapter.modules[name]
        assert torch.equal(A, layer.A)
        assert torch.equal(B, layer.B)
        assert scaling == layer.scaling
        if found["rest"] is not None:
            rest = parts[name].residual.modules[name]
            assert torch.equal(found["rest"][name][0], rest.A)
            assert torch.equal(found["rest"][name][1], rest.B)
        assert found["report"]["modules"][name] == parts[name].report.modules[name].to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("placed", ["all", "own"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_bits_of_one_process(group, method, placed):
    parts = module_by_module(adapters(), method=method, residual=True)
    same_bits(group[0][placed][method], parts)
    whole = aggregate(adapters(), WEIGHTS, method=method, names=NAMES)
    report = group[0][placed][method]["report"]
    assert report["clients"] == whole.report.to_dict()["clients"]
    # iterations over several modules at once may stop later: within the tolerance of 1e-6 on the squared error
    assert report["rho"] == pytest.approx(whole.report.rho, rel=1e-6)
    for name, tensor in whole.adapter.extras.items():
        assert torch.equal(group[0][placed][method]["extras"][name], tensor)
    assert group[0][placed][method]["config"] == {"client": 0}


def test_other_ranks_keep_their_own_modules(group):
    parts = module_by_module(adapters())
    owned = [found["sharded"]["owned"] for found in group]
    assert sorted(name for mine in owned for name in mine) == sorted(SIZES)
    assert all(owned)
    for found in group:
        same_bits(found["sharded"], parts, found["sharded"]["owned"])
    for found in group[1:]:
        same_bits(found["all"]["als"], module_by_module(adapters(), residual=True), found["all"]["als"]["owned"])
    names = [name for found in group for name in found["sharded"]["extras"]]
    assert sorted(names) == ["head.weight", "layers.3.proj.bias"]


def test_the_whole_result_reaches_all_ranks(group):
    for found in group:
        same_bits(found["everyone"], module_by_module(adapters()))
        same_bits(found["pieces"], module_by_module(adapters()))
        assert list(found["everyone"]["extras"]) == ["layers.3.proj.bias", "head.weight"]


def test_what_a_round_has_left_to_each_rank_may_anchor_the_next(group):
    parts = module_by_module(adapters())
    last = Adapter({name: part.adapter.modules[name] for name, part in parts.items()})
    same_bits(group[0]["next round"], module_by_module(adapters(), method="flora-na", anchor=last))


def test_missing_modules_and_anchors_mean_the_same_as_in_one_process(group):
    lacking = without(adapters(), "layers.2.proj", 4)
    same_bits(group[0]["lacking"], module_by_module(lacking, missing="zero"))
    same_bits(group[0]["anchored"], module_by_module(adapters(), method="flora-na", anchor=adapters()[0]))


def test_a_rank_reads_its_modules_and_its_share_of_one_client_for_their_sizes(group):
    for rank, found in enumerate(group):
        owned, reads = found["read"]
        share = list(SIZES)[rank :: len(group)]
        for u, read in enumerate(reads):
            expected = [*(share if u == 0 else []), *(owned if WEIGHTS[u] > 0 else [])]
            assert sorted(set(read)) == sorted(set(expected))


def test_factors_travel_once_to_the_rank_that_needs_them(group):
    sizes = {name: x.A.nbytes + x.B.nbytes for name, x in wide()[0].items()}
    active = [u for u in range(5) if WEIGHTS[u] > 0]
    for rank, found in enumerate(group):
        owned, *moved = found["factors"]
        mine = [u for u in active if OWN[len(group)][rank] <= u < OWN[len(group)][rank + 1]]
        into = sum(sizes[name] for name in owned)
        sent = len(mine) * (sum(sizes.values()) - into)
        received = (len(active) - len(mine)) * into
        for expected, bytes_moved in zip((sent, received), moved, strict=True):
            assert expected <= bytes_moved <= expected + HEADERS
            assert expected == 0 or expected > 3 * HEADERS


def test_the_cost_model_counts_the_bytes_that_are_exchanged(group):
    modules = [Module(*layer.shape, layer.rank, 4) for layer in wide()[0].values()]
    cost = sizing.aggregation(modules, len(group), len(group), own=True)
    for expected, counted in zip(
        (cost.sent, cost.received), zip(*(found["even"] for found in group), strict=True), strict=True
    ):
        assert expected <= max(counted) <= expected + HEADERS


def test_matching_of_shards_is_that_of_the_whole(group):
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    whole = stamp.match(gradients(), weights, c=0.4)
    for cut in (0, 1):
        found = [rank["match"][cut] for rank in group]
        for one in found:
            assert torch.equal(one["v"], found[0]["v"])
            assert one["status"] == whole.status
            # float64 sums of 110 products in another order: 110 eps, over the conditioning of a strictly convex dual
            torch.testing.assert_close(one["H"], whole.gramian.H, rtol=1e-12, atol=1e-10)
            torch.testing.assert_close(one["v"], whole.coefficients, rtol=1e-8, atol=1e-8)
            assert abs(one["gap"]) < 1e-9
    slices = [rank["match"][0]["direction"] for rank in group]
    joined = [torch.cat(parts) for parts in zip(*slices, strict=True)]
    for part, expected in zip(joined, whole.direction, strict=True):
        torch.testing.assert_close(part, expected.flatten(), rtol=1e-6, atol=1e-6)
    assert group[0]["match"][1]["direction"] == []


def test_the_gram_matrix_is_the_sum_of_the_shards_in_rank_order(group):
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    count = len(group)
    shards = [[[shard(t, rank, count) for t in g] for g in gradients()] for rank in range(count)]
    parts = [stamp.gramian(one, weights) for one in shards]
    n0, h, H = parts[0].n0.clone(), parts[0].h.clone(), parts[0].H.clone()
    for part in parts[1:]:
        n0, h, H = n0 + part.n0, h + part.h, H + part.H
    dual = stamp.solve_dual(Gramian(n0, h, H, parts[0].weights), 0.4)
    for found in group:
        assert torch.equal(found["match"][0]["H"], H)
        assert torch.equal(found["match"][0]["v"], dual.coefficients)
        assert all(torch.equal(a, b) for a, b in zip(*(found["match"][i]["direction"] for i in (0, 2)), strict=True))


def test_gradients_that_are_short_beside_the_mean_keep_their_digits(group):
    X = torch.stack([torch.cat([t.double().flatten() for t in g]) for g in uneven_gradients()])
    best = stamp.solve_dual(X @ X.T, 0.5)
    for found in (rank["short"] for rank in group):
        assert found["status"] == "optimal"
        assert torch.equal(found["v"], group[0]["short"]["v"])
        torch.testing.assert_close(found["v"], best.coefficients, rtol=1e-9, atol=0)
        torch.testing.assert_close(found["G"], X @ X.T, rtol=1e-9, atol=0)


def test_shards_of_a_model_of_fsdp_get_the_direction_of_the_whole_model(ranks):
    whole = stamp.match(task_gradients(network(), lambda grad: grad), c=0.4)
    for rank in ranks:
        assert rank["fsdp"]["gap"] < 1e-12
        for found, expected in zip(rank["fsdp"]["direction"], whole.direction, strict=True):
            # gradients averaged over ranks in float32: a few roundings of numbers below 1
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert rank["fsdp"]["refused"][0] == "ValueError"
        assert "to_local" in rank["fsdp"]["refused"][1]


REFUSED = {
    "not a number": "layers.4.proj: lora_B of site 0 contains NaN",
    "own not a number": "layers.4.proj: lora_B of site 0 contains NaN",
    "no clients": "expected at least one client, got none",
    "method": "rank 1 was called with other options (method) than rank 0",
    "anchor": "rank 1 was called with other options (anchor) than rank 0",
    "alignment": "rank 1 was called with other options (align_to) than rank 0",
    "watch": "watch: over 9 ranks, and the group has",
    "watch of gradients": "watch: over 9 ranks, and the group has",
    "no weights": "weights: expected real numbers, got ['many',",
    "weights": "rank 1 was called with other adapters, weights or names than rank 0",
    "settings": "rank 1 was called with other adapters, weights or names than rank 0",
    "some weights": "weights: given on some ranks and not on others",
    "shared": "shared: needs all modules in one place",
    "clip": "clip: needs all modules in one place",
    "cosine": "min_cosine: needs all modules in one place",
    "result": "result: expected one of root, all, sharded, got 'nowhere'",
    "module": "layers.2.proj: site 4 has no such module",
    "gradient": "task 0, '[0]' is not finite",
    "statistics": "task 0, 'running_mean' is not finite",
    "range": "the direction, '[0]' exceeds 65504",
    "strength": "rank 1 was called with other numbers of gradients, weights or options than rank 0",
    "number": "rank 1 was called with other numbers of gradients, weights or options than rank 0",
    "no strength": "c: expected a number in [0, 1), got nan",
    "nothing": "gradients: no rank has a tensor to match",
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_of_one_rank_ends_all_in_the_same_words(group, case):
    told = [found["refused"][case] for found in group]
    assert "ValueError" in {kind for kind, _ in told}
    for kind, message in told:
        assert REFUSED[case] in message
        assert kind == "ValueError" or message.startswith("rank ")


@pytest.mark.parametrize(
    "case", ["no room for all", "no room for one", "no room at the root", "no parcel", "no parcel for one"]
)
def test_a_rank_without_room_for_a_parcel_ends_all_at_once(group, case):
    """Nobody is left waiting for it in a collective, which would take the group's timeout."""
    cramped = 0 if case == "no room at the root" else 1
    for rank, found in enumerate(group):
        told = ("RuntimeError", "no room") if rank == cramped else ("RankError", f"rank {cramped}: no room")
        assert found["refused"][case] == told


def test_a_rank_may_have_only_what_is_averaged_or_nothing_at_all(group):
    directions = [found["averaged"] for found in group]
    alone = stamp.match([{"w": torch.tensor([1.0, k])} for k in range(3)], [1, 1, 2], c=0.4).direction
    torch.testing.assert_close(directions[0], alone)
    assert torch.equal(directions[1]["bn.running_mean"], torch.full((2,), 1.25))
    assert list(directions[1]) == ["bn.running_mean"]
    assert all(direction == [None, None] for direction in directions[2:])


def test_the_group_is_whole_after_errors(group):
    for found in group:
        same_bits(found["after"], module_by_module(adapters()))


def test_with_a_watch_a_rank_that_fails_ends_those_that_wait_for_it(ranks):
    same_bits(ranks[0]["watched"]["result"], module_by_module(adapters()))
    assert {rank["watched"]["match"] for rank in ranks} == {"stationary"}
    heard = [rank["watched"]["heard"] for rank in ranks]
    assert heard[2] == ("ValueError", "a bad file")
    assert heard[0] == heard[1] == heard[3] == ("RankError", "rank 2: a bad file")


def test_without_a_process_group_the_reason_is_said():
    with pytest.raises(ValueError, match="init_process_group"):
        aggregate_sharded(adapters())
    with pytest.raises(ValueError, match="init_process_group"):
        match_sharded(gradients())
