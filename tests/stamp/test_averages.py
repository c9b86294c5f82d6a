"""What is averaged and not matched: integers of any size, and entries that a client lacks."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from fedgram import stamp
from fedgram.bindings.modules import StateDictMatcher
from fedgram.bindings.plain import match_state_dicts
from fedgram.stamp.structure import average

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def state(n, w=1.0):
    return {"w": torch.full((2,), w), "n": n}


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_any_size(dtype):
    limits = np.iinfo(dtype)
    numbers = [limits.min, limits.max, limits.max - 1, limits.max // 3, 0, 1, 7, (limits.max >> 1) + 1]
    random = np.random.default_rng(0)
    for _ in range(30):
        shares = random.dirichlet(np.ones(3))
        columns = random.choice(np.array(numbers, dtype=dtype), (3, 5))
        found = average([torch.from_numpy(row) for row in columns], torch.from_numpy(shares)).numpy()
        assert found.dtype == columns.dtype
        for got, column in zip(found, columns.T, strict=True):
            values = [int(x) for x in column]
            exact = sum(Fraction(float(w)) * x for w, x in zip(shares, values, strict=True))
            rounding = Fraction(max(values) - min(values)) / 2**50 + Fraction(max(map(abs, values))) / 2**50
            assert abs(int(got) - exact) <= Fraction(1, 2) + rounding
            assert min(values) <= int(got) <= max(values)


@pytest.mark.parametrize("shares", [[0.3, 0.7], [0.1, 0.2, 0.3, 0.4], [1, 0]])
def test_integers_that_agree_stay_as_they_are(shares):
    n = torch.tensor([2**53 + 1, 2**63 - 1, -(2**63), 0, -1])
    assert torch.equal(average([n] * len(shares), torch.tensor(shares, dtype=torch.float64)), n)
    assert torch.equal(stamp.match([state(n)] * len(shares), shares).direction["n"], n)
    assert torch.equal(match_state_dicts(state(n), [state(n)] * len(shares), shares).state_dict["n"], n)


def test_halves_are_rounded_to_even_numbers():
    ends = [torch.tensor([1, -3, 2, -2]), torch.tensor([2, -2, 3, -1])]
    assert average(ends, torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist() == [2, -2, 2, -2]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_deltas_of_integers_may_wrap(dtype):
    limits = np.iinfo(dtype)
    with np.errstate(over="ignore"):
        old = np.array([5, limits.max, 100], dtype=dtype)
        new = np.array([[3, limits.min, 90], [5, limits.max, 127]], dtype=dtype)
        deltas = new - old
    server, states, sent = (
        [state(torch.from_numpy(row), w) for row, w in zip(rows, (0.0, 1.0), strict=False)]
        for rows in ([old], new, deltas)
    )
    by_states = match_state_dicts(server[0], states).state_dict["n"]
    by_deltas = match_state_dicts(server[0], sent, deltas=True).state_dict["n"]
    assert torch.equal(by_states, by_deltas)
    assert int(by_states[0]) == 4


@pytest.mark.parametrize("entry", ["w", "n", "bn.running_var"])
def test_an_entry_that_is_none_in_a_state_is_no_zero(entry):
    old = {"w": torch.full((3,), 5.0), "n": torch.tensor(10), "bn.running_var": torch.ones(2), "v": torch.zeros(2)}
    clients = [dict(old), old | {entry: None}]
    server, module = stamp.SpatialMatcher(old), StateDictMatcher(old)
    for step in (server.step, lambda sent: match_state_dicts(old, sent), module):
        with pytest.raises(ValueError, match=f"states: client 1, '{entry}' is None; expected a tensor"):
            step(clients)
        with pytest.raises(ValueError, match=f"states: client 0, '{entry}' is None"):
            step([old | {entry: None}] * 2)
    with pytest.raises(ValueError, match=f"states: b, '{entry}' is None"):
        match_state_dicts(old, clients, names=["a", "b"])
    assert all(torch.equal(server.state[name], t) for name, t in old.items())


def test_none_in_deltas_is_no_change():
    old = {"w": torch.full((3,), 5.0), "n": torch.tensor(10), "bn.running_var": torch.ones(2), "v": torch.zeros(2)}
    delta = {"w": None, "n": None, "bn.running_var": None, "v": torch.ones(2)}
    zeros = {name: torch.zeros_like(t) for name, t in old.items()} | {"v": torch.ones(2)}
    found, expected = (match_state_dicts(old, [d] * 2, deltas=True).state_dict for d in (delta, zeros))
    assert all(torch.equal(found[name], expected[name]) for name in old)
    assert all(torch.equal(found[name], old[name]) for name in ("w", "n", "bn.running_var"))
    assert torch.equal(found["v"], torch.ones(2))


def test_statistics_that_are_none_are_no_gradient_of_zero():
    given = [{"w": torch.ones(2), "bn.running_var": v} for v in (torch.ones(2), None)]
    with pytest.raises(ValueError, match=r"gradients: task 1, 'bn.running_var' is None; expected a tensor"):
        stamp.match(given)


@pytest.mark.parametrize(
    ("n", "var", "message"),
    [
        (1000, 1.0, "into: 'n' is torch.int8, whose range"),
        (3, 1e6, "into: 'bn.running_var' is torch.float16, whose range"),
    ],
)
def test_averages_beyond_the_range_of_their_targets_are_refused(n, var, message):
    given = {"w": torch.ones(3), "bn.running_var": torch.tensor([var]), "n": torch.tensor(n)}
    p = torch.nn.Parameter(torch.zeros(3))
    into = {"w": p, "bn.running_var": torch.zeros(1).half(), "n": torch.tensor(0, dtype=torch.int8)}
    with pytest.raises(ValueError, match=message):
        stamp.match_(into, [given] * 2)
    assert p.grad is None
    assert int(into["n"]) == float(into["bn.running_var"]) == 0
    fitting = given | {"bn.running_var": torch.tensor([2.0]), "n": torch.tensor(7)}
    stamp.match_(into, [fitting] * 2)
    assert (int(into["n"]), float(into["bn.running_var"])) == (7, 2.0)


def test_clients_may_come_as_a_generator():
    old = {"w": torch.zeros(2)}
    sent = [{"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}]
    expected = match_state_dicts(old, sent).state_dict["w"]
    assert torch.equal(match_state_dicts(old, (x for x in sent), [1, 1]).state_dict["w"], expected)
    assert torch.equal(stamp.SpatialMatcher(old).step(x for x in sent).state["w"], expected)
    assert torch.equal(StateDictMatcher(old)(x for x in sent)["w"], expected)
    for wrong in (sent[0], 3, None):
        with pytest.raises(ValueError, match="client_states: expected one state dict per client, got one"):
            match_state_dicts(old, wrong)
        with pytest.raises(ValueError, match="states: expected one state dict per client, got one"):
            stamp.SpatialMatcher(old).step(wrong)


@pytest.mark.parametrize("lr", ["a", "1", None, float("inf"), [1.0, 2.0]])
def test_a_learning_rate_is_a_finite_number(lr):
    with pytest.raises(ValueError, match="lr: expected a finite number, got"):
        stamp.SpatialMatcher({"w": torch.zeros(2)}, lr=lr)
