"""Options and replies that the strategies refuse, by option or by node; and the order in which they take replies."""

import itertools
import math

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from fedgram.bindings.flower import FloraNA, Stamp, lora_record, to_arrays
from fedgram_testing.factors import convolution
from fedgram_testing.flower_rounds import PREFIX, adapter, answer

pytestmark = pytest.mark.usefixtures("in_a_run")


def nan(state):
    state[f"{PREFIX}encoder.0.query.lora_A.weight"][0, 0] = math.nan
    return state


@pytest.mark.parametrize(
    ("strategy", "third", "more", "message"),
    [
        (FloraNA, nan(adapter(2)), {}, r"encoder\.0\.query.*node 405.*NaN"),
        (Stamp, nan(adapter(2)), {}, r"node 405"),
        (Stamp, adapter(2, rank=5), {}, r"node 405"),
        (FloraNA, adapter(2, rank=5), {}, r"node 405 has rank 5, node \d+ rank 4"),
        (FloraNA, adapter(2), {2: {"metrics": MetricRecord({"loss": 1.0})}}, "node 405: no 'num-examples'"),
        (FloraNA, adapter(2), {2: {"metrics": MetricRecord({"num-examples": -1})}}, "node 405: num-examples.*-1"),
        (FloraNA, adapter(2), {2: {"metrics": MetricRecord({"num-examples": math.nan})}}, "node 405: .*got nan"),
        (FloraNA, adapter(2), {2: {"metrics": MetricRecord({"num-examples": [1, 2]})}}, r"node 405: .*\[1, 2\]"),
        (FloraNA, adapter(2), {2: {"extra": MetricRecord()}}, "node 405 sent 2 MetricRecords"),
        (FloraNA, adapter(2), {2: {"extra": ArrayRecord()}}, "node 405 sent 2 ArrayRecords"),
        (
            FloraNA,
            adapter(2),
            {2: {"metrics": MetricRecord({"num-examples": 1, "loss": 1.0})}},
            "node 901 and node 405 differ in the metric 'loss'",
        ),
        (FloraNA, adapter(2), {2: {"lora": ConfigRecord({"lora-config": "{"})}}, "node 405: lora-config"),
    ],
)
def test_a_reply_that_cannot_be_used_is_refused_by_node_and_reason(strategy, third, more, message):
    with pytest.raises(ValueError, match=message):
        answer(strategy(), [adapter(0), adapter(1), third], more=more)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FloraNA(method="best"), "method: expected one of .*'best'"),
        (lambda: FloraNA(method="fedavg", align_previous=True), "align_previous"),
        (lambda: FloraNA(reply_order="time"), "reply_order: expected content or node, got 'time'"),
        (lambda: FloraNA(rank=-1), "rank: expected an integer from 1 to 16384"),
        (lambda: FloraNA(rank="auto:2"), "rank: .*'auto:2'"),
        (lambda: FloraNA(rank=4, method="stack"), "rank: method 'stack'"),
        (lambda: FloraNA(shared=True, method="als"), "shared: "),
        (lambda: FloraNA(missing="skip"), "missing: expected one of error, renormalize, zero, got 'skip'"),
        (lambda: FloraNA(backend="cuda"), "backend: expected one of auto, .*'cuda'"),
        (lambda: FloraNA(lora_alpha=8, scalings=2), "lora_alpha: give this or scalings"),
        (lambda: FloraNA(scalings=2, config={"r": 4}), "scalings: give this or config"),
        (lambda: FloraNA(lora_alpha=-0.0), r"lora_alpha: expected a finite number other than 0, got -0\.0"),
        (lambda: FloraNA(scalings="2"), "scalings: expected a finite number"),
        (lambda: FloraNA(output_scaling="x"), "output_scaling: expected a finite number"),
        (lambda: FloraNA(output_scaling={"a": 1.0, "b": math.nan}), "output_scaling: b: expected a finite number"),
        (lambda: FloraNA(config=3), r"config: expected a peft\.LoraConfig or a mapping, got int"),
        (lambda: FloraNA(config={"peft_type": "IA3"}), "config: peft_type 'IA3' is not supported"),
        (lambda: FloraNA(config={"r": 4, "use_dora": True}), "config: .*DoRA"),
        (lambda: FloraNA(clip="much"), "clip: "),
        (lambda: FloraNA(min_cosine=3), "min_cosine: "),
        (lambda: Stamp(c=1.0), "c: "),
        (lambda: Stamp(lr=math.inf), "lr: "),
        (lambda: Stamp(rescale="other"), "rescale"),
        (lambda: Stamp(backend="cuda"), "backend: expected one of auto, .*'cuda'"),
        (lambda: Stamp(deltas="no"), "deltas: expected True or False, got 'no'"),
    ],
)
def test_options_are_checked_before_any_client_works(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("strategy", [FloraNA, Stamp])
def test_an_array_that_cannot_be_read_is_refused_by_node(strategy):
    states = [adapter(k) for k in range(3)]
    broken = to_arrays(states[2])
    broken[f"{PREFIX}classifier.weight"] = Array("float32", (3, 10), "numpy.ndarray", b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match=r"node 405: base_model\.model\.classifier\.weight: not an array"):
        answer(strategy(), states, more={2: {"arrays": broken}})


def test_layers_with_another_kernel_are_refused_by_node():
    states = [convolution(2, 3), convolution(2, 3), convolution(3, 2)]
    with pytest.raises(ValueError, match=r"c: node \d+ has lora_A .*, node \d+ lora_A .*: not the same layer"):
        answer(FloraNA(), states)


def test_settings_of_another_method_are_refused_by_node():
    other = {"lora": lora_record({"peft_type": "IA3", "r": 4, "lora_alpha": 8})}
    lora = {"lora": lora_record({"peft_type": "LORA", "r": 4, "lora_alpha": 8})}
    with pytest.raises(ValueError, match="config of node 405: peft_type 'IA3' is not supported: only 'LORA' is"):
        answer(FloraNA(), [adapter(k) for k in range(3)], more={0: lora, 1: lora, 2: other})


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ([0.5], "a list of 2 and a list of 1"),
        (0.5, "a list of 2 and one number"),
    ],
)
def test_a_metric_of_another_length_is_refused_by_node(odd, message):
    losses = ([0.5, 0.25], [0.5, 0.25], odd)
    more = {k: {"metrics": MetricRecord({"num-examples": 10, "loss": loss})} for k, loss in enumerate(losses)}
    with pytest.raises(ValueError, match=f"node 17 and node 405 differ in the metric 'loss': {message}"):
        answer(FloraNA(reply_order="node"), [adapter(k) for k in range(3)], more=more)


def test_a_function_of_the_users_takes_metrics_of_any_length():
    def count(contents, key):
        return MetricRecord({"numbers": sum(len(content["metrics"]["loss"]) for content in contents)})

    more = {k: {"metrics": MetricRecord({"num-examples": 10, "loss": [0.5] * (k + 1)})} for k in range(3)}
    _, metrics = answer(FloraNA(train_metrics_aggr_fn=count), [adapter(k) for k in range(3)], more=more)
    assert metrics["numbers"] == 6


def test_the_order_of_arrival_changes_no_bit_even_where_arrays_are_the_same():
    """Three nodes that sent the same arrays, of the same weight, with alphas and losses of their own."""
    more = {
        k: {
            "lora": lora_record({"r": 4, "lora_alpha": alpha}),
            "metrics": MetricRecord({"num-examples": 10, "loss": loss}),
        }
        for k, (alpha, loss) in enumerate([(8.0, 0.1), (1.7, 0.7), (3.3, 1 / 3)])
    }
    found = []
    for arrival in itertools.permutations(range(3)):
        arrays, metrics = answer(FloraNA(output_scaling=2.0), [adapter(7)] * 3, [10] * 3, more=more, arrival=arrival)
        found.append(({name: array.data for name, array in arrays.items()}, dict(metrics)))
    assert all(one == found[0] for one in found)
