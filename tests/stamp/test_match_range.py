"""Results that cannot be finite: refused by name, nothing written."""

import pytest
import torch
from torch import nn

from fedgram import stamp

NAN = float("nan")


def state(w=1.0, var=1.0, dtype=torch.float32):
    w, var = torch.full((3,), w, dtype=dtype), torch.full((3,), var, dtype=dtype)
    return {"w": w, "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(3)}


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_statistics_that_are_not_finite_are_named(value):
    server = stamp.SpatialMatcher(state())
    with pytest.raises(ValueError, match=r"states: client 1, 'bn.running_var' is not finite"):
        server.step([state(2.0), state(3.0, value)])
    with pytest.raises(ValueError, match=r"deltas: client 1, 'bn.running_var' is not finite"):
        server.step_deltas([state(2.0), state(3.0, value)])
    assert all(torch.equal(t, server.state[name]) for name, t in state().items())
    with pytest.raises(ValueError, match=r"gradients: task 1, 'bn.running_var' is not finite"):
        stamp.match([state(2.0), state(3.0, value)])
    into = {
        "w": nn.Parameter(torch.zeros(3)),
        "bn.running_var": torch.zeros(3),
        "bn.num_batches_tracked": torch.zeros(()),
    }
    with pytest.raises(ValueError, match=r"gradients: task 1, 'bn.running_var' is not finite"):
        stamp.match_(into, [state(2.0), state(3.0, value)])
    assert into["w"].grad is None


def test_statistics_of_clients_without_a_share_and_of_the_old_state_do_not_count():
    server = stamp.SpatialMatcher(state(var=NAN))
    new = server.step([state(2.0), state(3.0, NAN)], [1, 0]).state
    assert torch.equal(new["bn.running_var"], torch.ones(3))


def test_a_new_state_beyond_the_range_of_its_dtype_is_refused():
    server = stamp.SpatialMatcher(state(0.0, dtype=torch.float16), lr=2.0)
    with pytest.raises(ValueError, match=r"states: the new global state, 'w' exceeds 65504, .* torch.float16"):
        server.step([state(60000.0, dtype=torch.float16)] * 2)
    assert all(torch.equal(t, server.state[name]) for name, t in state(0.0, dtype=torch.float16).items())
    server = stamp.SpatialMatcher(state(0.0, 1000.0, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"deltas: the new global state, 'bn.running_var' exceeds 65504"):
        server.step_deltas([state(1.0, 65000.0, dtype=torch.float16)] * 2)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 5e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_a_direction_beyond_the_range_of_its_dtype_is_refused(dtype, value):
    given = [[torch.ones(2, dtype=dtype), torch.full((3,), value, dtype=dtype)]] * 2
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)), nn.Parameter(torch.zeros(3, dtype=dtype))]
    with pytest.raises(ValueError, match=r"gradients: the direction, '\[1\]' exceeds .*, the largest number of"):
        stamp.match(given, c=0.9)
    with pytest.raises(ValueError, match=r"gradients: the direction, '\[1\]' exceeds"):
        stamp.match_(parameters, given, c=0.9)
    assert all(p.grad is None for p in parameters)
    found = stamp.match(given, c=0.9, rescale="mean")  # the mean itself: large, and in range
    assert torch.equal(found.direction[1], given[0][1])
    stamp.match_(parameters, given, c=0.9, rescale="mean")
    assert torch.equal(parameters[1].grad, given[0][1])
    if dtype == torch.bfloat16:
        return  # is summed in float32
    wide = [torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    stamp.match_(wide, given, c=0.9)
    assert float(wide[1][0]) == pytest.approx(1.9 * float(given[0][1][0]), rel=1e-6)


def test_a_coefficient_beyond_the_range_of_float32_is_refused_for_16_bits():
    given = [torch.tensor([1e15, 1e15]), torch.tensor([1e-25, -1e-26])]
    assert stamp.match(given).direction.isfinite().all()  # is summed in float64
    with pytest.raises(ValueError, match="gradients: the direction exceeds"):
        stamp.match([g.to(torch.bfloat16) for g in given])
