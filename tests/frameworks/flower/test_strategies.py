"""The strategies on real Flower messages, against the library, against Flower's FedAvg and against dense sums."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedgram import flora_na, stamp
from fedgram.bindings.flower import FloraNA, Stamp, lora_record, to_arrays, to_state_dict
from fedgram.flora_na import LoraLayer
from fedgram_testing.flower_rounds import COUNTS, MODULES, NODES, PREFIX, Nodes, adapter, answer

pytestmark = pytest.mark.usefixtures("in_a_run")
EPS = torch.finfo(torch.float32).eps


def layers(state, scaling=1.0):
    return {
        name: LoraLayer(
            A=state[f"{PREFIX}{name}.lora_A.weight"].float(), B=state[f"{PREFIX}{name}.lora_B.weight"].float(),
            scaling=scaling,
        )
        for name in MODULES
    }  # fmt: skip


def update(state, name, scaling=1.0):
    return scaling * state[f"{PREFIX}{name}.lora_B.weight"].double() @ state[f"{PREFIX}{name}.lora_A.weight"].double()


def weighted(states, scalings, name):
    return sum(n / sum(COUNTS) * update(s, name, a) for n, s, a in zip(COUNTS, states, scalings, strict=True))


@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd"])
def test_the_result_and_the_figures_are_the_librarys_own(method):
    states = [adapter(k) for k in range(3)]
    strategy = FloraNA(method=method, reply_order="node")
    arrays, metrics = answer(strategy, states)
    by_node = sorted(range(3), key=lambda k: NODES[k])
    expected = flora_na.aggregate([layers(states[k]) for k in by_node], [COUNTS[k] for k in by_node], method=method)
    back = to_state_dict(arrays)
    for name, layer in expected.adapter.modules.items():
        assert torch.equal(back[f"{PREFIX}{name}.lora_A.weight"], layer.A)
        assert torch.equal(back[f"{PREFIX}{name}.lora_B.weight"], layer.B)
    mean = sum(n / sum(COUNTS) * s[f"{PREFIX}classifier.weight"].double() for n, s in zip(COUNTS, states, strict=True))
    assert torch.allclose(back[f"{PREFIX}classifier.weight"].double(), mean, rtol=EPS, atol=EPS)  # one rounding
    assert metrics["fedgram-rho"] == expected.report.rho
    assert metrics["fedgram-rho-fedavg"] == expected.report.rho_fedavg
    assert metrics["fedgram-rho-optimal"] == expected.report.rho_optimal
    assert metrics["fedgram-clients"] == 3
    size = to_arrays(states[0]).count_bytes()
    assert metrics["fedgram-bytes-received"] == metrics["fedgram-bytes-sent"] == 3 * size
    assert strategy.reports[1]["clients"] == pytest.approx({"node 901": 0.3, "node 17": 0.1, "node 405": 0.6})
    assert set(strategy.reports[1]["modules"]) == set(MODULES)


def test_with_method_fedavg_it_is_flowers_fedavg():
    states = [adapter(k) for k in range(3)]
    ours = to_state_dict(answer(FloraNA(method="fedavg"), states)[0])
    theirs = to_state_dict(answer(FedAvg(), states)[0])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Flower adds three float32 terms with a rounding each, in entries of at most about 4.
        assert torch.allclose(ours[name].double(), tensor.double(), rtol=0, atol=4 * 4 * EPS), name


@pytest.mark.parametrize("strategy", [FloraNA, Stamp])
def test_neither_arrival_nor_node_ids_change_a_bit(strategy):
    states = [adapter(k) for k in range(3)]
    first, _ = answer(strategy(), states)
    second, _ = answer(strategy(), states, arrival=(2, 0, 1), nodes=(5, 1000, 77))
    assert {n: a.data for n, a in first.items()} == {n: a.data for n, a in second.items()}


def test_replies_in_order_of_their_nodes():
    seen = []

    def spy(contents, key):
        seen.extend(content["metrics"][key] for content in contents)
        return MetricRecord({"spied": 1.0})

    strategy = FloraNA(reply_order="node", train_metrics_aggr_fn=spy)
    _, metrics = answer(strategy, [adapter(k) for k in range(3)], arrival=(1, 2, 0))
    assert seen == [10, 60, 30]  # nodes 17, 405, 901
    assert metrics["spied"] == 1.0
    assert 0 < metrics["fedgram-rho"] < 1


def test_scalings_come_with_the_replies():
    states = [adapter(0), adapter(1, rank=2), adapter(2)]
    config = {"peft_type": "LORA", "target_modules": ["query", "value"]}
    records = {
        0: {"lora": lora_record(config | {"r": 4, "lora_alpha": 8})},
        1: {"lora": lora_record(config | {"r": 2, "lora_alpha": 8, "use_rslora": True})},
        2: {"lora": lora_record(config | {"r": 4, "lora_alpha": 4, "alpha_pattern": {"0.query": 12}})},
    }
    arrays, _ = answer(FloraNA(method="svd", rank=10, output_scaling=2.0), states, more=records)
    back = to_state_dict(arrays)
    for name, last in {"encoder.0.query": 3.0, "encoder.1.value": 1.0}.items():
        expected = weighted(states, (2.0, 8 / math.sqrt(2), last), name)
        # rank 10 holds the sum of ranks 4, 2 and 4 whole: what is left is the rounding of two float32 factors
        assert (update(back, name, 2.0) - expected).norm() <= 10 * EPS * expected.norm()


def test_settings_of_the_server_serve_those_who_send_none():
    states = [adapter(k) for k in range(3)]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    records = {1: {"lora": lora_record(config | {"lora_alpha": 4})}}
    with pytest.raises(ValueError, match=r"node \d+ sent no lora_record, others did"):
        answer(FloraNA(), states, more=records)
    strategy = FloraNA(method="svd", rank=9, config=config, output_scaling=1.0)
    back = to_state_dict(answer(strategy, states, more=records)[0])
    expected = weighted(states, (2.0, 1.0, 2.0), "encoder.1.value")
    assert (update(back, "encoder.1.value") - expected).norm() <= 10 * EPS * expected.norm()


@pytest.mark.parametrize("option", [{"lora_alpha": 8.0}, {"scalings": 2.0}])
def test_one_scaling_for_all_is_the_receivers_scaling(option):
    states = [adapter(k) for k in range(3)]
    told, plain = (answer(FloraNA(method="svd", **o), states) for o in (option, {}))
    for name, tensor in to_state_dict(plain[0]).items():
        assert torch.equal(to_state_dict(told[0])[name], tensor)


@pytest.mark.parametrize("method", ["flora-na", "als"])
def test_the_anchor_is_what_was_sent(method):
    start, states = adapter(99), [adapter(k) for k in range(3)]
    arrays, metrics = answer(FloraNA(method=method, anchor_previous=True, reply_order="node"), states, start=start)
    order = sorted(range(3), key=lambda k: NODES[k])
    expected = flora_na.aggregate(
        [layers(states[k]) for k in order], [COUNTS[k] for k in order], method=method, anchor=layers(start)
    )
    assert metrics["fedgram-rho"] == expected.report.rho
    assert metrics["fedgram-rho"] != answer(FloraNA(method=method, reply_order="node"), states)[1]["fedgram-rho"]
    for name, layer in expected.adapter.modules.items():
        assert torch.equal(to_state_dict(arrays)[f"{PREFIX}{name}.lora_A.weight"], layer.A)


def test_alignment_turns_the_factors_and_not_the_update():
    start, states = adapter(99), [adapter(k) for k in range(3)]
    plain = to_state_dict(answer(FloraNA(), states, start=start)[0])
    turned = to_state_dict(answer(FloraNA(align_previous=True), states, start=start)[0])

    def distance(state):
        return sum((state[k] - start[k]).square().sum() for k in start if "lora" in k).sqrt()

    assert distance(turned) < 0.99 * distance(plain)
    for name in MODULES:
        assert (update(turned, name) - update(plain, name)).norm() <= 20 * EPS * update(plain, name).norm()


def test_a_first_round_that_starts_from_zero_can_be_aligned_and_anchored():
    start = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in adapter(99).items()}
    for option in ({"align_previous": True}, {"anchor_previous": True}):
        _, metrics = answer(FloraNA(**option), [adapter(k) for k in range(3)], start=start)
        assert metrics["fedgram-rho"] <= metrics["fedgram-rho-fedavg"]


def test_a_round_of_lower_ranks_is_not_scaled_for_them_without_a_word():
    """What was sent out has rank 8: a node of that rank would multiply by half of what the others do."""
    start, low = adapter(99, rank=8), [adapter(k) for k in range(3)]
    with pytest.raises(ValueError, match=r"encoder\.0\.query: align_previous: .* rank 8, .* in output_scaling"):
        answer(FloraNA(lora_alpha=16, align_previous=True), low, start=start)
    for told in ({"lora_alpha": 16, "output_scaling": 2.0}, {"scalings": 2.0}):
        back = to_state_dict(answer(FloraNA(method="svd", align_previous=True, **told), low, start=start)[0])
        own = 4.0 if "lora_alpha" in told else 2.0
        for name in MODULES:
            W = sum(c * update(s, name, own) for c, s in zip(COUNTS, low, strict=True)) / sum(COUNTS)
            best = float(torch.linalg.svdvals(W)[8:].norm())
            assert float((update(back, name, 2.0) - W).norm()) <= best + 1e-5 * float(W.norm())


@pytest.mark.parametrize(
    "strategy", [FloraNA(clip=np.float32(2), min_cosine=np.float64(-1)), Stamp(c=np.float32(0.5), lr=np.float32(1))]
)
def test_reports_of_numpy_options_are_ready_for_json(strategy):
    answer(strategy, [adapter(k) for k in range(3)])
    assert json.loads(json.dumps(strategy.reports[1]))


def test_a_module_that_was_not_sent_out_is_not_aligned_and_told_of(caplog):
    start, states = adapter(99), [adapter(k) for k in range(3)]
    part = {name: tensor for name, tensor in start.items() if "encoder.1" not in name}
    strategy = FloraNA(align_previous=True)
    with caplog.at_level("INFO", logger="flwr"):
        turned = to_state_dict(answer(strategy, states, start=part)[0])
    assert strategy.reports[1]["unaligned"] == ["encoder.1.value"]
    assert "not aligned, since the clients were not sent any: encoder.1.value" in caplog.text
    whole = FloraNA(align_previous=True)
    for module, expected in (("0.query", answer(whole, states, start=start)), ("1.value", answer(FloraNA(), states))):
        for side in "AB":
            name = f"{PREFIX}encoder.{module}.lora_{side}.weight"
            torch.testing.assert_close(turned[name], to_state_dict(expected[0])[name], rtol=1e-4, atol=1e-5)
    assert whole.reports[1]["unaligned"] == []
    with pytest.raises(ValueError, match=r"^anchor_previous: encoder\.1\.value: the global adapter before this round"):
        answer(FloraNA(method="flora-na", anchor_previous=True), states, start=part)


@pytest.mark.parametrize("pack", [True, False])
def test_bfloat16_clients(pack):
    states = [adapter(k, dtype=torch.bfloat16) for k in range(3)]
    arrays, metrics = answer(FloraNA(method="svd", reply_order="node"), states, pack=pack)
    back = to_state_dict(arrays)
    order = sorted(range(3), key=lambda k: NODES[k])
    exact = flora_na.aggregate([layers(states[k]) for k in order], [COUNTS[k] for k in order], method="svd")
    for name, layer in exact.adapter.modules.items():
        A = back[f"{PREFIX}{name}.lora_A.weight"]
        assert A.dtype == (torch.bfloat16 if pack else torch.float32)
        # One rounding to bfloat16 (half of 2^-7 relative) where it came packed, none beyond float32's otherwise.
        assert ((A.double() - layer.A.double()).abs() <= layer.A.double().abs() * (2**-8 if pack else 4 * EPS)).all()
    assert metrics["fedgram-bytes-received"] < metrics["fedgram-bytes-sent"] or not pack


def test_a_first_round_without_arrays_has_nothing_to_be_anchored_in():
    states = [adapter(k) for k in range(3)]
    arrays, _ = answer(FloraNA(anchor_previous=True, align_previous=True), states, start={})
    expected, _ = answer(FloraNA(), states, start={})
    assert {n: a.data for n, a in arrays.items()} == {n: a.data for n, a in expected.items()}
    with pytest.raises(ValueError, match=r"no global state to move: .* started without arrays"):
        answer(Stamp(), states, start={})


def test_modules_that_a_client_lacks():
    states = [adapter(0), adapter(1, modules={"encoder.0.query": (12, 10)}), adapter(2)]
    with pytest.raises(ValueError, match=r"encoder\.1\.value: node 17 has no such module"):
        answer(FloraNA(), states)
    back = to_state_dict(answer(FloraNA(missing="renormalize", method="svd", rank=9), states)[0])
    expected = (30 * update(states[0], "encoder.1.value") + 60 * update(states[2], "encoder.1.value")) / 90
    assert (update(back, "encoder.1.value") - expected).norm() <= 10 * EPS * expected.norm()


def test_what_no_node_of_a_round_sent_stays_as_it_was(caplog):
    strategy, start = FloraNA(missing="zero", anchor_previous=True), {"extra": torch.ones(2)} | adapter(99)
    part = [{name: t for name, t in adapter(k).items() if "encoder.1" not in name} for k in range(3)]
    with caplog.at_level("INFO", logger="flwr"):
        arrays, _ = answer(strategy, part, start=start)
    back = to_state_dict(arrays)
    assert list(back) == list(start)
    lacking = [name for name in start if name not in part[0]]
    assert strategy.reports[1]["carried_over"] == lacking
    assert "carried over as it was: extra, " in caplog.text
    assert all(torch.equal(back[name], start[name]) for name in lacking)
    arrays, _ = answer(strategy, [adapter(k) for k in range(3)], start=back)  # the module is back, and has its anchor
    assert list(arrays) == list(start)
    assert strategy.reports[1]["carried_over"] == ["extra"]


@pytest.mark.parametrize("make", [FloraNA, Stamp])
@pytest.mark.parametrize("more", [{}, {0: {"lora": lora_record({"r": 4})}, 1: {"lora": lora_record({"r": 4})}}])
def test_of_a_node_without_examples_nothing_is_looked_at(make, more):
    states, odd = [adapter(0), adapter(1)], {f"{PREFIX}encoder.0.query.lora_A.weight": torch.ones(2, 2)}
    strategy = make()
    arrays, metrics = answer(strategy, [*states, odd], (30, 10, 0), more=more)
    expected, _ = answer(make(), states, (30, 10), nodes=NODES[:2], more=more)
    assert {n: a.data for n, a in arrays.items()} == {n: a.data for n, a in expected.items()}
    assert metrics["fedgram-clients"] == 3
    assert set(strategy.reports[1]["clients" if make is FloraNA else "weights"]) == {"node 901", "node 17"}
    with pytest.raises(ValueError, match=r"weights|counts"):
        answer(make(), states, (0, 0), nodes=NODES[:2])


@pytest.mark.parametrize("option", [{"clip": "0.9x"}, {"min_cosine": 0.5}])
def test_long_and_odd_updates_are_screened(option):
    states = [adapter(k) for k in range(3)]
    strategy = FloraNA(reply_order="node", **option)
    arrays, metrics = answer(strategy, states)
    order = sorted(range(3), key=lambda k: NODES[k])
    expected = flora_na.aggregate([layers(states[k]) for k in order], [COUNTS[k] for k in order], **option)
    assert metrics["fedgram-rho"] == expected.report.rho
    assert strategy.reports[1]["screening"]["clipped"] or strategy.reports[1]["screening"]["dropped"]
    for name, layer in expected.adapter.modules.items():
        assert torch.equal(to_state_dict(arrays)[f"{PREFIX}{name}.lora_A.weight"], layer.A)


def test_what_the_pair_leaves_out_is_kept_for_the_server():
    states = [adapter(k) for k in range(3)]
    strategy = FloraNA(residual=True)
    back = to_state_dict(answer(strategy, states)[0])
    for name in MODULES:
        whole = update(back, name) + update(strategy.residual, name)
        expected = weighted(states, (1, 1, 1), name)
        assert (whole - expected).norm() <= 50 * EPS * expected.norm()


def test_stamp_is_the_spatial_matcher_from_what_was_sent():
    start, states = adapter(99), [adapter(k) for k in range(3)]
    strategy = Stamp(c=0.4, lr=0.7, reply_order="node")
    arrays, metrics = answer(strategy, states, start=start)
    order = sorted(range(3), key=lambda k: NODES[k])
    step = stamp.SpatialMatcher(start, c=0.4, lr=0.7).step([states[k] for k in order], [COUNTS[k] for k in order])
    back = to_state_dict(arrays)
    assert back.keys() == start.keys()
    for name, tensor in step.state.items():
        assert torch.equal(back[name], tensor)
    assert metrics["fedgram-gap"] == step.dual.relative_gap <= 1e-9
    assert metrics["fedgram-objective"] == step.dual.objective
    assert list(strategy.reports[1]["weights"]) == ["node 17", "node 405", "node 901"]
    assert sum(strategy.reports[1]["weights"].values()) == pytest.approx(1)


def test_stamp_without_strength_is_flowers_fedavg():
    states = [adapter(k) for k in range(3)]
    ours, theirs = to_state_dict(answer(Stamp(c=0.0), states)[0]), to_state_dict(answer(FedAvg(), states)[0])
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name].double(), tensor.double(), rtol=0, atol=4 * 4 * EPS), name


def test_stamp_takes_deltas_too():
    start, states = adapter(99), [adapter(k) for k in range(3)]
    deltas = [{k: s[k] - start[k] for k in s} for s in states]
    whole = to_state_dict(answer(Stamp(c=0.4), states, start=start)[0])
    by_deltas = to_state_dict(answer(Stamp(c=0.4, deltas=True), deltas, start=start)[0])
    for name in whole:
        assert torch.allclose(whole[name], by_deltas[name], rtol=0, atol=1e-5)


def test_stamp_keeps_the_servers_dtype_for_bfloat16_clients():
    start, states = adapter(99), [adapter(k, dtype=torch.bfloat16) for k in range(3)]
    back = to_state_dict(answer(Stamp(), states, start=start)[0])
    wide = to_state_dict(answer(Stamp(), [{k: t.float() for k, t in s.items()} for s in states], start=start)[0])
    for name in start:
        assert back[name].dtype == torch.float32
        assert torch.equal(back[name], wide[name])


def test_stamp_needs_to_have_sent_something():
    other = FedAvg()
    messages = other.configure_train(1, to_arrays(adapter(9)), ConfigRecord(), Nodes())
    content = {"arrays": to_arrays(adapter(1)), "metrics": MetricRecord({"num-examples": 1})}
    replies = [Message(RecordDict(content), reply_to=message) for message in messages]
    with pytest.raises(ValueError, match="before configure_train"):
        Stamp().aggregate_train(1, replies)


def test_it_is_configured_like_fedavg():
    strategy = FloraNA(
        fraction_train=0.5, min_train_nodes=1, min_available_nodes=1, weighted_by_key="n", arrayrecord_key="model",
        configrecord_key="settings", fraction_evaluate=0.0,
    )  # fmt: skip
    assert isinstance(strategy, FedAvg)
    messages = strategy.configure_train(3, to_arrays(adapter(0)), ConfigRecord({"lr": 0.1}), Nodes(range(1, 9)))
    assert len(messages) == 4
    assert dict(messages[0].content["settings"]) == {"lr": 0.1, "server-round": 3}
    assert isinstance(messages[0].content["model"], ArrayRecord)
    replies = [
        Message(
            RecordDict({"anything": to_arrays(adapter(k)), "m": MetricRecord({"n": k, "loss": float(k)})}), reply_to=m
        )
        for k, m in enumerate(messages)
    ]
    _, metrics = strategy.aggregate_train(3, replies)
    assert metrics["loss"] == pytest.approx((1 + 4 + 9) / 6)
    assert list(strategy.configure_evaluate(3, to_arrays(adapter(0)), ConfigRecord(), Nodes())) == []
    with pytest.raises(TypeError, match="fraction_fit"):
        FloraNA(fraction_fit=0.5)


def test_failures_are_left_out_and_a_round_without_replies_changes_nothing():
    strategy = FloraNA()
    messages = list(strategy.configure_train(1, to_arrays(adapter(9)), ConfigRecord(), Nodes()))
    good = [
        Message(RecordDict({"a": to_arrays(adapter(k)), "m": MetricRecord({"num-examples": 1})}), reply_to=messages[k])
        for k in range(2)
    ]
    bad = Message(Error(code=1, reason="out of memory"), reply_to=messages[2])
    _, metrics = strategy.aggregate_train(1, [good[0], bad, good[1]])
    assert metrics["fedgram-clients"] == 2
    assert strategy.aggregate_train(2, [bad]) == (None, None)
    assert strategy.aggregate_train(2, []) == (None, None)
    assert list(strategy.reports) == [1]


def test_the_summary_names_the_options(caplog):
    with caplog.at_level("INFO", logger="flwr"):
        FloraNA(method="svd").summary()
        Stamp(c=0.125).summary()
    assert "method='svd'" in caplog.text
    assert "c=0.125" in caplog.text


@pytest.mark.parametrize("make", [FloraNA, Stamp])
def test_flowers_differential_privacy_wraps_them(make):
    """Clipping that clips nothing and noise of size zero leave the update as it is."""
    states = [adapter(k) for k in range(3)]
    wrapped = DifferentialPrivacyServerSideFixedClipping(
        make(), noise_multiplier=0.0, clipping_norm=1e9, num_sampled_clients=3
    )
    arrays, metrics = answer(wrapped, states)
    alone = to_state_dict(answer(make(), states)[0])
    for name in MODULES:
        # The wrapper rounds start + (state - start) in float32, of entries of a few units.
        assert (update(to_state_dict(arrays), name) - update(alone, name)).norm() <= 1e-5 * update(alone, name).norm()
    assert metrics["fedgram-clients"] == 3
