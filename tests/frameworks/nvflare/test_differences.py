"""Clients that send differences: what they are added to, in which dtype, and what comes back."""

import warnings

import pytest
import torch

pytest.importorskip("nvflare", reason="runs in the venv of the extra 'nvflare'")

with warnings.catch_warnings():  # what FLARE warns of while it is imported is FLARE's to mend
    warnings.simplefilter("ignore")
    from fedgram.bindings.nvflare import FloraNAAggregator, StampAggregator
    from fedgram_testing.nvflare_rounds import adapters, aggregated, models, same

from fedgram.bindings.plain import aggregate_state_dicts, match_state_dicts

A, B = (f"base_model.model.q.lora_{side}.weight" for side in "AB")
EPS = torch.finfo(torch.float32).eps


def update(state):
    return state[B].double() @ state[A].double()


def test_differences_count_from_the_global_model():
    [start, *states] = adapters(4)
    differences = [{name: tensor - start[name] for name, tensor in state.items()} for state in states]
    result = aggregated(FloraNAAggregator(), models(differences, params_type="DIFF"), start=start)
    again = [{name: tensor + start[name] for name, tensor in d.items()} for d in differences]
    assert same(result.params, aggregate_state_dicts(again).state_dict)
    stamped = aggregated(StampAggregator(c=0.4), models(differences, params_type="DIFF"), start=start)
    assert same(stamped.params, match_state_dicts(start, differences, c=0.4, deltas=True).state_dict)


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("method", ["stack", "svd", "fedavg"])
def test_small_differences_in_bfloat16_are_not_lost_in_the_rounding_of_a_float32_model(method, numpy):
    start = adapters(1)[0] | {"head": torch.ones(5)}
    generator = torch.Generator().manual_seed(1)
    steps = [{k: (1e-3 * torch.randn(t.shape, generator=generator)).bfloat16() for k, t in start.items()}] * 2
    aggregator = FloraNAAggregator(method, rank=None if method == "stack" else 4)
    held = {name: tensor.numpy() for name, tensor in start.items()} if numpy else start
    found = aggregated(aggregator, models(steps, params_type="DIFF"), start=held).params
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    moved = {name: tensor + steps[0][name].float() for name, tensor in start.items()}
    step = (update(moved) - update(start)).norm()
    # Float32 factors round the update itself, of which the step is a thousandth.
    assert (update(found) - update(moved)).norm() <= 10 * EPS * update(start).norm() <= 1e-2 * step
    torch.testing.assert_close(found["head"], moved["head"], rtol=EPS, atol=0)


@pytest.mark.parametrize("kind", [FloraNAAggregator, StampAggregator])
@pytest.mark.parametrize(
    ("held", "sent"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_the_result_has_the_global_models_dtype(kind, held, sent):
    start = adapters(1, dtype=held)[0] | {"count": torch.tensor(5)}
    steps = [{k: torch.full_like(t, 2, dtype=sent) if "lora" in k else t for k, t in start.items()}] * 2
    found = aggregated(kind(), models(steps, params_type="DIFF"), start=start).params
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in start.items()}
    assert found["count"] == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["fedavg", "als", "svd", "stack"])
def test_rho_is_that_of_the_model_that_goes_back(method, dtype):
    [start, *steps] = adapters(3)
    start = {name: tensor.to(dtype) for name, tensor in start.items()}
    result = aggregated(FloraNAAggregator(method), models(steps, params_type="DIFF"), start=start)
    W = sum(update({name: start[name].float() + step[name] for name in step}) for step in steps) / 2
    rho = float((update(result.params) - W).norm() / W.norm())
    assert result.meta["fedgram"]["rho"] == pytest.approx(rho, rel=1e-3)
    assert rho > 1e-4  # rounding to 16 bits is seen


@pytest.mark.parametrize("missing", ["renormalize", "zero"])
@pytest.mark.parametrize("lacking", [0, 1])
def test_it_does_not_matter_which_client_lacks_a_module(missing, lacking):
    [start, *steps] = ({**a, **{k.replace(".q.", ".v."): t for k, t in a.items()}} for a in adapters(3))
    steps[lacking] = {name: tensor for name, tensor in steps[lacking].items() if ".v." not in name}
    found = aggregated(FloraNAAggregator(missing=missing), models(steps, params_type="DIFF"), start=start).params
    whole = [{name: start[name] + tensor for name, tensor in step.items()} for step in steps]
    assert same(found, aggregate_state_dicts(whole, missing=missing).state_dict)


@pytest.mark.parametrize("kind", [FloraNAAggregator, StampAggregator])
@pytest.mark.parametrize("shape", [(1, 10), (1,), (3, 10), (2, 4, 10)])
def test_a_difference_of_another_shape_is_refused_by_client_and_name(kind, shape):
    [start, *steps] = adapters(3)
    steps[1] = steps[1] | {A: torch.ones(shape)}
    with pytest.raises(ValueError, match=r"site-1.*\(4, 10\)") as refused:
        aggregated(kind(), models(steps, params_type="DIFF"), start=start)
    assert A in str(refused.value)
