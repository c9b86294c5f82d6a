"""Models of 16 bits, and under autocast, whose weights turn from factors to gradients half way."""

import pytest
import torch
from torch import nn

from fedgram import stamp
from fedgram_testing.ghosts import kept_as_ghosts
from fedgram_testing.models import built, gradients, normal, squares

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24, torch.float64: 2**-53}


def tasks_that_grow(dtype):
    return [task.to(dtype) for task in normal((1, 16), (2, 16), (300, 16))]


def network(dtype):
    return built(lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_weight_that_turns_to_gradients_half_way(dtype):
    model, tasks = network(dtype), tasks_that_grow(dtype)
    assert kept_as_ghosts(model, squares, tasks[:2]) == {"0.weight"}
    assert kept_as_ghosts(model, squares, tasks) == set()
    found = stamp.ghost_gramian(model, squares, tasks)
    g = gradients(model, squares, tasks)
    norms = g.norm(dim=1)
    # Each entry of a gradient is rounded once where autograd makes it, and once in every layer before.
    assert ((found.dense() - g @ g.T).abs() / torch.outer(norms, norms)).max() < 8 * ROUNDING[dtype]
    stamp.ghost_match(model, squares, tasks, c=0.4)
    assert all(p.grad.dtype == dtype for p in model.parameters())


def test_a_weight_that_only_later_tasks_reach_in_16_bits():
    model = built(lambda: nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])).bfloat16()
    tasks = [(0, 2), (1, 2), (1, 200), (0, 1)]
    x = normal((200, 16))[0].bfloat16()
    loss = lambda model, task: (model[task[0]](x[: task[1]]) ** 2).mean()  # noqa: E731
    g = gradients(model, loss, tasks)
    found = stamp.ghost_gramian(model, loss, tasks)
    assert (found.dense() - g @ g.T).abs().max() < 8 * 2**-8 * g.norm(dim=1).max() ** 2


def test_all_of_it_under_autocast():
    model, tasks = network(torch.float32), tasks_that_grow(torch.float32)
    loss = lambda model, x: (model(x).float() ** 2).mean()  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        g = gradients(model, loss, tasks)
        found = stamp.ghost_gramian(model, loss, tasks)
        few = stamp.ghost_gramian(model, loss, tasks[:2])
    norms = g.norm(dim=1)
    error = (found.dense() - g @ g.T).abs() / torch.outer(norms, norms)
    assert error.max() < 8 * 2**-8
    assert ((few.dense() - g[:2] @ g[:2].T).abs() / torch.outer(norms[:2], norms[:2])).max() < 8 * 2**-8
