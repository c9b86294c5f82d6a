"""Matching with one weighted backward pass."""

import copy

import pytest
import torch
from torch import nn

from fedgram import stamp
from fedgram_testing.models import Mixed, built, cross_entropy, gradients, image_tasks, normal, squares


@pytest.mark.parametrize("training", [False, True])
def test_the_matched_direction_lies_in_grad(training):
    model = built(Mixed).train(training)
    tasks = image_tasks()
    g = gradients(copy.deepcopy(model), cross_entropy, tasks)
    u = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="deep"):
        found = stamp.ghost_match(model, cross_entropy, tasks, u, c=0.5)
    direction = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    expected = stamp.match(list(g), u, c=0.5)
    torch.testing.assert_close(direction, expected.direction, rtol=0, atol=float(1e-9 * expected.direction.norm()))
    assert found.dual.gap <= 1e-9 * found.gramian.n0
    torch.testing.assert_close(direction, found.dual.coefficients.to(g) @ g, rtol=0, atol=float(1e-12 * g.norm()))
    reference = [cross_entropy(copy.deepcopy(model), task).detach() for task in tasks]
    if not training:
        torch.testing.assert_close(found.losses, torch.stack(reference))


def test_both_passes_of_a_match_drop_the_same_units():
    model = built(lambda: nn.Sequential(nn.Linear(40, 60), nn.Dropout(0.5), nn.Linear(60, 50))).train()
    tasks = normal((2, 40), (3, 40))
    torch.manual_seed(5)
    g = gradients(model, squares, tasks)
    torch.manual_seed(5)
    found = stamp.ghost_match(model, squares, tasks, c=0.4)
    direction = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(direction, found.dual.coefficients.to(g) @ g, rtol=0, atol=float(1e-12 * g.norm()))


def test_former_gradients_are_replaced_or_kept_on_error():
    model = built(lambda: nn.Linear(40, 30))
    tasks = normal((2, 40), (3, 40))
    model.weight.grad = torch.full_like(model.weight, 7.0)
    first = stamp.ghost_match(model, squares, tasks, c=0.0)
    mean = gradients(model, squares, tasks).mean(0)
    torch.testing.assert_close(torch.cat([model.weight.grad.reshape(-1), model.bias.grad]), mean)
    assert first.losses.shape == (2,)
    kept, calls = model.weight.grad, []

    def fails_in_the_second_pass(model, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise ArithmeticError("on purpose")
        return squares(model, batch)

    with pytest.raises(ArithmeticError):
        stamp.ghost_match(model, fails_in_the_second_pass, tasks)
    assert model.weight.grad is kept


def test_a_rescaled_match_of_one_task_is_its_gradient():
    model, (task,) = built(lambda: nn.Linear(40, 30)), normal((2, 40))
    stamp.ghost_match(model, squares, [task], c=0.5, rescale="mean")
    g = gradients(model, squares, [task])[0]
    torch.testing.assert_close(torch.cat([model.weight.grad.reshape(-1), model.bias.grad]), g, rtol=1e-12, atol=0)


def test_a_callable_task_is_called_once_per_match():
    drawn = []
    task = lambda: drawn.append(1) or normal((2, 40))[0]  # noqa: E731
    stamp.ghost_match(built(lambda: nn.Linear(40, 30)), squares, [task])
    assert len(drawn) == 1


def test_modes_that_the_loss_changes_are_restored():
    model = built(Mixed)
    next(model.children()).eval()
    before = [m.training for m in model.modules()]

    def evaluating(m, batch):
        m.eval()
        return cross_entropy(m, batch)

    with pytest.warns(UserWarning, match="deep"):
        stamp.ghost_gramian(model, evaluating, image_tasks())
    assert [m.training for m in model.modules()] == before


def test_a_second_pass_that_fails_leaves_running_statistics():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {name: b.clone() for name, b in model.named_buffers()}
    tasks = [torch.randn(5, 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    calls = []

    def loss(m, x):
        calls.append(1)
        if len(calls) == 5:  # the second of the second pass
            raise RuntimeError("no")
        return m(x).pow(4).mean()

    with pytest.raises(RuntimeError, match="no"):
        stamp.ghost_match(model, loss, tasks)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_a_direction_that_is_not_finite_is_refused():
    model = nn.Linear(4, 3, bias=False)
    model.weight.grad = torch.ones(3, 4)
    tasks = [(torch.ones(5, 4), 1e3), (torch.arange(20.0).reshape(5, 4), 1e-38)]
    with pytest.raises(ValueError, match="tasks: the direction, or a loss times its coefficient, exceeds the range"):
        stamp.ghost_match(model, lambda model, task: (model(task[0]) * task[1]).sum(), tasks)
    assert torch.equal(model.weight.grad, torch.ones(3, 4))


def test_sparse_gradients_are_matched(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to_dense", lambda grad: pytest.fail("a whole table for a few of its rows"))
    model = nn.Embedding(9, 4, sparse=True)
    found = stamp.ghost_match(model, squares, [torch.tensor([1, 2]), torch.tensor([3])])
    assert found.dual.status == "optimal"
    assert model.weight.grad.is_sparse
