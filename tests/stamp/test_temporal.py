"""The client's step over its tasks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedgram import stamp


class Memory:
    """What PrototypeMemory offers to a matcher."""

    def __init__(self, **tasks):
        self._held = tasks

    @property
    def tasks(self):
        return tuple(self._held)

    def task(self, name):
        return self._held[name]


def data(seed, n=12, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g) + shift, torch.randint(0, 3, (n,), generator=g)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network(norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 3))


def gradient(model, batch):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))])


def grads(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_step_leaves_the_matched_direction_in_grad():
    model, memory = network(), Memory(a=data(1), b=data(2, shift=1.0))
    batch = data(3)
    X = torch.stack([gradient(model, t) for t in (batch, memory.task("a"), memory.task("b"))]).double()
    expected = stamp.solve_dual(X @ X.T, 0.5).coefficients @ X
    done = stamp.TemporalMatcher(model, loss_fn, memory, c=0.5).step(batch)
    assert torch.allclose(grads(model).double(), expected, atol=1e-6)
    assert done.tasks == ("a", "b")
    assert torch.allclose(done.losses, torch.stack([loss_fn(model, t) for t in (batch, data(1), data(2, shift=1.0))]))
    assert done.match.relative_gap <= 1e-9
    assert not done.losses.requires_grad


def test_five_lines_in_a_training_loop():
    model, memory = network(), stamp.PrototypeMemory(12)
    X, y = data(1, 40)
    memory.update(X, y, "first")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    matcher = stamp.TemporalMatcher(model, loss_fn, memory, c=0.5)
    before = loss_fn(model, memory.task("first")).item()
    for seed in range(30):
        matcher.step(data(seed + 50))
        optimizer.step()
    assert loss_fn(model, memory.task("first")).item() < before


def test_without_earlier_tasks_it_is_the_plain_gradient_up_to_length():
    model, batch = network(), data(3)
    plain = gradient(model, batch)
    stamp.TemporalMatcher(model, loss_fn, Memory(), c=0.25).step(batch)
    assert torch.allclose(grads(model), 1.25 * plain, rtol=1e-5)
    stamp.TemporalMatcher(model, loss_fn, Memory(), c=0.25, rescale="mean").step(batch)
    assert torch.equal(grads(model), plain)


def test_the_current_task_is_not_its_own_past():
    model, batch = network(), data(3)
    done = stamp.TemporalMatcher(model, loss_fn, Memory(a=data(1), b=data(2))).step(batch, task="b")
    assert done.tasks == ("a",)


def test_the_weight_of_the_current_task():
    model, batch, memory = network(), data(3), Memory(a=data(1), b=data(2))
    X = torch.stack([gradient(model, t) for t in (batch, data(1), data(2))])
    stamp.TemporalMatcher(model, loss_fn, memory, c=0.0, current_weight=0.5).step(batch)
    assert torch.allclose(grads(model), 0.5 * X[0] + 0.25 * X[1] + 0.25 * X[2], atol=1e-6)
    with pytest.raises(ValueError, match="current_weight: expected"):
        stamp.TemporalMatcher(model, loss_fn, memory, current_weight=1.5)
    with pytest.raises(ValueError, match="c: expected"):
        stamp.TemporalMatcher(model, loss_fn, memory, c=1.0)


def test_prototypes_do_not_move_running_statistics():
    alone, together = network(norm=True), network(norm=True)
    batch = data(3)
    alone(batch[0])
    stamp.TemporalMatcher(together, loss_fn, Memory(a=data(1, shift=5.0))).step(batch)
    for name, buffer in alone.named_buffers():
        assert torch.equal(buffer, dict(together.named_buffers())[name]), name


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.first, self.second, self.idle = (
            nn.Linear(6, 6),
            nn.Linear(6, 3),
            nn.Linear(6, 3),
            nn.Linear(2, 2),
        )

    def forward(self, x, head):
        return getattr(self, head)(self.body(x))


def test_heads_that_only_some_tasks_reach():
    model = TwoHeads()
    model.idle.weight.grad = torch.ones(2, 2)
    model.idle.bias.requires_grad_(False)
    batches = [(*data(3), "second"), (*data(1), "first")]

    def loss(m, batch):
        return F.cross_entropy(m(batch[0], batch[2]), batch[1])

    done = stamp.TemporalMatcher(model, loss, Memory(a=batches[1]), c=0.0).step(batches[0])
    expected = torch.autograd.grad(loss(model, batches[0]) / 2, model.second.weight)[0]
    assert torch.allclose(model.second.weight.grad, expected, atol=1e-7)
    assert float(model.first.weight.grad.abs().max()) > 0
    assert model.idle.weight.grad is None
    assert "idle.weight" not in done.match.direction


def test_bad_gradients_are_named_and_nothing_is_written():
    model, bad = network(), data(1)
    bad[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"earlier task 'a', '0.weight' is not finite"):
        stamp.TemporalMatcher(model, loss_fn, Memory(a=bad)).step(data(3))
    with pytest.raises(ValueError, match=r"the current task, '0.weight' is not finite"):
        stamp.TemporalMatcher(model, loss_fn, Memory()).step(bad)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(
        ValueError,
        match=r"loss_fn: expected one floating-point number for the current task, got torch.float32 \(12, 3\)",
    ):
        stamp.TemporalMatcher(model, lambda m, b: m(b[0]), Memory()).step(data(3))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="model: has no trainable parameter"):
        stamp.TemporalMatcher(model, loss_fn, Memory()).step(data(3))


class Scaled(torch.autograd.Function):
    """An ordinary function of one's own."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_reentrant_checkpointing_is_refused_and_ordinary_functions_are_not():
    model, (X, y) = network(), data(3)

    def loss(reentrant):
        def of(m, batch):
            hidden = torch.utils.checkpoint.checkpoint(m[:2], batch[0].requires_grad_(), use_reentrant=reentrant)
            return F.cross_entropy(m[2](Scaled.apply(hidden)), batch[1])

        return of

    with pytest.raises(ValueError, match="model: a block runs under reentrant activation checkpointing"):
        stamp.TemporalMatcher(model, loss(True), Memory(a=data(1))).step((X, y))
    assert all(p.grad is None for p in model.parameters())
    stamp.TemporalMatcher(model, loss(False), Memory(a=data(1))).step((X, y))
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters())
    model[:2].requires_grad_(False)  # nothing is hidden in a block that is frozen
    stamp.TemporalMatcher(model, loss(True), Memory(a=data(1))).step((X, y))
    assert all(float(p.grad.abs().max()) > 0 for p in model[2].parameters())


# --- several steps per task


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def run(model, batches):
    optimizer = sgd(model.parameters())
    start = values(model)
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return values(model) - start


def test_every_run_starts_from_the_same_point():
    batches, memory = [data(10), data(11)], Memory(a=data(1), b=data(2, shift=1.0))
    deltas = [run(network(), batches), run(network(), [data(1)] * 2), run(network(), [data(2, shift=1.0)] * 2)]
    assert not torch.allclose(deltas[1], deltas[2])
    X = torch.stack(deltas).double()
    expected = stamp.solve_dual(X @ X.T, 0.5).coefficients @ X
    model = network()
    start = values(model)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    done = stamp.TemporalMatcher(model, loss_fn, memory, c=0.5).multi_step(
        iter([*batches, data(12)]), steps=2, optimizer=sgd, lr=0.5
    )
    assert torch.allclose((values(model) - start).double(), 0.5 * expected, atol=1e-6)
    assert float(model[0].weight.grad.mean()) == 3.0
    assert model[2].weight.grad is None
    assert done.tasks == ("a", "b")
    assert done.losses.shape == (3,)


def test_one_task_alone_is_its_own_run():
    model, batches = network(), [data(10), data(11), data(12)]
    expected = network()
    run(expected, batches)
    stamp.TemporalMatcher(model, loss_fn, Memory(), c=0.5, rescale="mean").multi_step(batches, steps=3, optimizer=sgd)
    assert torch.allclose(values(model), values(expected), atol=1e-6)


def test_statistics_follow_the_current_tasks_run():
    model, alone, batches = network(norm=True), network(norm=True), [data(10), data(11)]
    run(alone, batches)
    matcher = stamp.TemporalMatcher(model, loss_fn, Memory(a=data(1, shift=4.0)))
    matcher.multi_step(batches, steps=2, optimizer=sgd)
    for name, buffer in alone.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name


def test_errors_leave_the_model_as_it_was():
    model, bad = network(norm=True), data(1)
    bad[0][0, 0] = float("inf")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    matcher = stamp.TemporalMatcher(model, loss_fn, Memory(a=bad))
    with pytest.raises(ValueError, match=r"earlier task 'a'.* is not finite"):
        matcher.multi_step([data(10)], steps=1, optimizer=sgd)
    with pytest.raises(ValueError, match="batches: 1 given, 2 steps need as many"):
        matcher.multi_step([data(10)], steps=2, optimizer=sgd)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        matcher.multi_step([data(10)], steps=0, optimizer=sgd)
    with pytest.raises(ValueError, match="steps: expected a whole number"):
        matcher.multi_step([data(10)], steps=1.5, optimizer=sgd)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


class Counts(nn.Module):
    """Buffers that are assigned anew, made at the first pass, and written in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("late", None)
        self.register_buffer("added", torch.zeros(()))

    def forward(self, x):
        self.assigned = self.assigned + len(x)
        self.late = torch.full((), float(len(x))) if self.late is None else self.late + len(x)
        self.added += len(x)
        if "new" not in self._buffers:
            self.register_buffer("new", torch.zeros(()))
        self.new += len(x)
        return self.layer(x)


def counted(model):
    return {name: float(buffer) for name, buffer in model.named_buffers()}


class Growing(nn.Module):
    """A cache made anew for longer inputs, its length noted beside it; a sparse buffer, and one of NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.length = 0
        self.register_buffer("adjacency", torch.eye(6).to_sparse())
        self.register_buffer("unknown", torch.full((1,), torch.nan).expand(3))

    def forward(self, x):
        if len(x) > self.length:
            self.register_buffer("positions", torch.arange(float(len(x))))
            self.length = len(x)
        return self.layer(torch.sparse.mm(self.adjacency, x.T).T) + self.positions[: len(x), None]


def test_caches_that_grow_stay_of_one_piece():
    short, long = data(3, n=4), data(2, n=7)
    alone, model = Growing(), Growing()
    alone(short[0])
    matcher = stamp.TemporalMatcher(model, loss_fn, Memory(a=long))
    matcher.step(short)
    assert (model.length, len(model.positions)) == (alone.length, len(alone.positions))
    assert torch.equal(model(long[0]), Growing()(long[0]))
    model = Growing()
    stamp.ghost_gramian(model, lambda m, b: loss_fn(m, b), [short, long])
    assert model.length == 0
    assert not hasattr(model, "positions")
    assert torch.equal(model(long[0]), Growing()(long[0]))


def test_buffers_of_every_kind_follow_the_current_task_only():
    memory = Memory(a=data(1, n=5), b=data(2, n=7))
    model = Counts()
    stamp.TemporalMatcher(model, loss_fn, memory).step(data(3, n=4))
    assert counted(model) == dict.fromkeys(("assigned", "late", "added", "new"), 4)
    model = Counts()
    held = model.added
    matcher = stamp.TemporalMatcher(model, loss_fn, memory)
    matcher.multi_step([data(3, n=4), data(4, n=2)], steps=2, optimizer=sgd)
    assert counted(model) == dict.fromkeys(("assigned", "late", "added", "new"), 6)
    assert model.added is held
    model, bad = Counts(), data(1)
    bad[0][0, 0] = float("inf")
    with pytest.raises(ValueError, match="is not finite"):
        stamp.TemporalMatcher(model, loss_fn, Memory(a=bad)).multi_step([data(3)], steps=1, optimizer=sgd)
    assert counted(model) == {"assigned": 0, "added": 0}
