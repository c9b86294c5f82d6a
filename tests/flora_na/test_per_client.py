"""One result per client, at the ranks of its own layers; what extras of each role become under every policy."""

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import Adapter, LoraLayer
from fedgram.flora_na.cohort import average_extra, make_cohort
from fedgram_testing.factors import clients, dense_target, divergence, optimum
from fedgram_testing.recorded import Counted

RANKS = {"q": (2, 3, 5), "v": (1, 4, 2)}
SHAPES = {"q": (12, 9), "v": (8, 10)}
WEIGHTS = [1.0, 2.0, 5.0]
SCALINGS = (0.5, 2.0, 1.5)


def cohort():
    adapters = [Adapter({}, {"head": torch.full((2,), float(u))}, {"r": u}) for u in range(3)]
    for i, (name, (m, n)) in enumerate(SHAPES.items()):
        B, A = clients(RANKS[name], m, n, seed=i)
        for u, adapter in enumerate(adapters):
            adapter.modules[name] = LoraLayer(A=A[u], B=B[u], scaling=SCALINGS[u])
    return adapters


@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd"])
def test_every_client_gets_the_pair_of_its_own_rank(method):
    adapters = cohort()
    results = flora_na.aggregate_for_clients(adapters, WEIGHTS, method=method)
    for u, result in enumerate(results):
        assert result.adapter.config == {"r": u}
        assert torch.equal(result.adapter.extras["head"], torch.full((2,), 12 / 8))
        for name, ranks in RANKS.items():
            layer, W = result.adapter.modules[name], dense_target(adapters, name, WEIGHTS)
            assert layer.rank == ranks[u]
            rho = divergence(W, layer.B, layer.A)
            assert rho == pytest.approx(result.report.modules[name].rho, rel=1e-3)
            if method == "svd":  # float32 factors: their rounding is below 1e-6 of ||dW||
                assert rho == pytest.approx(optimum(W, ranks[u]), rel=1e-5)
            one = flora_na.aggregate(adapters, WEIGHTS, method=method, rank=ranks[u])
            torch.testing.assert_close(layer.delta(), one.adapter.modules[name].delta(), rtol=1e-4, atol=1e-5)


def test_pairs_of_one_rank_are_the_same_tensors():
    adapters = cohort()
    adapters[0].modules["q"] = adapters[1].modules["q"]
    results = flora_na.aggregate_for_clients(adapters, WEIGHTS, method="svd")
    assert results[0].adapter.modules["q"] is results[1].adapter.modules["q"]


@pytest.mark.parametrize(("options", "times"), [({}, [1, 1, 1]), ({"clip": "1x"}, [2, 2, 2])])
def test_the_factors_are_read_once(options, times):
    counted = [Counted(adapter.modules) for adapter in cohort()]
    flora_na.aggregate_for_clients(iter(counted), WEIGHTS, **options)
    assert [modules.reads.count("q") for modules in counted] == times
    flora_na.aggregate_for_clients(counted, [0.0, 2.0, 5.0], **options)
    assert counted[0].reads.count("q") == times[0] + 1


def test_clients_without_weight_or_without_a_module_get_their_own_modules_only():
    adapters = cohort()
    adapters[1] = Adapter({"q": adapters[1].modules["q"]}, {}, {"r": 1})
    results = flora_na.aggregate_for_clients(adapters, [0.0, 2.0, 5.0], method="svd", missing="renormalize")
    assert [set(r.adapter.modules) for r in results] == [{"q", "v"}, {"q"}, {"q", "v"}]
    assert [set(r.adapter.extras) for r in results] == [{"head"}, set(), {"head"}]
    layer = results[0].adapter.modules["v"]
    assert layer.rank == 1
    own = adapters[2].modules["v"]
    W = own.scaling * own.B.double() @ own.A.double()
    assert divergence(W, layer.B, layer.A) == pytest.approx(optimum(W, 1), rel=1e-5)


def test_a_stack_has_no_rank_to_choose():
    with pytest.raises(ValueError, match="rank: method 'stack'"):
        flora_na.aggregate_for_clients(cohort(), method="stack")


# Extras


def extras_of(*tensors, role=None, missing="error"):
    layer = LoraLayer(A=torch.ones(1, 2), B=torch.ones(2, 1))
    roles = {} if role is None else {"x": role}
    adapters = [Adapter({"m": layer}, {} if t is None else {"x": t}, None, roles) for t in tensors]
    return make_cohort(adapters, WEIGHTS[: len(tensors)], missing=missing)


T = torch.tensor


@pytest.mark.parametrize(
    ("role", "missing", "expected"),
    [(None, "renormalize", 31 / 6), ("update", "renormalize", 31 / 6), ("update", "zero", 31 / 8)],
)
def test_the_policies_for_a_tensor_that_a_client_lacks(role, missing, expected):
    found = average_extra(extras_of(T([1.0]), None, T([6.0]), role=role, missing=missing), "x")
    assert float(found) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="x: client 1 has no such tensor"):
        average_extra(extras_of(T([1.0]), None, T([6.0]), role=role), "x")


def test_a_state_has_no_zero():
    for role in (None, "frozen"):
        with pytest.raises(ValueError, match="a full tensor has no zero to stand for it"):
            average_extra(extras_of(T([1.0]), None, T([6.0]), role=role, missing="zero"), "x")


def test_updates_are_summed_by_given_coefficients():
    found = average_extra(extras_of(T([1.0]), T([2.0]), role="update"), "x", T([0.5, -1.0]).double())
    assert float(found) == -1.5


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
    ],
)
def test_the_dtype_of_the_result_is_the_one_that_all_promote_to(dtypes, expected):
    x = [torch.ones(2).to(dtype) for dtype in dtypes]
    assert average_extra(extras_of(*x), "x").dtype == expected
    modules = [{"m": LoraLayer(A=torch.ones(1, 2).to(d), B=torch.ones(2, 1).to(d))} for d in dtypes]
    for method in flora_na.METHODS:
        layer = flora_na.aggregate(modules, method=method).adapter.modules["m"]
        assert (layer.A.dtype, layer.B.dtype) == (expected, expected)
        torch.testing.assert_close(layer.delta(), torch.ones(2, 2, dtype=expected))


@pytest.mark.parametrize(
    ("tensors", "role", "reason"),
    [
        ((T([1, 2]), T([1, 3])), None, "integers cannot be averaged, and must be the same"),
        ((T([True]), T([False])), None, "integers cannot be averaged"),
        ((T([1.0]), T([1.5])), "frozen", "a base tensor that is stored but not trained cannot be averaged"),
        ((T([1.0]), T([1])), None, "client 1 has dtype torch.int64, client 0 torch.float32"),
        ((T([1.0]), T([1.0, 2.0])), None, r"client 1 has shape \(2,\), client 0 has \(1,\)"),
        ((T([1.0]), T([float("nan")])), None, "the tensor of client 1 contains NaN or Inf"),
    ],
)
def test_extras_that_cannot_be_averaged_are_refused(tensors, role, reason):
    with pytest.raises(ValueError, match=f"x: .*{reason}"):
        average_extra(extras_of(*tensors, role=role), "x")


def test_equal_integers_come_back_as_they_are():
    found = average_extra(extras_of(T([3, 5]), T([3, 5])), "x")
    assert torch.equal(found, T([3, 5]))
    assert found.dtype == torch.int64
    eighth = T([1.0, 2.0]).to(torch.float8_e4m3fn)
    same = average_extra(extras_of(eighth, eighth.clone(), role="frozen"), "x")
    assert torch.equal(same.float(), eighth.float())
