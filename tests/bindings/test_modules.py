"""The aggregator as a module: the same numbers as the function, the last round as state, checkpoints."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig

from fedgram import flora_na
from fedgram.bindings.modules import LoraAggregator, StateDictAggregator, StateDictMatcher
from fedgram.bindings.peft import load_adapter, save_adapter
from fedgram.flora_na import Adapter, LoraLayer
from fedgram_testing.lora_states import states
from fedgram_testing.peft_adapters import load_with_peft, mlp, write_client

WEIGHTS = [8.0, 1.0, 1.0]


def clients(seed: int, count: int = 3) -> list[Adapter]:
    generator = torch.Generator().manual_seed(seed)

    def layer(m: int, n: int, r: int) -> LoraLayer:
        A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
        return LoraLayer(A=A, B=B, scaling=0.5)

    return [
        Adapter({"q": layer(7, 6, 2), "v": layer(5, 6, 3)}, {"head": torch.randn(4, generator=generator)})
        for _ in range(count)
    ]


def same_layers(a: Adapter, b: Adapter) -> bool:
    return a.modules.keys() == b.modules.keys() and all(
        torch.equal(a.modules[name].A, b.modules[name].A) and torch.equal(a.modules[name].B, b.modules[name].B)
        for name in a.modules
    )


def same(a: Adapter, b: Adapter) -> bool:
    return same_layers(a, b) and torch.equal(a.extras["head"], b.extras["head"])


@pytest.mark.parametrize("method", flora_na.METHODS)
def test_forward_is_aggregate(method):
    aggregator = LoraAggregator(method, residual=True)
    result = aggregator(clients(0), WEIGHTS, names=["a", "b", "c"])
    expected = flora_na.aggregate(clients(0), WEIGHTS, method=method, residual=True)
    assert same(result, expected.adapter)
    assert aggregator.report.rho == expected.report.rho
    assert list(aggregator.report.clients) == ["a", "b", "c"]
    assert torch.equal(aggregator.residual.modules["q"].B, expected.residual.modules["q"].B)
    assert aggregator.previous is result


def test_rank_and_shared_are_passed_on():
    assert LoraAggregator("svd", rank=1)(clients(0)).modules["v"].rank == 1
    shared = LoraAggregator("flora-na", shared=True)
    shared(clients(0), WEIGHTS)
    assert shared.report.rho == flora_na.aggregate(clients(0), WEIGHTS, method="flora-na", shared=True).report.rho


def test_the_previous_round_anchors_the_next():
    aggregator = LoraAggregator("flora-na", anchor_previous=True)
    first = aggregator(clients(0), WEIGHTS)
    assert same(first, flora_na.aggregate(clients(0), WEIGHTS, method="flora-na").adapter)
    second = aggregator(clients(1), WEIGHTS)
    assert same(second, flora_na.aggregate(clients(1), WEIGHTS, method="flora-na", anchor=first).adapter)
    assert not same(second, flora_na.aggregate(clients(1), WEIGHTS, method="flora-na").adapter)


def test_what_no_client_of_a_round_has_stays_as_it_was():
    aggregator = LoraAggregator(missing="zero", anchor_previous=True)
    first = aggregator(clients(0), WEIGHTS)
    part = [Adapter({"q": client.modules["q"]}) for client in clients(1)]
    second = aggregator(part, WEIGHTS)
    assert list(second.modules) == ["q", "v"]
    assert second.modules["v"] is first.modules["v"]
    assert second.extras["head"] is first.extras["head"]
    expected = flora_na.aggregate(part, WEIGHTS, anchor=first)
    assert torch.equal(second.modules["q"].A, expected.adapter.modules["q"].A)
    assert list(aggregator.report.modules) == ["q"]
    assert list(aggregator(clients(2), WEIGHTS).modules) == ["q", "v"]  # "v" is back, and has its anchor


def test_state_dicts_that_no_client_of_a_round_has_stay_as_they_were():
    spelling = "base_model.model.{module}.lora_{side}.weight"
    aggregator = StateDictAggregator("svd", residual=True, align_previous=True)
    first = aggregator(states(seed=1), WEIGHTS, lora_alpha=8)
    part = [{f"module.{k}": t for k, t in state.items() if ".v." not in k} for state in states(seed=2)]
    second = aggregator(part, WEIGHTS, lora_alpha=8)
    kept = [spelling.format(module="layer.v", side=side) for side in "AB"]
    assert sorted(second) == sorted([*part[0], *kept])
    assert all(second[name] is first[name] for name in kept)
    assert aggregator.scalings == {"layer.q": 2.0, "layer.v": 2.0}
    assert aggregator.residual.keys() == {name for name in part[0] if "lora" in name}
    assert aggregator(states(seed=3), WEIGHTS, lora_alpha=8).keys() == first.keys()


def test_clip_and_an_automatic_rank_are_passed_on():
    aggregator = LoraAggregator("svd", rank="auto:0.8", clip="0.9x", min_cosine=-1.0)
    expected = flora_na.aggregate(clients(0), method="svd", rank="auto:0.8", clip="0.9x", min_cosine=-1.0)
    assert same(aggregator(clients(0)), expected.adapter)
    assert aggregator.report.screening.clipped == expected.report.screening.clipped != []


@pytest.mark.parametrize("method", ["als", "svd"])
def test_the_previous_round_aligns_the_next(method):
    aggregator = LoraAggregator(method, align_previous=True)
    first = aggregator(clients(0), WEIGHTS)
    second = aggregator(clients(1), WEIGHTS)
    assert same(second, flora_na.aggregate(clients(1), WEIGHTS, method=method, align_to=first).adapter)
    plain = flora_na.aggregate(clients(1), WEIGHTS, method=method).adapter
    for name, layer in plain.modules.items():  # another gauge, the same update
        torch.testing.assert_close(second.modules[name].delta(), layer.delta(), rtol=1e-4, atol=1e-5)
    assert not same(second, plain)


def test_a_round_of_lower_ranks_is_aligned_and_keeps_the_rank():
    aggregator = LoraAggregator("svd", align_previous=True)
    first = aggregator(clients(0), WEIGHTS)
    lower = [
        replace(c, modules={n: replace(x, A=x.A[:1], B=x.B[:, :1]) for n, x in c.modules.items()}) for c in clients(1)
    ]
    second = aggregator(lower, WEIGHTS)
    assert same(second, flora_na.aggregate(lower, WEIGHTS, method="svd", align_to=first).adapter)
    assert [x.rank for x in second.modules.values()] == [x.rank for x in first.modules.values()]
    assert aggregator.report.rho == pytest.approx(aggregator.report.rho_optimal, rel=1e-3, abs=1e-6)


def sent_as(adapters: list[Adapter], kind: type) -> list:
    """The clients' updates as an aggregator of this kind takes them."""
    if kind is LoraAggregator:
        return adapters
    return [
        {f"{n}.lora_{s}.weight": getattr(x, s) for n, x in a.modules.items() for s in "AB"} | dict(a.extras)
        for a in adapters
    ]


@pytest.mark.parametrize("method", ["als", "svd"])
@pytest.mark.parametrize("kind", [LoraAggregator, StateDictAggregator])
def test_a_module_that_is_new_in_a_round_is_not_aligned_and_told_of(kind, method):
    def part(modules, seed):
        return [Adapter({n: c.modules[n] for n in modules}, c.extras) for c in clients(seed)]

    aggregator, plain, known = kind(method, align_previous=True), kind(method), kind(method, align_previous=True)
    for one in (aggregator, known):
        one(sent_as(part("q", 0), kind), WEIGHTS)
        assert one.unaligned == []
    both = aggregator(sent_as(part("qv", 1), kind), WEIGHTS)
    assert aggregator.unaligned == ["v"]
    for module, expected in (("q", known(sent_as(part("q", 1), kind), WEIGHTS)),
                             ("v", plain(sent_as(part("v", 1), kind), WEIGHTS))):  # fmt: skip
        pairs = [
            state.modules[module] if kind is LoraAggregator else LoraLayer(
                A=state[f"{module}.lora_A.weight"], B=state[f"{module}.lora_B.weight"])
            for state in (both, expected)
        ]  # fmt: skip
        torch.testing.assert_close(pairs[0].A, pairs[1].A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pairs[0].B, pairs[1].B, rtol=1e-4, atol=1e-5)
    aggregator(sent_as(part("vq", 2), kind), WEIGHTS)  # now there is an earlier one
    assert aggregator.unaligned == []
    aggregator(sent_as(part("q", 3), kind), WEIGHTS)
    assert aggregator.unaligned == []


@pytest.mark.parametrize("kind", [LoraAggregator, StateDictAggregator])
def test_a_module_that_is_new_has_no_start_of_its_step(kind):
    aggregator = kind("flora-na", anchor_previous=True)
    aggregator(sent_as([Adapter({"q": c.modules["q"]}) for c in clients(0)], kind))
    with pytest.raises(ValueError, match=r"^anchor_previous: v: the global adapter before this round has no such"):
        aggregator(sent_as(clients(1), kind))


def test_of_a_client_of_weight_zero_no_module_is_new():
    aggregator = StateDictAggregator("svd", align_previous=True)
    sent = sent_as(clients(0), StateDictAggregator)
    aggregator(sent, WEIGHTS)
    odd = {"z.lora_A.weight": torch.ones(2, 3, dtype=torch.int32), "z.lora_B.weight": torch.ones(4, 2)}
    aggregator([*sent, sent[0] | odd], [*WEIGHTS, 0.0])
    assert aggregator.unaligned == []


def test_a_checkpoint_takes_up_where_it_was():
    aggregator = LoraAggregator("als", align_previous=True)
    aggregator(clients(0), WEIGHTS)
    file = io.BytesIO()
    torch.save(aggregator.state_dict(), file)
    file.seek(0)
    resumed = LoraAggregator("als", align_previous=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(resumed.previous, aggregator.previous)
    assert same(resumed(clients(1), WEIGHTS), aggregator(clients(1), WEIGHTS))
    resumed.load_state_dict(LoraAggregator().state_dict())
    assert resumed.previous is None


def test_a_checkpoint_holds_an_adapter_that_was_loaded(tmp_path):
    save_adapter(Adapter(clients(0)[0].modules), tmp_path / "global")
    aggregator, resumed, file = LoraAggregator(), LoraAggregator(), io.BytesIO()
    aggregator.previous = load_adapter(tmp_path / "global")
    torch.save(aggregator.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same_layers(resumed.previous, aggregator.previous)
    assert resumed.previous.config == aggregator.previous.config


def test_a_checkpoint_keeps_what_the_extras_are():
    layers = {"q": LoraLayer(A=torch.ones(2, 6), B=torch.ones(7, 2))}
    sent = Adapter(layers, {"q.bias": torch.ones(7)}, roles={"q.bias": "update"})
    aggregator, resumed = LoraAggregator(), LoraAggregator()
    aggregator([sent, sent])
    file = io.BytesIO()
    torch.save(aggregator.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.previous.roles == aggregator.previous.roles == {"q.bias": "update"}
    older = {"_extra_state": {k: v for k, v in aggregator.get_extra_state().items() if k != "roles"}}
    resumed.load_state_dict(older)
    assert same_layers(resumed.previous, aggregator.previous)
    assert not resumed.previous.roles


def test_a_checkpoint_holds_what_a_peft_config_and_numpy_say():
    aggregator, resumed, file = LoraAggregator(), LoraAggregator(), io.BytesIO()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q"]).to_dict()  # an enum, sets, a dataclass in it
    layer = LoraLayer(A=torch.ones(2, 6), B=torch.ones(7, 2), scaling=np.float64(2.0))
    aggregator.previous = Adapter({"q": layer}, {}, config)
    torch.save(aggregator.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same_layers(resumed.previous, aggregator.previous)
    assert resumed.previous.config["peft_type"] == "LORA"
    assert resumed.previous.config["target_modules"] == ["q"]


def test_a_round_that_fails_leaves_the_state():
    aggregator = LoraAggregator()
    first = aggregator(clients(0))
    report = aggregator.report
    with pytest.raises(ValueError, match="weights"):
        aggregator(clients(1), [1.0])
    assert aggregator.previous is first
    assert aggregator.report is report


@pytest.mark.parametrize("make", [LoraAggregator, StateDictAggregator])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "method: expected one of fedavg"),
        ({"method": "fedavg", "align_previous": True}, "align_previous: only als and svd"),
        ({"rank": -1}, "rank: expected an integer"),
        ({"shared": True}, "shared: "),
        ({"missing": "skip"}, "missing: expected one of error"),
        ({"clip": "much"}, "clip: "),
        ({"min_cosine": 3}, "min_cosine: "),
        ({"backend": "cuda"}, "backend: "),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StateDictAggregator(output_scaling=0), "output_scaling: expected a finite number other than 0, got 0"),
        (lambda: StateDictAggregator(output_scaling={"q": "x"}), "output_scaling: q: expected .* got 'x'"),
        (lambda: StateDictMatcher({"w": torch.ones(2)}, c=1.0), "c: expected a number in"),
        (lambda: StateDictMatcher(lr=math.nan), "lr: "),
        (lambda: StateDictMatcher(rescale="max"), "rescale: "),
        (lambda: StateDictMatcher(backend="cuda"), "backend: expected one of auto"),
    ],
)
def test_options_of_state_dicts_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_prints_its_options():
    assert "method='svd', rank=4" in repr(LoraAggregator("svd", rank=4))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"modules_to_save": ["2"]}, {}),
        ({"bias": "all"}, {"bias": "none"}),
        ({"modules_to_save": ["2"]}, {"bias": "all"}),
    ],
)
def test_what_is_carried_over_is_declared_and_loads(tmp_path, first, second):
    server = LoraAggregator(method="fedavg")
    for number, options in enumerate((first, second)):
        write_client(tmp_path / f"{number}", mlp(), target_modules=["0"], r=2, **options)
        result = server([load_adapter(tmp_path / f"{number}")])
    save_adapter(result, tmp_path / "out")
    assert set(load_adapter(tmp_path / "out").extras) == set(result.extras)
    load_with_peft(mlp(), tmp_path / "out")
