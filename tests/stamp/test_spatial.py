"""The server's step."""

import pytest
import torch
from torch import nn

from fedgram import stamp


def net(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model(torch.randn(16, 4) + seed)
    return model.state_dict()


def near(state, seed, size=0.1):
    """A client's state: the global one and a step away from it."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: t + size * torch.randn(t.shape, generator=g) if t.is_floating_point() else t + seed
        for name, t in state.items()
    }


MATCHED = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")


def flat(state, minus=None):
    return torch.cat([(state[n].double() - (minus[n].double() if minus else 0)).flatten() for n in MATCHED])


@pytest.mark.parametrize("c", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("lr", [1.0, 0.5, 2.0])
def test_the_step_is_the_match_of_the_deltas(c, lr):
    start = net(0)
    clients, counts = [near(start, k + 1) for k in range(5)], [10, 20, 5, 40, 1]
    server = stamp.SpatialMatcher(start, c=c, lr=lr, rescale=False)
    done = server.step(clients, counts)
    X = torch.stack([flat(client, start) for client in clients])
    dual = stamp.solve_dual(X @ X.T, c, counts)
    assert torch.allclose(done.dual.coefficients, dual.coefficients, atol=1e-4)
    assert torch.allclose(flat(done.state), flat(start) + lr * dual.coefficients @ X, atol=1e-5)
    assert torch.allclose(done.gramian.dense(), X @ X.T, rtol=1e-4, atol=1e-5)
    assert done.clients == (0, 1, 2, 3, 4)
    assert set(done.state) == set(start)
    assert all(torch.equal(done.state[n], server.state[n]) for n in start)


def test_buffers_are_averaged_by_count():
    start = net(0)
    clients, counts = [near(start, k + 1) for k in range(3)], [1, 1, 2]
    state = stamp.SpatialMatcher(start).step(clients, counts).state
    expected = sum(w * c["1.running_mean"] for w, c in zip((0.25, 0.25, 0.5), clients, strict=True))
    assert torch.allclose(state["1.running_mean"], expected, atol=1e-6)
    assert int(state["1.num_batches_tracked"]) == round(1 + (1 + 2 + 2 * 3) / 4)
    assert state["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("c", [0.0, 0.25, 0.9])
def test_one_client_gives_its_state_to_the_last_bit(c):
    start = net(0)
    client = near(start, 7)
    done = stamp.SpatialMatcher(start, c=c).step([client], [123])
    assert all(torch.equal(done.state[name], client[name]) for name in start)
    assert done.dual.coefficients.tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clients_that_agree_give_their_state_to_the_last_bit(dtype):
    start = {n: t.to(dtype) if t.is_floating_point() else t for n, t in net(0).items()}
    client = {n: t.to(dtype) if t.is_floating_point() else t for n, t in near(start, 7).items()}
    done = stamp.SpatialMatcher(start, c=0.5).step([client] * 5, [3, 1, 4, 1, 5])
    assert all(torch.equal(done.state[name], client[name]) for name in start)


def test_half_a_step_of_one_client_is_half_way():
    start, client = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.5])}
    assert stamp.SpatialMatcher(start, c=0.5, lr=0.5).step([client]).state["w"].tolist() == [2.0, 2.25]


def test_clients_that_did_not_move_leave_everything():
    start = net(0)
    done = stamp.SpatialMatcher(start).step([dict(start)] * 3)
    assert done.dual.status in ("stationary", "optimal")
    assert all(torch.equal(done.state[name], start[name]) for name in start)


def test_small_deltas_keep_their_digits():
    # Deltas of 1e-4 on parameters of size 1, in float32: their products come from exact float32 differences.
    g = torch.Generator().manual_seed(5)
    start = {"w": torch.randn(200_000, generator=g)}
    clients = [{"w": start["w"] + 1e-4 * (k + 1) * torch.randn(200_000, generator=g)} for k in range(4)]
    done = stamp.SpatialMatcher(start, c=0.5).step(clients)
    X = torch.stack([c["w"].double() - start["w"].double() for c in clients])
    exact = X @ X.T
    error = (done.gramian.dense() - exact).abs() / exact.diagonal().sqrt()[:, None] / exact.diagonal().sqrt()
    assert float(error.max()) <= 2e-6
    assert torch.allclose(done.dual.weights, stamp.solve_dual(exact, 0.5).weights, atol=1e-5)


def test_deltas_do_as_well_as_states():
    start = net(0)
    clients, counts = [near(start, k + 1) for k in range(4)], [1, 2, 3, 4]
    deltas = [{n: c[n] - start[n] for n in start} for c in clients]
    by_state = stamp.SpatialMatcher(start, c=0.4, lr=0.7).step(clients, counts)
    by_delta = stamp.SpatialMatcher(start, c=0.4, lr=0.7).step_deltas(deltas, counts)
    for name in start:
        assert torch.allclose(by_state.state[name].double(), by_delta.state[name].double(), atol=1e-5), name
    assert torch.allclose(by_state.gramian.dense(), by_delta.gramian.dense(), rtol=1e-4, atol=1e-6)


def test_partial_participation_and_rounds():
    start = net(0)
    server = stamp.SpatialMatcher(start, c=0.3)
    a, b, absent = near(start, 1), near(start, 2), near(start, 3)
    absent["0.weight"] = torch.full_like(absent["0.weight"], float("nan"))
    done = server.step([a, absent, b], [5, 0, 10])
    assert done.clients == (0, 2)
    alone = stamp.SpatialMatcher(start, c=0.3).step([a, b], [5, 10])
    assert all(torch.equal(done.state[name], alone.state[name]) for name in start)
    second = server.step([near(server.state, 4)])
    assert all(torch.equal(server.state[name], second.state[name]) for name in start)


def test_conflicting_clients_are_not_left_behind():
    # Nine clients pull one way, one the other: the mean hurts the one, the match does not hurt it as much.
    start = {"w": torch.zeros(50)}
    g = torch.Generator().manual_seed(0)
    pull = torch.ones(50)
    clients = [{"w": pull + 0.3 * torch.randn(50, generator=g)} for _ in range(9)]
    clients.append({"w": -0.5 * pull + 0.3 * torch.randn(50, generator=g)})
    X = torch.stack([c["w"] for c in clients])
    mean = X.mean(0)
    step = stamp.SpatialMatcher(start, c=0.9).step(clients).state["w"]
    assert float((X @ step).min()) > float((X @ mean).min())


def test_the_old_state_is_copied_and_survives_errors():
    start = net(0)
    server = stamp.SpatialMatcher(start)
    start["0.weight"].zero_()
    assert float(server.state["0.weight"].abs().max()) > 0
    before = {n: t.clone() for n, t in server.state.items()}
    bad = near(server.state, 1)
    bad["2.bias"][1] = float("inf")
    with pytest.raises(ValueError, match=r"states: client 4, '2.bias' is not finite \(it has infinite"):
        server.step([near(server.state, 2), bad, near(server.state, 3), near(server.state, 5), bad], [1, 0, 1, 1, 1])
    assert all(torch.equal(server.state[n], before[n]) for n in before)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s.pop("2.bias"), "states: client 1 lacks '2.bias', which the global state has"),
        (lambda s: s.update(more=torch.zeros(1)), "states: client 1 has 'more', which the global state lacks"),
        (
            lambda s: s.update({"2.bias": torch.zeros(4)}),
            r"states: client 1, '2.bias' has shape \(4,\); expected \(3,\)",
        ),
        (lambda s: s.update({"2.bias": torch.zeros(3).half()}), "states: client 1, '2.bias' has dtype torch.float16"),
    ],
)
def test_states_that_do_not_fit_are_named(break_it, message):
    start = net(0)
    bad = near(start, 1)
    break_it(bad)
    with pytest.raises(ValueError, match=message):
        stamp.SpatialMatcher(start).step([near(start, 2), bad])


def test_bad_calls():
    start = net(0)
    server = stamp.SpatialMatcher(start)
    with pytest.raises(ValueError, match="states: no client answered"):
        server.step([])
    with pytest.raises(ValueError, match="counts: all are zero"):
        server.step([near(start, 1)], [0])
    with pytest.raises(ValueError, match="counts: entry 0 is -1"):
        server.step([near(start, 1)], [-1])
    with pytest.raises(ValueError, match="states: client 0 is a list; expected a state dict"):
        server.step([[torch.zeros(1)]])
    with pytest.raises(ValueError, match="c: expected"):
        stamp.SpatialMatcher(start, c=1.0)
    with pytest.raises(ValueError, match="lr: expected"):
        stamp.SpatialMatcher(start, lr=float("nan"))
    with pytest.raises(ValueError, match="state: 'b' is a NoneType; expected a tensor"):
        stamp.SpatialMatcher({"a": torch.ones(2), "b": None})
    with pytest.raises(ValueError, match="state: expected a state dict, got a list"):
        stamp.SpatialMatcher([torch.ones(2)])
    with pytest.raises(ValueError, match="no tensor to match"):
        stamp.SpatialMatcher({"n": torch.tensor(1)})


@pytest.mark.parametrize("c", [0.25, 0.9])
@pytest.mark.parametrize("deltas", [False, True])
def test_a_client_that_did_not_move_shortens_no_step_of_the_others(c, deltas):
    """With nothing matched there is nothing to divide by; nor is there a jump to a client that hardly moved."""
    torch.manual_seed(0)
    common = torch.randn(50, dtype=torch.float64)
    moved = [common + 0.1 * torch.randn(50, dtype=torch.float64) for _ in range(9)]
    mean = sum(moved) / 10
    for length in (0.0, 1e-12, 1e-6):
        server = stamp.SpatialMatcher({"w": torch.zeros(50, dtype=torch.float64)}, c=c)
        step = (server.step_deltas if deltas else server.step)([{"w": x} for x in (*moved, length * mean)])
        assert step.dual.status == ("degenerate" if length == 0 else "optimal")
        assert torch.allclose(step.state["w"], mean, rtol=1e-5, atol=1e-7)
    assert torch.equal(step.dual.refine().coefficients, step.dual.coefficients)
