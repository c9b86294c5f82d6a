"""Rounds and options that the aggregators refuse, by client or by option."""

import math
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="runs in the venv of the extra 'nvflare'")

with warnings.catch_warnings():  # what FLARE warns of while it is imported is FLARE's to mend
    warnings.simplefilter("ignore")
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

    from fedgram.bindings.nvflare import FloraNAAggregator, StampAggregator
    from fedgram_testing.nvflare_rounds import adapters, aggregated, models


def bad_rounds():
    states = adapters(2)
    nan = [states[0], {name: torch.full_like(t, torch.nan) for name, t in states[1].items()}]
    mixed = models(states)
    mixed[1].params_type = ParamsType.DIFF
    half = models(states)
    del half[1].meta["NUM_STEPS_CURRENT_ROUND"]
    metrics_alone = [models(states)[0], FLModel(metrics={"a": 1.0}, meta=half[0].meta | {"client_name": "site-1"})]
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
        "object": (FloraNAAggregator(), models([{"a": np.array([None])}]), None, "a: site-0 has an array that is no"),
        "strings": (
            StampAggregator(),
            models([{"a": np.array(["x"])}]),
            states[0],
            "a: site-0 has an array that is no",
        ),
        "long double": (
            FloraNAAggregator(),
            models([{"a": np.ones(1, np.longdouble)}]),
            None,
            "a: site-0 has an array",
        ),
        "huge number": (FloraNAAggregator(), models([{"a": 10**30}]), None, "a: site-0 has an array that is no tensor"),
        "metrics alone": (FloraNAAggregator(), metrics_alone, None, "params: site-1 has a NoneType"),
        "key": (FloraNAAggregator(), models([states[0] | {3: torch.ones(1)}]), None, "site-0 has the key 3"),
        "negative weight": (FloraNAAggregator(), models(states, [1.0, -1.0]), None, "site-1 states -1.0 in its meta"),
        "huge weight": (FloraNAAggregator(), models(states, [1.0, 10**400]), None, "site-1 states 1000"),
        "alpha": (
            FloraNAAggregator(),
            models(states[:1], meta={"lora_alpha": "8"}),
            None,
            "lora_alpha: site-0 has '8'",
        ),
        "text": (FloraNAAggregator(), models([{"a": "x"}, {"a": "y"}]), None, "a: site-0 has a str"),
    }


@pytest.mark.parametrize("case", list(bad_rounds()))
def test_a_round_that_is_not_sound_is_refused(case):
    aggregator, sent, start, message = bad_rounds()[case]
    with pytest.raises(ValueError, match=message):
        aggregated(aggregator, sent, start=start)
    states = adapters(2)  # nothing of it is left for the next round
    assert aggregated(aggregator, models(states), start=states[0]).params.keys() == states[0].keys()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (FloraNAAggregator, {"method": "mean"}, "method: expected one of fedavg"),
        (FloraNAAggregator, {"method": "fedavg", "align_previous": True}, "align_previous: only als and svd"),
        (FloraNAAggregator, {"missing": "skip"}, "missing: expected one of error"),
        (FloraNAAggregator, {"rank": -2}, "rank: "),
        (FloraNAAggregator, {"shared": True}, "shared: "),
        (FloraNAAggregator, {"backend": "cuda"}, "backend: "),
        (FloraNAAggregator, {"clip": "much"}, "clip: "),
        (FloraNAAggregator, {"min_cosine": 3}, "min_cosine: "),
        (FloraNAAggregator, {"lora_alpha": 8, "scalings": 1}, "lora_alpha: give this or scalings"),
        (FloraNAAggregator, {"lora_alpha": math.nan}, "lora_alpha: expected a finite number other than 0, got nan"),
        (FloraNAAggregator, {"lora_alpha": torch.tensor(8.0)}, "lora_alpha: expected a finite number"),
        (FloraNAAggregator, {"output_scaling": 0}, "output_scaling: "),
        (FloraNAAggregator, {"config": 3}, "config: expected a peft.LoraConfig or a mapping, got int"),
        (FloraNAAggregator, {"config": {"peft_type": "IA3"}}, "config: peft_type 'IA3' is not supported"),
        (StampAggregator, {"c": 2}, "c: "),
        (StampAggregator, {"lr": math.nan}, "lr: "),
        (StampAggregator, {"rescale": "x"}, "rescale: "),
        (StampAggregator, {"backend": "cuda"}, "backend: "),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
