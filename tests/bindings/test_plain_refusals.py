"""State dicts, scalings and weights that are refused, each by client, module or argument."""

import re
from types import SimpleNamespace

import pytest
import torch

from fedgram.bindings.plain import aggregate_state_dicts, match_state_dicts
from fedgram_testing.factors import convolution

SHAPES = {"layer.q": (12, 10), "layer.v": (9, 10)}


def states(*ranks):
    """One client per rank."""
    generator = torch.Generator().manual_seed(0)
    prefix = "base_model.model."
    return [
        {
            f"{prefix}{name}.lora_{side}.weight": torch.randn((r, n) if side == "A" else (m, r), generator=generator)
            for name, (m, n) in SHAPES.items()
            for side in "AB"
        }
        for r in ranks
    ]


def linear(name, n):
    return {f"{name}.lora_A.weight": torch.ones(2, n), f"{name}.lora_B.weight": torch.ones(4, 2)}


def named(**extra):
    return states(4)[0] | extra


REFUSED = {
    "two adapters": ([named(**{"layer.q.lora_A.second.weight": torch.ones(4, 10)})], {}, "layer.q: client 0 has two"),
    "half a pair": ([{"a.lora_A.weight": torch.ones(2, 3)}], {}, "a: client 0 has no lora_B"),
    "DoRA": ([named(**{"layer.q.lora_magnitude_vector": torch.ones(12)})], {}, "layer.q: client 0: DoRA"),
    "lora_bias": ([named(**{"layer.q.lora_B.bias": torch.ones(12)})], {}, "layer.q: client 0: lora_bias"),
    "experts": ([{f"e.base_layer.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}], {}, "target_parameters"),
    "unknown kind": ([named(**{"layer.q.lora_C.weight": torch.ones(2)})], {}, "unknown kind of LoRA tensor"),
    "bare layer": ([{"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(3, 2)}], {}, "unknown kind"),
    "grouped convolution": (
        [{"c.lora_A.weight": torch.ones(4, 2, 3, 3), "c.lora_B.weight": torch.ones(8, 2, 1, 1)}],
        {},
        "c: client 0: .* do not multiply",
    ),
    "not a tensor": ([named(x=3)], {}, "x: client 0 has a int"),
    "no factors": ([{"head.weight": torch.ones(2)}], {}, "no client has a LoRA module"),
    "nan": ([named(**{"layer.q.lora_A.weight": torch.full((4, 10), torch.nan)})], {}, "layer.q"),
    "ranks without scalings": (states(4, 2), {}, "client 1 has rank 2, client 0 rank 4"),
    "no output scaling": (states(4, 4), {"scalings": [1.0, 2.0]}, "layer.q: client 1 scales by 2, client 0 by 1"),
    "zero scaling": (states(4, 4), {"scalings": 0.0}, "scalings: client 0 has 0.0"),
    "number of alphas": (states(4, 4), {"lora_alpha": [1.0]}, "lora_alpha: expected one, or 2"),
    "two ways": (states(4, 4), {"lora_alpha": 1.0, "scalings": 1.0}, "lora_alpha: give this or scalings"),
    "config's rank": (states(4, 4), {"config": {"r": 8}}, "client 0 has rank 4, its config 8"),
    "a wrapper's prefix or a layer's name": (
        [{f"module.{k.removeprefix('base_model.model.')}": t for k, t in states(4)[0].items()}],
        {"config": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"^layer.v": 32}}},
        r"module\.layer\.v: client 0: its config scales by 2, or by 8 where 'module\.' is only Dist",
    ),
    "config's kind": (states(4, 4), {"config": {"r": 4, "use_dora": True}}, "config of client 0: .*DoRA"),
    "not a config": (states(4, 4), {"config": SimpleNamespace(r=4)}, "expected a peft.LoraConfig"),
    "config of another method": (
        states(4, 4),
        {"config": {"r": 4, "peft_type": "IA3"}},
        "config of client 0: peft_type 'IA3'",
    ),
    "huge alpha": (states(4, 4), {"lora_alpha": 10**400}, "lora_alpha: client 0 has 1000"),
    "kernels": (
        [convolution(2, 3), convolution(3, 2)],
        {},
        r"c: client 1 has lora_A \(2, 3, 3, 2\), client 0 lora_A \(2, 3, 2, 3\): not the same layer",
    ),
    "convolution and linear": ([convolution(2, 3), linear("c", 18)], {}, r"c: client 1 has lora_A \(2, 18\), client 0"),
    "embedding and linear": (
        [{"c.lora_embedding_A": torch.ones(2, 18), "c.lora_embedding_B": torch.ones(4, 2)}, linear("c", 18)],
        {},
        "c: client 1 has lora_A .*, client 0 lora_embedding_A",
    ),
    "another anchor": (
        [convolution(2, 3)] * 2,
        {"anchor": convolution(3, 2)},
        "c: anchor has lora_A .*, the clients lora_A .*: not the same layer",
    ),
    "another layer to align to": ([convolution(2, 3)] * 2, {"align_to": linear("c", 18)}, "c: align_to has lora_A"),
    "beyond float16": (
        [{name: tensor.half() for name, tensor in state.items()} for state in states(4, 4)],
        {"scalings": 1.0, "output_scaling": {"layer.q": 1.0, "layer.v": 1e-10}, "clip": "2x"},
        r"layer\.v\.lora_A\.weight: the new value exceeds 65504, the largest number of torch\.float16",
    ),
    "beyond the dtype to return": (
        [{"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.full((2, 1), 1e6)}],
        {"dtypes": {"a.lora_B.weight": torch.float16}, "method": "fedavg"},
        r"a\.lora_B\.weight: the new value exceeds 65504, the largest number of torch\.float16",
    ),
    "names": (states(4, 4), {"names": ["a"]}, "names: expected 2"),
    "no clients": ([], {}, "at least one client"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_sure_is_refused(case):
    clients, options, message = REFUSED[case]
    if case == "two adapters":
        clients = [{k.removeprefix("base_model.model."): v for k, v in clients[0].items()}]
    with pytest.raises(ValueError, match=message):
        aggregate_state_dicts(clients, **options)


def test_a_client_that_takes_no_part_may_have_other_layers():
    weights = [1.0, 0.0]
    result = aggregate_state_dicts([convolution(2, 3), convolution(3, 2)], weights)
    assert result.state_dict["c.lora_A.weight"].shape == (2, 3, 2, 3)


@pytest.mark.parametrize(
    ("odd", "options"),
    [
        ({"q.lora_A.weight": torch.ones(2, 3)}, {}),
        ({"q.lora_magnitude_vector.weight": torch.ones(2)}, {}),
        ({"q.lora_A.weight": 1}, {}),
        ({0: torch.ones(2)}, {}),
        (linear("layer.q", 7), {"config": [{"r": 4}, {"r": 4}, {"r": 8}]}),
        ({}, {"config": [{"r": 4}, {"r": 4}, {"r": 4, "use_dora": True}]}),
        ({}, {"scalings": [2.0, 2.0, None]}),
        ({}, {"lora_alpha": [8, 8, torch.nan]}),
    ],
)
def test_of_a_client_that_takes_no_part_nothing_is_looked_at(odd, options):
    clients, told = states(4, 4), {name: each[:2] for name, each in options.items()}
    result = aggregate_state_dicts([*clients, odd], [3, 1, 0], **options)
    expected = aggregate_state_dicts(clients, [3, 1], **told)
    assert result.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(tensor, expected.state_dict[key]) for key, tensor in result.state_dict.items())
    assert result.scalings == expected.scalings


def test_keys_that_are_no_names_are_refused():
    client = states(4)[0]
    with pytest.raises(ValueError, match="state_dicts: client 1 has the key 0; expected names"):
        aggregate_state_dicts([client, {0: torch.ones(2)}])


@pytest.mark.parametrize(("server", "client"), [("float32", "float8_e4m3fn"), ("float8_e4m3fn", "bfloat16")])
def test_dtypes_that_do_not_go_together_are_refused_by_client(server, client):
    server, client = ({"w": torch.ones(2).to(getattr(torch, dtype))} for dtype in (server, client))
    with pytest.raises(ValueError, match=r"states: beta, 'w' has dtype torch\..*; expected torch\."):
        match_state_dicts(server, [server, client], names=["alpha", "beta"])


BY_LABEL = {
    "weights": ({"weights": [1.0, -1.0]}, "weights: beta has -1.0"),
    "scalings": ({"scalings": [1.0, 0.0]}, "scalings: beta has 0.0"),
    "config": ({"config": [{"r": 4}, {"r": 4, "use_dora": True}]}, "config of beta: .*DoRA"),
    "rank": ({"config": [{"r": 4}, {"r": 8}]}, "layer.q: beta has rank 4, its config 8"),
}


@pytest.mark.parametrize("case", BY_LABEL)
def test_whatever_is_wrong_with_a_client_is_said_by_its_label(case):
    options, message = BY_LABEL[case]
    with pytest.raises(ValueError, match=message):
        aggregate_state_dicts(states(4, 4), names=["alpha", "beta"], **options)


@pytest.mark.parametrize("entry", ["client 99", "client 0", "client 1's", 'a "client 1"'])
def test_an_entry_that_is_called_like_a_client_is_none(entry):
    nan, one = torch.full((1,), torch.nan), torch.ones(1)
    message = re.escape(f"states: the global state, {entry!r} is not finite")
    with pytest.raises(ValueError, match=message):
        match_state_dicts({entry: nan}, [{entry: one}, {entry: one}], names=["alpha", "beta"])
    with pytest.raises(ValueError, match=re.escape(f"states: beta has {entry!r}")):
        match_state_dicts({"x": one}, [{}, {"x": one}, {"x": one, entry: one}], [0, 1, 1], names=["", "alpha", "beta"])
    with pytest.raises(ValueError, match=r"names: expected 1 \(one per client\), got 2"):
        match_state_dicts({"x": one}, [{"x": one}], names=["alpha", "beta"])
