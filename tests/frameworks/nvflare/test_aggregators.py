"""The aggregators as FLARE calls them, without a simulator: weights, order, differences, arrays, refusals."""

import json
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="runs in the venv of the extra 'nvflare'")

with warnings.catch_warnings():  # what FLARE warns of while it is imported is FLARE's to mend
    warnings.simplefilter("ignore")
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContextManager
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.abstract.model import make_model_learnable
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
    from nvflare.fuel.utils.component_builder import ComponentBuilder

    from fedgram.bindings.nvflare import AdapterModel, FloraNAAggregator, FloraNARecipe, StampAggregator

from safetensors.torch import save_file

from fedgram.bindings.plain import aggregate_state_dicts, match_state_dicts


def adapters(count=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = {"A": torch.randn(4, 10, generator=generator), "B": torch.randn(12, 4, generator=generator)}
    return [
        {
            f"base_model.model.q.lora_{side}.weight": (t + 0.3 * torch.randn(t.shape, generator=generator)).to(dtype)
            for side, t in common.items()
        }
        for _ in range(count)
    ]


def models(states, weights=None, **options):
    """One FLModel per client, as the controller hands them over."""
    weights = [1.0] * len(states) if weights is None else weights
    return [
        FLModel(
            params=state,
            metrics={"accuracy": 0.1 * i},
            current_round=0,
            meta={"client_name": f"site-{i}", "NUM_STEPS_CURRENT_ROUND": weight} | options.pop("meta", {}),
            **options,
        )
        for i, (state, weight) in enumerate(zip(states, weights, strict=True))
    ]


def aggregated(aggregator, sent, *, start=None, folder=None):
    """What the aggregator makes of one round."""
    context = FLContextManager().new_context()
    if start is not None:
        learnable = make_model_learnable(weights=start, meta_props={})
        context.set_prop(AppConstants.GLOBAL_MODEL, learnable, private=True, sticky=True)
    if folder is not None:
        context.set_prop(FLContextKey.APP_ROOT, str(folder), private=True, sticky=True)
    aggregator.fl_ctx = context
    aggregator.reset_stats()
    for model in sent:
        aggregator.accept_model(model)
    return aggregator.aggregate_model()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd"])
def test_it_is_the_plain_function_whatever_the_order_of_arrival(method, tmp_path):
    states, weights = adapters(), [5.0, 1.0, 2.0]
    expected = aggregate_state_dicts(states, weights, method=method)
    sent = models(states, weights)
    result = aggregated(FloraNAAggregator(method), reversed(sent), folder=tmp_path)
    assert same(result.params, expected.state_dict)
    assert result.params_type == ParamsType.FULL
    assert result.metrics["accuracy"] == pytest.approx((0.1 * 1 + 0.2 * 2) / 8)
    assert result.meta["fedgram"]["rho"] == expected.report.rho
    report = json.loads((tmp_path / "fedgram_round_0.json").read_text())
    assert report["rho_optimal"] == expected.report.rho_optimal
    assert list(report["clients"]) == ["site-0", "site-1", "site-2"]


def test_scatter_and_gather_names_clients_by_their_context():
    states, aggregator = adapters(), FloraNAAggregator()
    server = FLContextManager(identity_name="server").new_context()
    for i in (2, 0, 1):
        sent = FLModel(params=states[i], meta={"NUM_STEPS_CURRENT_ROUND": i + 1})
        server.set_peer_context(FLContextManager(identity_name=f"site-{i}").new_context())
        assert aggregator.accept(FLModelUtils.to_shareable(sent), server)
    result = FLModelUtils.from_shareable(aggregator.aggregate(server))
    assert same(result.params, aggregate_state_dicts(states, [1, 2, 3]).state_dict)
    with pytest.raises(ValueError, match="no client's model arrived"):
        aggregator.aggregate(server)


def test_arrays_come_back_as_arrays_and_bfloat16_as_bfloat16():
    states = adapters()
    arrays = [{name: tensor.numpy() for name, tensor in state.items()} for state in states]
    result = aggregated(FloraNAAggregator(), models(arrays)).params
    assert all(isinstance(value, np.ndarray) for value in result.values())
    assert same(result, aggregate_state_dicts(states).state_dict)
    wide = aggregated(FloraNAAggregator(), models(adapters(dtype=torch.bfloat16))).params
    assert {value.dtype for value in wide.values()} == {torch.bfloat16}


def test_differences_count_from_the_global_model():
    [start, *states] = adapters(4)
    differences = [{name: tensor - start[name] for name, tensor in state.items()} for state in states]
    result = aggregated(FloraNAAggregator(), models(differences, params_type="DIFF"), start=start)
    again = [{name: tensor + start[name] for name, tensor in d.items()} for d in differences]
    assert same(result.params, aggregate_state_dicts(again).state_dict)
    stamped = aggregated(StampAggregator(c=0.4), models(differences, params_type="DIFF"), start=start)
    assert same(stamped.params, match_state_dicts(start, differences, c=0.4, deltas=True).state_dict)


def test_the_global_model_anchors_and_aligns():
    [start, *states] = adapters(4)
    anchored = aggregated(FloraNAAggregator("flora-na", anchor_previous=True), models(states), start=start)
    assert same(anchored.params, aggregate_state_dicts(states, method="flora-na", anchor=start).state_dict)
    aligned = aggregated(FloraNAAggregator("svd", align_previous=True), models(states), start=start)
    assert same(aligned.params, aggregate_state_dicts(states, method="svd", align_to=start).state_dict)
    assert not same(aligned.params, aggregate_state_dicts(states, method="svd").state_dict)


def test_clients_state_their_own_alpha():
    states = adapters(2)
    sent = models(states)
    for model, alpha in zip(sent, (8, 32), strict=True):
        model.meta["lora_alpha"] = alpha
    with pytest.raises(ValueError, match="site-1 scales by 8, site-0 by 2"):
        aggregated(FloraNAAggregator(), sent)
    result = aggregated(FloraNAAggregator(output_scaling=4.0), sent)
    expected = aggregate_state_dicts(states, lora_alpha=[8, 32], output_scaling=4.0, names=["site-0", "site-1"])
    assert same(result.params, expected.state_dict)
    del sent[1].meta["lora_alpha"]
    with pytest.raises(ValueError, match="site-1 does not state its own"):
        aggregated(FloraNAAggregator(output_scaling=4.0), sent)
    assert aggregated(FloraNAAggregator(lora_alpha=8), sent).params.keys() == states[0].keys()


def test_what_clients_did_not_send_stays_in_the_global_state():
    [start, *states] = adapters(3)
    start = start | {"frozen": torch.ones(2)}
    result = aggregated(StampAggregator(), models(states), start=start)
    assert list(result.params) == list(start)
    assert torch.equal(result.params["frozen"], torch.ones(2))
    own = {name: tensor for name, tensor in start.items() if name != "frozen"}
    assert same({k: v for k, v in result.params.items() if k != "frozen"}, match_state_dicts(own, states).state_dict)


def bad_rounds():
    states = adapters(2)
    nan = [states[0], {name: torch.full_like(t, torch.nan) for name, t in states[1].items()}]
    mixed = models(states)
    mixed[1].params_type = ParamsType.DIFF
    half = models(states)
    del half[1].meta["NUM_STEPS_CURRENT_ROUND"]
    twice = models(states)
    twice[1].meta["client_name"] = "site-0"
    return {
        "nobody": (FloraNAAggregator(), [], None, "no client's model arrived"),
        "nan": (FloraNAAggregator(), models(nan), None, "q: .*site-1"),
        "nan for STAMP": (StampAggregator(), models(nan), states[0], "states: site-1, .*lora_A.* is not finite"),
        "kinds": (FloraNAAggregator(), mixed, None, "whole models and others differences"),
        "weights": (FloraNAAggregator(), half, None, "NUM_STEPS_CURRENT_ROUND: site-1 states None"),
        "twice": (FloraNAAggregator(), twice, None, "site-0: sent more than one"),
        "no global model": (StampAggregator(), models(states), None, "no global model to start from"),
        "unknown entry": (StampAggregator(), models(states), {"x": torch.ones(1)}, "site-0 sent it"),
        "list": (FloraNAAggregator(), models([[1.0], [2.0]]), None, "site-0 has a list"),
        "text": (FloraNAAggregator(), models([{"a": "x"}, {"a": "y"}]), None, "a: site-0 has a str"),
    }


@pytest.mark.parametrize("case", list(bad_rounds()))
def test_a_round_that_is_not_sound_is_refused(case):
    aggregator, sent, start, message = bad_rounds()[case]
    with pytest.raises(ValueError, match=message):
        aggregated(aggregator, sent, start=start)
    states = adapters(2)  # nothing of it is left for the next round
    assert aggregated(aggregator, models(states), start=states[0]).params.keys() == states[0].keys()


def test_options_that_cannot_work_are_refused_at_once():
    with pytest.raises(ValueError, match="method: expected one of fedavg"):
        FloraNAAggregator("mean")
    with pytest.raises(ValueError, match="align_previous: only als and svd"):
        FloraNAAggregator("fedavg", align_previous=True)
    with pytest.raises(ValueError, match="adapter: give this or model"):
        FloraNARecipe(min_clients=2, train_script="client.py")


def test_a_job_names_the_aggregator_and_the_server_builds_it_again(tmp_path):
    script = tmp_path / "client.py"
    script.write_text("")
    save_file(adapters()[0], tmp_path / "adapter_model.safetensors")
    aggregator = FloraNAAggregator("svd", rank=3, config={"r": 4, "lora_alpha": 8}, align_previous=True)
    recipe = FloraNARecipe(
        name="named", adapter=tmp_path, aggregator=aggregator, min_clients=2, train_script=str(script)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe.export(str(tmp_path / "jobs"))
    configs = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "jobs" / "named").rglob("config_fed_server.json"))
    ]
    assert len(configs) == 1
    assert not list((tmp_path / "jobs").rglob("flora_na"))  # the library is installed on the server, not shipped
    [workflow] = configs[0]["workflows"]
    described = workflow["args"]["aggregator"]

    class Builder(ComponentBuilder):
        def get_module_scanner(self):
            return None

    built = Builder().build_component(described)
    assert type(built) is FloraNAAggregator
    assert vars(built).keys() == vars(aggregator).keys()
    for name in ("method", "rank", "config", "align_previous", "weighted_by", "report"):
        assert getattr(built, name) == getattr(aggregator, name)
    [persistor] = [c for c in configs[0]["components"] if c["id"] == "persistor"]
    model = Builder().build_component(persistor["args"]["model"])
    assert type(model) is AdapterModel
    assert same(model.state_dict(), adapters()[0])
