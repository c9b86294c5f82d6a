"""The examples for other frameworks: their own part runs without them and gives what the library gives."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from fedgram import stamp
from fedgram.bindings.plain import aggregate_state_dicts
from fedgram_testing.peft_adapters import adapted, peft_deltas, quietly

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "plain"


def example(name):
    spec = importlib.util.spec_from_file_location(f"plain_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    quietly(spec.loader.exec_module, module)
    return module


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


OPTIONS = {"r": 2, "lora_alpha": 6, "target_modules": ["0"], "modules_to_save": ["2"]}


@pytest.mark.filterwarnings("ignore")  # peft's remarks on training in a loop
def test_the_loop_learns(capsys):
    loop = example("loop")
    loop.ROUNDS = 2
    # Ten classes, so chance is 0.1. Seen: 0.67 and 0.87; other versions of torch train a little otherwise.
    assert loop.adapters() > 0.45
    assert loop.whole_models() > 0.65
    assert capsys.readouterr().out.count("round") == 4


def test_appfl_aggregates_by_sample_size_whatever_the_order():
    sent = {c: get_peft_model_state_dict(adapted(network(), seed=s, **OPTIONS)) for s, c in enumerate(["b", "a"])}
    aggregator = example("appfl_aggregator").FloraNAAggregator(
        {"method": "svd", "lora_alpha": 6, "num_clients": 2, "gradient_based": False}
    )
    assert aggregator.get_parameters() == {}
    for client, size in (("a", 10), ("b", 30)):
        aggregator.set_client_sample_size(client, size)
    expected = aggregate_state_dicts([sent["a"], sent["b"]], [10, 30], method="svd").state_dict
    for models in (sent, dict(reversed(sent.items()))):
        found = aggregator.aggregate(models)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(aggregator.get_parameters()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_based": True}, "gradient_based: the clients' whole state is needed"),
        ({"method": "mean"}, "method: expected one of"),
        ({"client_weights": "equal"}, "aggregator_kwargs: .*'client_weights'"),
    ],
)
def test_appfl_is_told_of_wrong_options_at_the_start(options, message):
    with pytest.raises(ValueError, match=message):
        example("appfl_aggregator").FloraNAAggregator(options)


def test_fluke_models_with_lora_have_their_running_statistics_averaged():
    def make(seed):
        return adapted(nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)), seed=seed, **OPTIONS)

    server, clients = make(0), [make(1), make(2)]
    for k, client in enumerate(clients):
        client.train()
        for _ in range(k + 1):
            client(torch.randn(16, 6, generator=torch.Generator().manual_seed(k)))
    example("fluke_server").aggregate_into(server, clients, [0.25, 0.75])
    for name in ("running_mean", "running_var"):
        key = f"base_model.model.1.{name}"
        one, two = (client.state_dict()[key] for client in clients)
        torch.testing.assert_close(server.state_dict()[key], 0.25 * one + 0.75 * two)
        assert not torch.equal(one, two)


def test_fluke_models_with_lora_are_are_aggregated_and_others_matched():
    module, weights = example("fluke_server"), [0.25, 0.75]
    clients = [adapted(network(), seed=seed, **OPTIONS) for seed in range(2)]
    server = quietly(lambda: get_peft_model(network(), LoraConfig(**OPTIONS)))
    evidence = module.aggregate_into(server, clients, weights)
    assert 0 < evidence["rho"] < evidence["rho_fedavg"]
    deltas = [peft_deltas(client)["0"].double() for client in clients]
    W = 0.25 * deltas[0] + 0.75 * deltas[1]
    rho = float((peft_deltas(server)["0"].double() - W).norm() / W.norm())
    assert rho == pytest.approx(evidence["rho"], rel=1e-4)
    plain = [network(seed) for seed in (1, 2)]
    whole = network()
    expected = stamp.SpatialMatcher(whole.state_dict(), c=0.25).step([c.state_dict() for c in plain], weights)
    assert module.aggregate_into(whole, plain, weights)["status"] == expected.dual.status
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in expected.state.items())
