"""What a layer's calls do not show: blocks hidden from the graph, substituted weights, hooks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedgram import stamp
from fedgram_testing.ghosts import assert_same_gram
from fedgram_testing.models import built, normal


@pytest.mark.parametrize("before_a_layer", [True, False])
def test_reentrant_checkpointing_is_refused(before_a_layer):
    model = built(lambda: nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)))

    def loss(model, x):
        y = torch.utils.checkpoint.checkpoint(model[0], x.requires_grad_(), use_reentrant=True)
        return ((model[1](y) if before_a_layer else y) ** 2).mean()

    with pytest.raises(ValueError, match="model: a block runs under reentrant activation checkpointing"):
        stamp.ghost_gramian(model, loss, normal((2, 20), (3, 20)))


class OwnCheckpoint(torch.autograd.Function):
    """Recomputes a linear map in its backward pass; its parameter is an argument, so that nothing is hidden."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def test_a_checkpoint_that_takes_its_parameters_as_arguments_is_an_ordinary_function():
    model = built(lambda: nn.ModuleList([nn.Linear(20, 20, bias=False), nn.Linear(20, 20)]))
    loss = lambda model, x: (model[1](OwnCheckpoint.apply(x, model[0].weight)) ** 2).mean()  # noqa: E731
    assert_same_gram(model, loss, normal((2, 20), (3, 20)), warns="outside")
