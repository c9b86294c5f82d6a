"""The aggregators as FLARE calls them, without a simulator: weights, order, arrays, the global model."""

import json
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="runs in the venv of the extra 'nvflare'")

with warnings.catch_warnings():  # what FLARE warns of while it is imported is FLARE's to mend
    warnings.simplefilter("ignore")
    from nvflare.apis.fl_context import FLContextManager
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
    from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict

    from fedgram.bindings.nvflare import FloraNAAggregator, StampAggregator
    from fedgram_testing.nvflare_rounds import adapters, aggregated, models, same

from safetensors.torch import save_file

from fedgram.bindings.plain import aggregate_state_dicts, match_state_dicts


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
    swapped = [{name: array.astype(array.dtype.newbyteorder()) for name, array in state.items()} for state in arrays]
    assert same(aggregated(FloraNAAggregator(), models(swapped)).params, aggregate_state_dicts(states).state_dict)
    wide = aggregated(FloraNAAggregator(), models(adapters(dtype=torch.bfloat16))).params
    assert {value.dtype for value in wide.values()} == {torch.bfloat16}


def test_a_first_client_that_sends_nothing_changes_no_types():
    tensors = models([{}, *adapters(dtype=torch.bfloat16)])
    result = aggregated(FloraNAAggregator(missing="renormalize"), tensors).params
    assert {getattr(value, "dtype", None) for value in result.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [FloraNAAggregator, StampAggregator])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_that_flare_left_on_disk_are_tensors(kind, dtype, tmp_path):
    [start, *states] = adapters(3, dtype=dtype)
    files = []
    for number, state in enumerate(states):
        file = str(tmp_path / f"{number}.safetensors")
        save_file(state, file)
        lazy = LazyTensorDict({name: (file, name) for name in state}, str(tmp_path))
        files.append({name: lazy.make_lazy_ref(name) for name in state})
    result = aggregated(kind(), models(files), start=start).params
    assert {value.dtype for value in result.values()} == {dtype}
    assert same(result, aggregated(kind(), models(states), start=start).params)


def test_arrays_that_move_a_bfloat16_model_come_back_as_float32():
    [start, *states] = adapters(3)
    start = {name: tensor.bfloat16() for name, tensor in start.items()}
    arrays = [{name: tensor.numpy() for name, tensor in state.items()} for state in states]
    result = aggregated(StampAggregator(), models(arrays), start=start | {"frozen": start[next(iter(start))]}).params
    assert {value.dtype for value in result.values()} == {np.dtype(np.float32)}
    own = {name: value for name, value in result.items() if name != "frozen"}
    assert same(own, {n: t.float() for n, t in match_state_dicts(start, states).state_dict.items()})


def test_the_global_model_anchors_and_aligns():
    [start, *states] = adapters(4)
    anchored = aggregated(FloraNAAggregator("flora-na", anchor_previous=True), models(states), start=start)
    assert same(anchored.params, aggregate_state_dicts(states, method="flora-na", anchor=start).state_dict)
    aligned = aggregated(FloraNAAggregator("svd", align_previous=True), models(states), start=start)
    assert same(aligned.params, aggregate_state_dicts(states, method="svd", align_to=start).state_dict)
    assert not same(aligned.params, aggregate_state_dicts(states, method="svd").state_dict)


def test_a_module_that_the_global_model_lacks_is_not_aligned_and_told_of(tmp_path):
    [start, *states] = adapters(4)
    more = [state | {name.replace(".q.", ".v."): t for name, t in state.items()} for state in states]
    result = aggregated(FloraNAAggregator("svd", align_previous=True), models(more), start=start, folder=tmp_path)
    assert json.loads((tmp_path / "fedgram_round_0.json").read_text())["unaligned"] == ["v"]
    expected = {
        "q": aggregate_state_dicts(states, method="svd", align_to=start).state_dict,
        "v": aggregate_state_dicts(states, method="svd").state_dict,
    }
    for module, state in expected.items():
        for name, tensor in state.items():
            found = result.params[name.replace(".q.", f".{module}.")]
            torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^anchor_previous: v: the global adapter before this round has no such"):
        aggregated(FloraNAAggregator("flora-na", anchor_previous=True), models(more), start=start)


@pytest.mark.parametrize("make", [FloraNAAggregator, StampAggregator])
def test_of_a_client_of_weight_zero_nothing_is_looked_at(make, tmp_path):
    states = adapters()
    sent = models([*states, {"q.lora_A.weight": torch.ones(2, 2)}], [5.0, 1.0, 2.0, 0.0])
    sent[-1].params_type, sent[-1].metrics = ParamsType.DIFF, {}
    result = aggregated(make(), sent, start=states[0], folder=tmp_path)
    expected = aggregated(make(), sent[:3], start=states[0])
    assert same(result.params, expected.params)
    assert result.metrics == expected.metrics
    assert list(json.loads((tmp_path / "fedgram_round_0.json").read_text())["clients"]) == [
        "site-0",
        "site-1",
        "site-2",
    ]


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
    for model, alpha in zip(sent, (np.int64(8), np.float32(32)), strict=True):
        model.meta["lora_alpha"] = alpha
    assert same(aggregated(FloraNAAggregator(output_scaling=4.0), sent).params, expected.state_dict)
    del sent[1].meta["lora_alpha"]
    with pytest.raises(ValueError, match="site-1 does not state its own"):
        aggregated(FloraNAAggregator(output_scaling=4.0), sent)
    assert aggregated(FloraNAAggregator(lora_alpha=8), sent).params.keys() == states[0].keys()


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("differences", [False, True])
def test_what_no_client_of_a_round_sent_stays_in_the_global_adapter(differences, arrays, tmp_path):
    [start, *states] = adapters(3)
    other = {name.replace("base_model.model.q", "module.base_model.model.v"): t for name, t in start.items()}
    start = {"head": torch.ones(2)} | start | other
    aggregator = FloraNAAggregator("svd", missing="zero", align_previous=True)
    sent = [{k: t - start[k] if differences else t for k, t in state.items()} for state in states]
    sent = [{k: t.numpy() for k, t in state.items()} for state in sent] if arrays else sent
    kind = ParamsType.DIFF if differences else ParamsType.FULL
    result = aggregated(aggregator, models(sent, params_type=kind), start=start, folder=tmp_path)
    assert list(result.params) == list(start)
    assert all(np.array_equal(np.asarray(result.params[name]), start[name].numpy()) for name in ("head", *other))
    assert json.loads((tmp_path / "fedgram_round_0.json").read_text())["carried_over"] == ["head", *other]
    assert [path.name for path in tmp_path.iterdir()] == ["fedgram_round_0.json"]
    whole = [{**start, **state} for state in states]  # the module is back in the next round
    again = aggregated(aggregator, models(whole), start=result.params).params
    assert again.keys() == start.keys()


def test_an_entry_that_comes_under_another_spelling_is_not_there_twice():
    [start, *states] = adapters(3)
    wrapped = [{f"_orig_mod.{name}": tensor for name, tensor in state.items()} for state in states]
    assert list(aggregated(FloraNAAggregator(), models(wrapped), start=start).params) == list(wrapped[0])


def test_what_clients_did_not_send_stays_in_the_global_state():
    [start, *states] = adapters(3)
    start = start | {"frozen": torch.ones(2)}
    result = aggregated(StampAggregator(), models(states), start=start)
    assert list(result.params) == list(start)
    assert torch.equal(result.params["frozen"], torch.ones(2))
    own = {name: tensor for name, tensor in start.items() if name != "frozen"}
    assert same({k: v for k, v in result.params.items() if k != "frozen"}, match_state_dicts(own, states).state_dict)
