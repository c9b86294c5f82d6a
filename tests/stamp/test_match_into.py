"""Directions written where they are needed, or not at all."""

import pytest
import torch
from torch import nn

from fedgram import stamp


def lists(K=4):
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(5, 3, generator=g), torch.randn(7, generator=g)] for _ in range(K)]


def test_writing_into_grad_and_tensors():
    given = lists()
    expected = stamp.match(given).direction
    parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    parameters[0].grad = torch.full((5, 3), 9.0)
    kept = parameters[0].grad
    before = [p.detach().clone() for p in parameters]
    found = stamp.match_(iter(parameters), given)
    assert parameters[0].grad is kept
    assert all(torch.equal(p.grad, e) for p, e in zip(parameters, expected, strict=True))
    assert all(torch.equal(p.detach(), b) for p, b in zip(parameters, before, strict=True))
    assert found.direction[0] is kept
    targets = [torch.full((5, 3), float("nan")), torch.full((7,), float("nan"))]
    stamp.match_(targets, given)
    assert all(torch.equal(t, e) for t, e in zip(targets, expected, strict=True))


def test_writing_over_one_of_the_gradients():
    given = lists()
    expected = stamp.match(given).direction
    stamp.match_(given[0], given)
    assert all(torch.equal(t, e) for t, e in zip(given[0], expected, strict=True))


def test_writing_into_a_module_and_a_state():
    module = nn.Linear(3, 2)
    given = [{"weight": torch.randn(2, 3), "bias": torch.randn(2)} for _ in range(3)]
    found = stamp.match_(module, given)
    assert torch.equal(module.weight.grad, found.direction["weight"])
    state = {"w": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(0)}
    states = [{"bn.num_batches_tracked": torch.tensor(4), "w": torch.ones(2)} for _ in range(2)]
    stamp.match_(state, states, rescale="mean")
    assert state["w"].tolist() == [1, 1]
    assert int(state["bn.num_batches_tracked"]) == 4
    one = torch.zeros(2)
    stamp.match_(one, [torch.ones(2)], c=0)
    assert one.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ([torch.zeros(5, 3)], "into: expected 2 tensors"),
        ([torch.zeros(5, 3), torch.zeros(6)], r"into: '\[1\]' is \(6,\) on cpu; the gradients are \(7,\)"),
    ],
)
def test_bad_targets_are_refused_before_writing(into, message):
    with pytest.raises(ValueError, match=message):
        stamp.match_(into, lists())
    assert all(float(t.abs().max()) == 0 for t in into)


@pytest.mark.parametrize("second", ["integers", "the first", None])
def test_bad_targets_leave_gradients_as_they_were(second):
    first = nn.Parameter(torch.zeros(3))
    into = [first, {"integers": torch.zeros(3, dtype=torch.int64), "the first": first, None: None}[second]]
    message = {"integers": "is torch.int64; expected floating", "the first": "is the same tensor as", None: "NoneType"}
    with pytest.raises(ValueError, match=rf"into: '\[1\]' is .*{message[second].removeprefix('is ')}"):
        stamp.match_(into, [[torch.ones(3), torch.ones(3)]] * 2)
    assert first.grad is None


def test_overlapping_targets_leave_gradients_as_they_were():
    first, both = nn.Parameter(torch.zeros(3)), torch.zeros(4)
    with pytest.raises(ValueError, match="overlap in memory"):
        stamp.match_([first, both[:3], both[1:]], [[torch.ones(3)] * 3] * 2)
    assert first.grad is None


def test_a_target_that_no_task_reaches_may_be_none():
    (only,) = targets = [torch.zeros(3)]
    stamp.match_([*targets, None], [[torch.ones(3), None]] * 2, c=0)
    assert only.tolist() == [1, 1, 1]


def test_a_mapping_needs_names():
    states = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    with pytest.raises(ValueError, match="expected a module or a mapping"):
        stamp.match_([torch.zeros(2)], states)
    with pytest.raises(ValueError, match="into: lacks 'w'"):
        stamp.match_({"v": torch.zeros(2)}, states)
