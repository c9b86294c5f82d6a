"""State dicts in, one out: against the library on the same factors, against PEFT, in bfloat16; and refusals."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fedgram import flora_na, stamp
from fedgram.bindings.modules import StateDictAggregator, StateDictMatcher
from fedgram.bindings.plain import aggregate_state_dicts, match_state_dicts
from fedgram.flora_na import Adapter
from fedgram_testing.factors import EPS
from fedgram_testing.lora_states import SHAPES, SPELLINGS, WEIGHTS, layers, states, target
from fedgram_testing.peft_adapters import adapted, bert, peft_deltas, quietly


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("method", flora_na.METHODS)
def test_it_is_aggregate_under_the_clients_own_names(method, spelling):
    clients = states(spelling=spelling)
    result = aggregate_state_dicts(clients, WEIGHTS, method=method, names=["a", "b", "c"])
    expected = flora_na.aggregate([layers(c, spelling) for c in clients], WEIGHTS, method=method)
    assert list(result.state_dict) == list(clients[0])
    for name, layer in expected.adapter.modules.items():
        assert torch.equal(result.state_dict[spelling.format(module=name, side="A")], layer.A)
        assert torch.equal(result.state_dict[spelling.format(module=name, side="B")], layer.B)
    assert result.report.rho == expected.report.rho
    assert list(result.report.clients) == ["a", "b", "c"]
    head = sum(w * c["base_model.model.head.weight"].double() for w, c in zip(WEIGHTS, clients, strict=True)) / 6
    torch.testing.assert_close(result.state_dict["base_model.model.head.weight"], head.float())


def test_factors_come_back_in_an_anchors_wider_dtype_and_without_its_padding():
    [anchor], clients = states(1), states(2, dtype=torch.bfloat16)
    result = aggregate_state_dicts(clients, anchor=anchor, method="flora-na").state_dict
    assert {t.dtype for name, t in result.items() if "lora_" in name} == {torch.float32}
    assert result["base_model.model.head.weight"].dtype == torch.bfloat16
    padded = {n: t if "lora_" not in n else torch.cat([t, 0 * t], int("lora_B" in n)) for n, t in anchor.items()}
    again = aggregate_state_dicts(clients, anchor=padded, method="flora-na").state_dict
    assert all(torch.equal(again[name], tensor) for name, tensor in result.items())


def test_one_client_comes_back_as_itself_in_bfloat16():
    [client] = states(1, dtype=torch.bfloat16)
    result = aggregate_state_dicts([client], lora_alpha=24, method="fedavg")
    assert all(torch.equal(result.state_dict[name], tensor) for name, tensor in client.items())
    assert result.scalings == dict.fromkeys(SHAPES, 6.0)


@pytest.mark.parametrize("method", ["flora-na", "als", "svd"])
def test_bfloat16_is_computed_wider_and_rounded_once(method):
    clients = states(dtype=torch.bfloat16)
    result = aggregate_state_dicts(clients, WEIGHTS, method=method, scalings=2.0)
    wide = [{name: tensor.float() for name, tensor in client.items()} for client in clients]
    exact = aggregate_state_dicts(wide, WEIGHTS, method=method, scalings=2.0)
    assert all(tensor.dtype == torch.bfloat16 for tensor in result.state_dict.values())
    for name, tensor in exact.state_dict.items():
        # Half a unit in the last place, plus what the float32 result itself may move (a thousandth of that unit).
        assert bool(
            ((result.state_dict[name].float() - tensor).abs() <= 0.501 * EPS[torch.bfloat16] * tensor.abs()).all()
        )


class Kinds(nn.Module):
    """A linear layer, an embedding and a convolution, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Embedding(11, 6), nn.Conv2d(3, 5, (3, 2))
        self.linear, self.head = nn.Linear(6, 7), nn.Linear(7, 2)


@pytest.mark.parametrize("make", [Kinds, bert])
def test_peft_models_exchange_their_state_dicts(make):
    options = {"modules_to_save": ["head"], "target_modules": ["embedding", "conv", "linear"]} if make is Kinds else {}
    options = {"r": 3, "lora_alpha": 12, **options}
    if make is bert:
        options |= {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    models = [adapted(make(), seed=seed, **options) for seed in range(3)]
    sent = [get_peft_model_state_dict(model) for model in models]
    result = aggregate_state_dicts(sent, WEIGHTS, method="svd", rank=9, config=models[0].peft_config["default"])
    receiver = quietly(lambda: get_peft_model(make(), LoraConfig(**options | {"r": 9, "lora_alpha": 36})))
    loaded = set_peft_model_state_dict(receiver, result.state_dict)
    assert not loaded.unexpected_keys
    deltas, ours = [peft_deltas(model) for model in models], peft_deltas(receiver)
    assert deltas[0].keys() == ours.keys()
    for name, found in ours.items():
        W = sum(w * d[name].double() for w, d in zip(WEIGHTS, deltas, strict=True)) / sum(WEIGHTS)
        assert float((found.double() - W).norm()) < 1e-5 * float(W.norm()), name  # rank 9 holds three of rank 3
    head = options["modules_to_save"][0]
    key = f"base_model.model.{head}.weight"
    mean = sum(w * s[key].double() for w, s in zip(WEIGHTS, sent, strict=True)) / sum(WEIGHTS)
    torch.testing.assert_close(result.state_dict[key], mean.float())


def test_the_pair_and_its_residual_make_the_target():
    clients = states()
    result = aggregate_state_dicts(clients, WEIGHTS, lora_alpha=8, rank=2, residual=True)
    for name in SHAPES:
        W = target(clients, name, [2.0] * 3, WEIGHTS, SPELLINGS[0])
        pair, rest = (layers(s, SPELLINGS[0])[name] for s in (result.state_dict, result.residual))
        whole = 2 * (pair.B.double() @ pair.A.double() + rest.B.double() @ rest.A.double())
        assert float((whole - W).norm()) < 1e-5 * float(W.norm())
        assert result.report.modules[name].rho > 1e-2  # so the residual is not nothing


def test_rounds_with_anchor_and_alignment_and_a_checkpoint():
    for option, argument, method in (
        ("anchor_previous", "anchor", "flora-na"),
        ("align_previous", "align_to", "als"),
    ):
        aggregator = StateDictAggregator(method, **{option: True})
        first = aggregator(states(seed=1), WEIGHTS)
        file = io.BytesIO()
        torch.save(aggregator.state_dict(), file)
        file.seek(0)
        resumed = StateDictAggregator(method, **{option: True})
        resumed.load_state_dict(torch.load(file, weights_only=True))
        expected = aggregate_state_dicts(states(seed=2), WEIGHTS, method=method, **{argument: first}).state_dict
        for second in (aggregator(states(seed=2), WEIGHTS), resumed(states(seed=2), WEIGHTS)):
            assert all(torch.equal(second[name], tensor) for name, tensor in expected.items())
        unlinked = aggregate_state_dicts(states(seed=2), WEIGHTS, method=method).state_dict
        assert any(not torch.equal(expected[name], tensor) for name, tensor in unlinked.items())


def test_a_client_of_weight_zero_and_a_missing_module():
    clients = states()
    clients[1]["extra.lora_A.weight"], clients[1]["extra.lora_B.weight"] = torch.ones(1, 3), torch.ones(2, 1)
    without = aggregate_state_dicts([clients[0], clients[2]], [3.0, 2.0]).state_dict
    weighted = aggregate_state_dicts(clients, [3.0, 0.0, 2.0]).state_dict
    assert weighted.keys() == without.keys()
    assert all(torch.equal(weighted[name], tensor) for name, tensor in without.items())
    with pytest.raises(ValueError, match="extra: client 0 has no such module"):
        aggregate_state_dicts(clients)
    joined = aggregate_state_dicts(clients, missing="renormalize").state_dict
    torch.testing.assert_close(joined["extra.lora_B.weight"] @ joined["extra.lora_A.weight"], torch.ones(2, 3))


@pytest.mark.parametrize("missing", ["error", "renormalize"])
def test_entries_beside_the_factors_are_one_under_any_spelling(missing):
    clients = states()
    wrapped = [clients[0], *({f"module.{key}": tensor for key, tensor in state.items()} for state in clients[1:])]
    expected = aggregate_state_dicts(clients, WEIGHTS).state_dict
    result = aggregate_state_dicts(wrapped, WEIGHTS, missing=missing).state_dict
    assert result.keys() == expected.keys() == clients[0].keys()
    assert all(torch.equal(result[key], tensor) for key, tensor in expected.items())


def test_entries_that_differ_by_a_prefix_alone_are_two():
    more = {"base_model.model.head.weight": 1.0, "head.weight": 2.0}
    clients = [state | {key: torch.full((2,), x * u) for key, x in more.items()} for u, state in enumerate(states())]
    result = aggregate_state_dicts(clients, WEIGHTS).state_dict
    mean = sum(u * w for u, w in enumerate(WEIGHTS)) / sum(WEIGHTS)
    for key, x in more.items():
        assert torch.allclose(result[key], torch.full((2,), x * mean))


def test_names_are_numbered_over_all_clients():
    result = aggregate_state_dicts(states(), [1, 0, *WEIGHTS[2:]], names=["x"] * len(WEIGHTS))
    assert list(result.report.clients)[:2] == ["x", "x (3)"]


def test_adapters_may_come_as_a_generator_and_names_as_a_view():
    clients = dict(zip("abc", states(), strict=True))
    expected = aggregate_state_dicts(list(clients.values()), WEIGHTS).state_dict
    for module in (aggregate_state_dicts, StateDictAggregator()):
        result = module((state for state in clients.values()), WEIGHTS, names=clients.keys())
        result = result if isinstance(result, dict) else result.state_dict
        assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    for wrong in (clients["a"], 3, None):
        with pytest.raises(ValueError, match="state_dicts: expected one state dict per client, got one"):
            aggregate_state_dicts(wrong)


def test_matched_clients_may_be_called_by_a_view():
    server, clients = {"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(3)}}
    with pytest.raises(ValueError, match=r"states: b, 'w' has shape"):
        match_state_dicts(server, clients.values(), names=clients.keys())


def server_and_clients(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)

    def state(step):
        return {
            "w": (torch.ones(6, 4) + step * torch.randn(6, 4, generator=generator)).to(dtype),
            "bn.running_mean": torch.randn(4, generator=generator).to(dtype),
            "bn.num_batches_tracked": torch.tensor(int(10 * step) + 3),
        }

    return state(0.0), [state(0.4) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matching_is_the_spatial_matcher(dtype):
    server, clients = server_and_clients(dtype)
    before = {name: tensor.clone() for name, tensor in server.items()}
    result = match_state_dicts(server, clients, [4, 1, 0, 2], c=0.4, lr=0.5)
    step = stamp.SpatialMatcher(server, c=0.4, lr=0.5).step(clients, [4, 1, 0, 2])
    assert all(torch.equal(result.state_dict[name], tensor) for name, tensor in step.state.items())
    assert result.clients == (0, 1, 3)
    assert result.dual.status == "optimal"
    assert result.dual.relative_gap < 1e-9
    assert result.state_dict["w"].dtype == dtype
    assert all(torch.equal(server[name], tensor) for name, tensor in before.items())


def test_a_bfloat16_server_takes_float32_clients_without_losing_their_step():
    server, clients = server_and_clients()
    small = {name: t.bfloat16() if t.is_floating_point() else t for name, t in server.items()}
    result = match_state_dicts(small, clients, c=0.4)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in small.items()}
    expected = stamp.SpatialMatcher(wide, c=0.4).step(clients).state
    assert all(torch.equal(result.state_dict[name], expected[name].to(t.dtype)) for name, t in small.items())


def test_the_module_has_a_state_of_its_own():
    net = torch.nn.Linear(2, 1, bias=False)
    start = {"weight": net.weight.detach().clone()}
    server, resumed = StateDictMatcher(net.state_dict()), StateDictMatcher()
    resumed.load_state_dict({"_extra_state": {"state": net.state_dict()}})
    with torch.no_grad():
        net.weight += 1.0
    for one in (server, resumed):
        assert torch.equal(one.state["weight"], start["weight"])
        moved = one([{"weight": start["weight"] + 1}, {"weight": start["weight"] + 3}])
        torch.testing.assert_close(moved["weight"], start["weight"] + 2)
    with pytest.raises(ValueError, match="state: 'b' is a NoneType; expected a tensor"):
        StateDictMatcher({"a": torch.ones(2), "b": None})


def test_a_state_beyond_the_range_of_the_servers_dtype_is_refused():
    server, client = {"w": torch.zeros(2).half()}, {"w": torch.full((2,), 60000.0)}
    keeps = StateDictMatcher(server, lr=2.0)
    with pytest.raises(ValueError, match=r"server_state: 'w' would exceed the range of its torch.float16"):
        keeps([client, client])
    assert torch.equal(keeps.state["w"], server["w"])


def test_the_module_names_its_clients():
    server, clients = server_and_clients()
    clients[2]["w"] = torch.full((6, 4), torch.nan)
    with pytest.raises(ValueError, match="states: gamma, 'w' is not finite"):
        StateDictMatcher(server)(clients, names=["alpha", "beta", "gamma", "delta"])


def test_deltas_and_states_agree_and_the_module_keeps_the_state():
    server, clients = server_and_clients()
    sent = [{name: tensor - server[name] for name, tensor in client.items()} for client in clients]
    whole, deltas = StateDictMatcher(server, c=0.3), StateDictMatcher(c=0.3)
    deltas.load_state_dict(StateDictMatcher(server).state_dict())
    for name, tensor in whole(clients, [1, 2, 3, 4]).items():
        # Subtracting the server's state and adding it again rounds twice, at the size of the state (below 3).
        torch.testing.assert_close(
            deltas(sent, [1, 2, 3, 4], deltas=True)[name] if name == "w" else deltas.state[name], tensor
        )
    assert torch.equal(whole.state["w"], match_state_dicts(server, clients, [1, 2, 3, 4], c=0.3).state_dict["w"])
    first = whole.state
    with pytest.raises(ValueError, match="client 1"):
        whole([clients[0], {"w": torch.ones(2)}])
    assert whole.state is first
    with pytest.raises(ValueError, match="states: beta has 'x', which"):
        match_state_dicts(server, [clients[0], clients[1] | {"x": torch.ones(1)}], names=["alpha", "beta"])
    with pytest.raises(ValueError, match="names: expected 4"):
        match_state_dicts(server, clients, names=["alpha"])
    with pytest.raises(ValueError, match="no global state yet"):
        StateDictMatcher()(clients)


def test_adapters_of_the_library_and_state_dicts_are_the_same_thing():
    clients = states()
    head = "base_model.model.head.weight"
    adapters = [Adapter(layers(c, SPELLINGS[0]), {head: c[head]}) for c in clients]
    expected = flora_na.aggregate(adapters, WEIGHTS, missing="zero")
    assert torch.equal(aggregate_state_dicts(clients, WEIGHTS).state_dict[head], expected.adapter.extras[head])
