"""State dicts whose clients, modules or receivers have scalings of their own; what is sent, and the rho that it has."""

from collections import UserDict, UserList
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig

from fedgram import flora_na
from fedgram.bindings.modules import StateDictAggregator
from fedgram.bindings.plain import aggregate_state_dicts
from fedgram.flora_na import LoraLayer
from fedgram_testing.lora_states import SHAPES, SPELLINGS, WEIGHTS, layers, states, target


@pytest.mark.parametrize("how", ["lora_alpha", "scalings", "config"])
def test_unequal_scalings_come_out_at_the_scaling_of_the_receivers(how):
    clients, alphas, out = states(rank=[4, 2, 3]), [8.0, 16.0, 3.0], 2.5
    scalings = [a / r for a, r in zip(alphas, [4, 2, 3], strict=True)]
    given = {
        "lora_alpha": alphas,
        "scalings": scalings,
        "config": [{"r": r, "lora_alpha": a} for r, a in zip([4, 2, 3], alphas, strict=True)],
    }[how]
    result = aggregate_state_dicts(clients, WEIGHTS, method="stack", output_scaling=out, **{how: given})
    assert result.scalings == dict.fromkeys(SHAPES, out)
    for name in SHAPES:
        W = target(clients, name, scalings, WEIGHTS, SPELLINGS[0])
        layer = layers(result.state_dict, SPELLINGS[0], out)[name]
        # Stacked float32 factors carry one rounding each of sqrt(w s / out): the product moves by eps ||B_u|| ||A_u||,
        # a few times ||W|| in all for clients that agree as these do.
        assert float((layer.scaling * layer.B.double() @ layer.A.double() - W).norm()) < 1e-6 * float(W.norm())
        assert result.report.modules[name].norm == pytest.approx(float(W.norm()), rel=1e-5)


TOLD = {
    "lora_alpha": (16.0, 16.0),
    "config": ({"r": 8, "lora_alpha": 16}, {"r": 4, "lora_alpha": 16}),
    "scalings": (2.0, 4.0),
    None: (None, None),
}


@pytest.mark.parametrize(("option", "method"), [("align_previous", "svd"), ("anchor_previous", "als")])
@pytest.mark.parametrize("how", list(TOLD))
def test_a_round_of_lower_ranks_is_not_scaled_for_them_without_a_word(how, option, method):
    """Clients of rank 8, then some of rank 4: the result has rank 8 again, and its receivers scale by 16 / 8."""
    first, second = ({} if how is None else {how: told} for told in TOLD[how])
    low = states(rank=4, seed=2)
    aggregator = StateDictAggregator(method, **{option: True})
    before = aggregator(states(rank=8, seed=1), WEIGHTS, **first)
    with pytest.raises(
        ValueError, match=rf"^layer\.q: {option}: .* rank 8, the clients' 4 at most.* in output_scaling"
    ):
        aggregator(low, WEIGHTS, **second)
    assert aggregator.previous == before
    if how is not None:
        aggregator.output_scaling = 2.0
        state = aggregator(low, WEIGHTS, **second)
        for name in SHAPES:
            W, layer = target(low, name, [4.0] * 3, WEIGHTS, SPELLINGS[0]), layers(state, SPELLINGS[0])[name]
            assert layer.rank == 8
            error = float((2.0 * layer.B.double() @ layer.A.double() - W).norm())
            assert error <= (aggregator.report.modules[name].rho + 1e-5) * float(W.norm())


def test_a_round_of_lower_ranks_and_the_same_scaling_needs_no_word():
    aggregator, low = StateDictAggregator("svd", align_previous=True), states(rank=4, seed=2)
    aggregator(states(rank=8, seed=1), WEIGHTS, config={"r": 8, "lora_alpha": 16})
    state = aggregator(low, WEIGHTS, config={"r": 4, "lora_alpha": 8})
    assert aggregator.scalings == dict.fromkeys(SHAPES, 2.0)
    assert {layer.rank for layer in layers(state, SPELLINGS[0]).values()} == {8}
    start = states(rank=8, seed=1)[0]
    for argument in ("anchor", "align_to"):  # of which nothing is known
        aggregate_state_dicts(low, scalings=2.0, **{argument: start})
        with pytest.raises(ValueError, match=f"^layer.q: {argument}: the earlier factors have rank 8, the clients' 4"):
            aggregate_state_dicts(low, config={"r": 4, "lora_alpha": 8}, **{argument: start})
    aggregate_state_dicts(low, config={"r": 4, "lora_alpha": 8}, rank=4, anchor=start)  # the result is of their rank


@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als"])
def test_an_anchor_made_for_another_scaling_is_not_read_by_the_clients(method):
    """Clients of rank 4, then of rank 8: by their alpha the last result, made for 16 / 4, would count half."""
    aggregator, clients = StateDictAggregator(method, anchor_previous=True), states(rank=8, seed=2)
    before = aggregator(states(rank=4, seed=1), WEIGHTS, lora_alpha=16)
    with pytest.raises(ValueError, match=r"^layer\.q: anchor_previous: .* scaling of 4, the clients' is now 2: say in"):
        aggregator(clients, WEIGHTS, lora_alpha=16)
    assert aggregator.previous == before
    aggregator.output_scaling = 4.0
    state = aggregator(clients, WEIGHTS, lora_alpha=16)
    start = {name: replace(layer, scaling=4.0) for name, layer in layers(before, SPELLINGS[0]).items()}
    own = [{n: replace(x, scaling=2.0) for n, x in layers(c, SPELLINGS[0]).items()} for c in clients]
    expected = flora_na.aggregate(own, WEIGHTS, method=method, anchor=start).adapter.modules
    for name, layer in layers(state, SPELLINGS[0]).items():
        assert torch.allclose(4.0 * layer.B @ layer.A, expected[name].delta(), rtol=1e-4, atol=1e-5)


def test_rslora_and_patterns_of_a_config_are_heeded():
    clients = states(rank=4)
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, alpha_pattern={"layer.v": 10}, target_modules={"q", "v"})
    result = aggregate_state_dicts(clients, config=config)
    assert result.scalings == {"layer.q": 3.0, "layer.v": 5.0}
    plain = aggregate_state_dicts(clients)  # one scaling for all clients, whichever: the same factors
    assert all(torch.equal(result.state_dict[name], tensor) for name, tensor in plain.state_dict.items())
    assert result.report.modules["layer.q"].norm == pytest.approx(3 * plain.report.modules["layer.q"].norm)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("peft", ["base_model.model.", ""])
def test_anchored_patterns_see_the_names_that_peft_sees(peft, wrapper):
    if wrapper == "module." and not peft:
        return  # that may be a layer of the model's own: see the refusals
    spelling = f"{wrapper}{peft}{{module}}.lora_{{side}}.weight"
    configs = [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8, "alpha_pattern": {"^layer.q": 32}}]
    clients = states(2, spelling=spelling)
    result = aggregate_state_dicts(clients, config=configs, output_scaling={"layer.q": 1.0, "layer.v": 2.0}, rank=8)
    assert list(result.state_dict) == list(clients[0])
    assert list(result.report.modules) == list(result.scalings) == list(SHAPES)
    for name, scalings in {"layer.q": (2.0, 8.0), "layer.v": (2.0, 2.0)}.items():
        W = target(clients, name, scalings, [1.0, 1.0], spelling)
        layer = layers(result.state_dict, spelling, result.scalings[name])[name]
        assert float((layer.scaling * layer.B.double() @ layer.A.double() - W).norm()) < 1e-5 * float(W.norm())


def test_a_layer_of_ones_own_called_module_is_not_taken_for_a_wrapper():
    spelling = "module.{module}.lora_{side}.weight"
    clients = states(2, spelling=spelling)
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {"module.layer.q": 4, "layer.v": 4}, "alpha_pattern": {"q": 4}}
    result = aggregate_state_dicts(clients, config=config)
    assert result.scalings == {"module.layer.q": 1.0, "module.layer.v": 2.0}


@pytest.mark.parametrize(
    "options", [{"method": "flora-na", "shared": True}, {"clip": 40.0}, {"clip": "0.9x"}, {"min_cosine": 0.85}]
)
def test_what_spans_modules_weighs_them_by_their_scalings(options):
    clients = states()
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"layer.v": -28}}
    result = aggregate_state_dicts(clients, WEIGHTS, config=config, **options)
    scaled = [
        {name: LoraLayer(A=x.A, B=x.B, scaling={"layer.q": 2.0, "layer.v": -7.0}[name]) for name, x in client.items()}
        for client in (layers(c, SPELLINGS[0]) for c in clients)
    ]
    expected = flora_na.aggregate(scaled, WEIGHTS, **options)
    for name, layer in expected.adapter.modules.items():
        found = layers(result.state_dict, SPELLINGS[0], result.scalings[name])[name]
        torch.testing.assert_close(found.delta(), layer.delta(), rtol=1e-4, atol=1e-4)
    assert result.report.rho == pytest.approx(expected.report.rho, rel=1e-4, abs=1e-6)
    if expected.report.screening is not None:
        screening = result.report.screening
        assert screening.clipped == expected.report.screening.clipped
        assert screening.dropped == expected.report.screening.dropped
        torch.testing.assert_close(screening.norms, expected.report.screening.norms)
        assert bool(screening.clipped) or bool(screening.dropped)


@pytest.mark.parametrize("number", [8, np.int64(8), np.float32(8), np.float16(8)])
def test_numbers_of_numpy_are_numbers(number):
    expected = aggregate_state_dicts(states(), lora_alpha=8).scalings
    assert aggregate_state_dicts(states(), lora_alpha=number).scalings == expected
    assert aggregate_state_dicts(states(), lora_alpha=np.array([number] * 3)).scalings == expected


def test_a_config_of_mappings_and_sequences_that_are_no_dicts_and_lists():
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {"q|v": 4}, "alpha_pattern": {"^layer.v": 16}, "bias": "none"}
    wrapped = UserDict(
        {key: UserDict(value) if isinstance(value, dict) else value for key, value in config.items()}
        | {"modules_to_save": UserList(["head"]), "target_modules": ("q", "v"), "exclude_modules": frozenset({"x"})}
    )
    assert aggregate_state_dicts(states(), config=wrapped).scalings == {"layer.q": 2.0, "layer.v": 4.0}
    assert aggregate_state_dicts(states(), config=UserList([wrapped] * 3)).scalings["layer.v"] == 4.0


PATTERNS = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"layer.v": 7}}


@pytest.mark.parametrize("sent", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{"method": "svd"}, {"method": "svd", "clip": "1x"}, {"method": "stack"}])
def test_rho_and_residual_are_those_of_what_is_sent(options, held, sent):
    clients = states(dtype=held)
    dtypes = dict.fromkeys(clients[0], sent)
    result = aggregate_state_dicts(clients, config=PATTERNS, residual=True, dtypes=dtypes, **options)
    assert {tensor.dtype for tensor in result.state_dict.values()} == {sent}
    passed = torch.ones(3, dtype=torch.float64) if result.report.screening is None else result.report.screening.factors
    for name, t in result.scalings.items():
        W = target(clients, name, [t * float(x) for x in passed], [1.0] * 3, SPELLINGS[0])
        layer = layers(result.state_dict, SPELLINGS[0])[name]
        rest = layers(result.residual, SPELLINGS[0])[name]
        left = W - t * layer.B.double() @ layer.A.double()
        rho = float(left.norm() / W.norm())
        # True to three digits, down to where the rounding of the factors' own products begins.
        assert result.report.modules[name].rho == pytest.approx(rho, rel=1e-3, abs=1e-12)
        assert float((t * rest.B.double() @ rest.A.double() - left).norm()) < 1e-5 * float(W.norm())
