"""What a layer's calls do not show: blocks hidden from the graph, substituted weights, hooks."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedgram import stamp
from fedgram_testing.ghosts import EXACT, assert_same_gram
from fedgram_testing.models import built, gradients, normal, squares


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


def two_layers():
    return built(lambda: nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)))


def assert_warns_and_is_right(model, loss, warns):
    """Without a copy of the model, which would lack its hooks."""
    tasks = normal((2, 20), (3, 20))
    g = gradients(model, loss, tasks)
    with pytest.warns(UserWarning, match=warns):
        found = stamp.ghost_gramian(model, loss, tasks)
    assert (found.dense() - g @ g.T).abs().max() < EXACT * g.norm() ** 2


def doubled(model, x, names=("0.weight", "0.bias", "2.weight", "2.bias")):
    parameters = {name: 2 * p for name, p in model.named_parameters() if name in names}
    return (torch.func.functional_call(model, parameters, (x,)) ** 2).mean()


def exchanged(model, x):
    parameters = {"0.weight": model[2].weight, "2.weight": model[0].weight}
    return (torch.func.functional_call(model, parameters, (x,)) ** 2).mean()


def one_step_further(model, x):
    """The loss after a step of descent, through the step (MAML)."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(squares(model, x[:1]), list(parameters.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    return (torch.func.functional_call(model, moved, (x,)) ** 2).mean()


def bias_of_the_weight(model, x):
    return (torch.func.functional_call(model, {"0.bias": model[0].weight.sum(1)}, (x,)) ** 2).mean()


@pytest.mark.parametrize("loss", [doubled, exchanged, one_step_further, bias_of_the_weight])
def test_substituted_weights_are_materialised(loss):
    assert_same_gram(two_layers(), loss, normal((2, 20), (3, 20)), warns="outside of their layers' calls: .*0.weight")


def test_a_layer_whose_forward_was_replaced_has_no_ghost_form():
    model = two_layers()
    first = model[0]
    first.forward = lambda x: F.linear(x, 2 * first.weight)
    assert_warns_and_is_right(model, squares, "no ghost form for 0$")


def masked(model):
    mask = torch.arange(20.0)[:, None] < 7
    model[0].weight.register_hook(lambda grad: grad * mask)
    return squares


def on_an_output(model):
    def loss(model, x):
        y = model[0](x)
        y.register_hook(lambda grad: 3 * grad)
        return (model[2](torch.tanh(y)) ** 2).mean()

    return loss


def by_a_forward_hook(model):
    model[0].register_forward_hook(lambda module, args, out: out.register_hook(lambda grad: 3 * grad) and None)
    return squares


@pytest.mark.parametrize("hook", [masked, on_an_output, by_a_forward_hook])
def test_gradients_under_hooks_are_materialised(hook):
    model = two_layers()
    assert_warns_and_is_right(model, hook(model), r"under hooks that may change them: 0\.weight$")


@pytest.mark.parametrize("change", [lambda out: 2 * out, torch.relu_])
def test_a_hook_on_every_layers_output(change):
    model, tasks = two_layers(), normal((2, 20), (3, 20))
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: change(out) if isinstance(module, nn.Linear) else None
    )
    with hook:
        assert_same_gram(model, squares, tasks, warns=r"under hooks .*: 0\.weight, 2\.weight$")


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_backward_hooks_of_the_old_kind():
    model = two_layers()
    model[2].register_backward_hook(lambda module, into, out: (into[0], into[1], 3 * into[2]))
    assert_warns_and_is_right(model, squares, "no ghost form for 2$")


def test_hooks_that_are_gone_and_backward_hooks_of_layers_cost_nothing():
    model, tasks = two_layers(), normal((2, 20), (3, 20))
    model[0].weight.register_hook(lambda grad: 3 * grad).remove()
    model[2].register_full_backward_hook(lambda module, into, out: (3 * into[0],))
    g = gradients(model, squares, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stamp.ghost_gramian(model, squares, tasks)
    assert (found.dense() - g @ g.T).abs().max() < EXACT * g.norm() ** 2


@pytest.mark.filterwarnings("default")  # what torch.compile warns about depends on its version
def test_a_compiled_model():
    torch.compiler.reset()
    model, tasks = two_layers(), normal((2, 20), (3, 20))
    expected = stamp.ghost_gramian(model, squares, tasks).dense()
    found = stamp.ghost_gramian(torch.compile(model, backend="eager"), squares, tasks).dense()
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=0)
