"""The ghost Gramian against gradients that were really computed, per kind of layer and use."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedgram import stamp
from fedgram.stamp import _ghost_weight
from fedgram.stamp._ghost_weight import prefers_ghost
from fedgram_testing.ghosts import EXACT, assert_same_gram, kept_as_ghosts
from fedgram_testing.models import Mixed, built, cross_entropy, gradients, image_tasks, normal, squares


@pytest.fixture
def ghosts_only(monkeypatch):
    """Have every weight that has a ghost form computed so, whatever it costs."""
    monkeypatch.setattr(_ghost_weight, "prefers_ghost", lambda *args: True)


LAYERS = {
    "linear": (lambda: nn.Linear(40, 30), (40,)),
    "linear without bias": (lambda: nn.Linear(40, 30, bias=False), (40,)),
    "linear over positions": (lambda: nn.Linear(40, 30), (3, 40)),
    "conv1d": (lambda: nn.Conv1d(8, 60, 3, padding=1), (8, 5)),
    "conv1d strided": (lambda: nn.Conv1d(8, 60, 3, stride=2, dilation=2, padding=2), (8, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 64, 3), (16, 5, 4)),
    "conv2d strided": (lambda: nn.Conv2d(16, 64, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(1, 2)), (16, 6, 5)),
    "conv2d same": (lambda: nn.Conv2d(16, 64, (3, 5), padding="same", bias=False), (16, 4, 3)),
    "conv2d valid": (lambda: nn.Conv2d(16, 64, 3, padding="valid"), (16, 5, 4)),
    "conv2d circular": (lambda: nn.Conv2d(16, 64, 3, padding=1, padding_mode="circular"), (16, 3, 4)),
    "conv2d reflect": (lambda: nn.Conv2d(16, 64, 3, padding="same", padding_mode="reflect"), (16, 3, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_from_their_factors(kind, ghosts_only):
    make, shape = LAYERS[kind]
    model = built(make)
    tasks = normal((2, *shape), (1, *shape), (4, *shape))
    assert kept_as_ghosts(model, squares, tasks) == {"weight"}
    assert_same_gram(model, squares, tasks)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d strided", "linear"])
def test_one_sample_without_a_batch_dimension(kind, ghosts_only):
    make, shape = LAYERS[kind]
    model = built(make)
    assert_same_gram(model, squares, normal(shape, shape))


def test_layers_whose_rows_outnumber_their_entries_are_materialised():
    model = built(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 90)))
    tasks = normal((4, 2, 8, 8), (3, 2, 8, 8))
    assert kept_as_ghosts(model, squares, tasks) == {"3.weight"}
    assert_same_gram(model, squares, tasks)


def test_a_weight_turns_to_gradients_when_later_tasks_bring_too_many_rows():
    model = built(lambda: nn.Linear(6, 5))
    tasks = normal((1, 6), (2, 6), (50, 6), (2, 6))
    assert kept_as_ghosts(model, squares, tasks[:2]) == {"weight"}
    assert kept_as_ghosts(model, squares, tasks) == set()
    assert_same_gram(model, squares, tasks)


def test_the_rule_is_the_one_stated():
    for N in (1, 7, 31, 32, 33, 64, 500):
        for p, q, K in ((10, 30, 4), (64, 64, 2), (300, 7, 12)):
            assert prefers_ghost((q, p), K, N) == (N * N * (p + q) < (N + K * K) * p * q)
    assert prefers_ghost((64, 16, 3, 3), 2, 40) == prefers_ghost((64, 144), 2, 40)
    # Once more rows make factors the dearer way, no further row makes them the cheaper one again.
    for tokens in (0, 20, 1000):
        choices = [prefers_ghost((12, 9), 3, N, tokens) for N in range(200)]
        assert choices == sorted(choices, reverse=True)


class Text(nn.Module):
    """An embedding whose table is also the output layer, and a layer that is used three times."""

    def __init__(self, tied=True, **options):
        super().__init__()
        self.embedding = nn.Embedding(50, 24, **options)
        self.mix = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 50)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for _ in range(3):
            x = self.norm(x + torch.tanh(self.mix(x)))
        return self.head(x).mean(1)


def token_tasks():
    generator = torch.Generator().manual_seed(1)
    batch = lambda n: (torch.randint(50, (n, 2), generator=generator), torch.randint(50, (n,), generator=generator))  # noqa: E731
    return [batch(2), batch(1), batch(3)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"sparse": True}], ids=str)
def test_embeddings_tied_weights_and_layers_used_several_times(tied, options, ghosts_only):
    if tied and options.get("sparse"):
        options = {}  # autograd itself cannot add sparse and dense gradients of one table
    model = built(lambda: Text(tied, **options))
    tasks = token_tasks()
    tasks[0][0][0] = 3  # the padding token occurs
    names = {"embedding.weight", "mix.weight"} | ({"head.weight"} - ({"head.weight"} if tied else set()))
    assert kept_as_ghosts(model, cross_entropy, tasks) == names
    assert_same_gram(model, cross_entropy, tasks)


def test_a_tied_table_that_is_materialised_half_way():
    model = built(Text)
    tasks = token_tasks()
    generator = torch.Generator().manual_seed(2)
    tasks.append((torch.randint(50, (90, 2), generator=generator), torch.randint(50, (90,), generator=generator)))
    assert kept_as_ghosts(model, cross_entropy, tasks) == set()
    assert_same_gram(model, cross_entropy, tasks)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=str)
def test_embeddings_with_a_gradient_of_their_own_kind_are_named(options):
    model = built(lambda: nn.Sequential(nn.Embedding(9, 4, **options), nn.Linear(4, 3)))
    tasks = [torch.tensor([[1, 1, 2]]), torch.tensor([[2, 5]])]
    with torch.no_grad():
        model(torch.arange(9)[None])  # renormalises the vectors, so that no later look-up changes them
    assert_same_gram(model, squares, tasks, warns="no ghost form for 0")


@pytest.mark.parametrize("training", [False, True])
def test_a_mixed_network_and_what_it_warns_of(training):
    model = built(Mixed).train(training)
    before = copy.deepcopy(model.state_dict())
    assert "head.weight" in kept_as_ghosts(copy.deepcopy(model), cross_entropy, image_tasks())
    assert_same_gram(model, cross_entropy, image_tasks(), warns="no ghost form for Mixed, deep$")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # running statistics too
    assert model.training is training


def test_supported_models_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stamp.ghost_gramian(built(Text), cross_entropy, token_tasks())


class Functional(nn.Module):
    """Uses a layer's weight behind the layer's back."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 20)
        self.second = nn.Linear(20, 20)

    def forward(self, x):
        return F.linear(torch.tanh(self.second(self.first(x))), self.first.weight.T)


def test_weights_used_outside_of_their_layer_are_materialised_and_named():
    model = built(Functional)
    tasks = normal((2, 20), (3, 20))
    with pytest.warns(UserWarning, match=r"used outside of their layers' calls: first\.weight$"):
        stamp.ghost_gramian(model, squares, tasks)
    assert_same_gram(model, squares, tasks, warns="outside")
    penalised = lambda model, x: squares(model, x) + model.weight.square().sum()  # noqa: E731
    assert_same_gram(built(lambda: nn.Linear(20, 20)), penalised, tasks, warns=r"outside .* weight$")


def test_attention_uses_its_projection_behind_its_layer():
    model = built(lambda: nn.TransformerEncoderLayer(16, 2, 40, dropout=0.0, batch_first=True))
    tasks = normal((1, 3, 16), (2, 2, 16))
    assert {"linear1.weight", "linear2.weight"} <= set(kept_as_ghosts(copy.deepcopy(model), squares, tasks))
    assert_same_gram(model, squares, tasks, warns="self_attn")


def test_reparametrised_and_hooked_layers():
    weighted = built(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(20, 12)), nn.Linear(12, 30)))
    assert_same_gram(weighted, squares, normal((2, 20), (2, 20)), warns="no ghost form")
    hooked = built(lambda: nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 30)))
    hooked[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    hooked[0].register_forward_hook(lambda module, args, out: 3 * out)
    assert_same_gram(hooked, squares, normal((2, 20), (2, 20)))


def test_checkpointed_layers_are_recorded_once():
    model = built(lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20)))
    checkpointed = lambda model, x: (torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) ** 2).mean()  # noqa: E731
    assert_same_gram(model, checkpointed, normal((2, 20), (3, 20)))


def test_frozen_parameters_and_unreached_layers_count_as_nothing():
    model = built(lambda: nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)]))
    model[0].weight.requires_grad_(False)
    loss = lambda model, batch: (model[batch[0]](model[0](batch[1])) ** 2).mean()  # noqa: E731
    x, z = normal((2, 20), (3, 20))
    assert_same_gram(model, loss, [(1, x), (2, z), (1, z)])
    with torch.no_grad():
        model[2].weight.zero_()
    found = stamp.ghost_gramian(model[1:], lambda model, i: (model[i](x) ** 2).mean(), [0, 1])
    assert found.dense()[0, 1] == 0


def test_tasks_may_be_callables_and_weights_move_the_centre():
    model = built(lambda: nn.Linear(40, 30))
    tasks = normal((2, 40), (3, 40), (1, 40))
    u = torch.tensor([6.0, 3.0, 1.0])
    found = stamp.ghost_gramian(model, squares, [lambda task=task: task for task in tasks], u)
    g = gradients(model, squares, tasks)
    g0 = (u.double() / 10) @ g
    assert found.n0 == pytest.approx(float(g0 @ g0), rel=EXACT)
    torch.testing.assert_close(found.h, (g - g0) @ g0, rtol=0, atol=float(EXACT * (g0 @ g0 + g.norm() ** 2)))


def test_float32_models_keep_the_differences_of_similar_tasks():
    # Tasks that differ by a relative 1e-3. Against the same network in float64: each row carries a few float32
    # roundings (2^-24 each) through four layers, so the centred part is off by about 1e-6 / 1e-3 of its size.
    model = built(lambda: nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))).float()
    x, noise = normal((2, 64), (5, 2, 64))
    tasks = [(x + 1e-3 * noise[k]).float() for k in range(5)]
    found = stamp.ghost_gramian(model, squares, tasks)
    g = gradients(copy.deepcopy(model).double(), squares, [task.double() for task in tasks])
    e = g - g.mean(0)
    assert ((found.H - e @ e.T).abs().max() / (e @ e.T).abs().max()) < 1e-2
    assert ((found.dense() - g @ g.T).abs() / (g @ g.T).diagonal().max()).max() < 1e-6


class Largest(TorchDispatchMode):
    """Records the largest tensor that anything under it makes."""

    def __init__(self, model):
        super().__init__()
        self.entries = 0
        self.given = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, torch.Tensor)]
        storages = [(t.untyped_storage(), t.element_size()) for t in made]
        sizes = [s.nbytes() // size for s, size in storages if s.data_ptr() not in self.given]
        self.entries = max([self.entries, *sizes])
        return out


def test_no_gradient_of_a_ghost_layer_is_ever_made():
    width, K, rows = 512, 6, 8
    model = built(lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
    tasks = normal(*[(rows, width)] * K)
    assert kept_as_ghosts(model, squares, tasks) == {"0.weight", "2.weight"}
    with Largest(model) as largest:
        stamp.ghost_gramian(model, squares, tasks)
    assert largest.entries <= K * rows * width < width * width


def test_hooks_and_buffers_are_put_back_when_a_loss_raises():
    model = built(Mixed).train()
    tasks = image_tasks()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fails_later(model, batch):
        calls.append(batch)
        loss = cross_entropy(model, batch)
        if len(calls) == 2:
            raise ArithmeticError("on purpose")
        return loss

    with pytest.raises(ArithmeticError):
        stamp.ghost_gramian(model, fails_later, tasks)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Late(nn.Linear):
    """A layer with a buffer that its first pass makes."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("calls", None)

    def forward(self, x):
        self.calls = torch.ones(()) if self.calls is None else self.calls + 1
        return super().forward(x)


def test_buffers_that_a_pass_makes_are_gone_again():
    model = built(Late)
    with pytest.warns(UserWarning, match="no ghost form"):
        stamp.ghost_gramian(model, squares, normal((2, 6), (2, 6)))
    assert model.calls is None


def test_an_input_overwritten_after_its_use_is_refused():
    model = built(lambda: nn.Linear(20, 20, bias=False))

    def overwriting(model, x):
        x = x.clone()
        loss = (model(x) ** 2).mean()
        x.zero_()
        return loss

    with pytest.raises(RuntimeError, match="input of a Linear was modified in place"):
        stamp.ghost_gramian(model, overwriting, normal((2, 20), (2, 20)))


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (lambda model, x: model(x), r"one floating-point number for task 0, got torch.float64 \(2, 3\)"),
        (lambda model, x: 0.5, "one floating-point number for task 0, got float"),
        (lambda model, x: x.sum(), "the loss of task 0 depends on no trainable parameter"),
        (lambda model, x: model(x).sum() * (torch.inf if len(x) == 1 else 1), "gradient of task 1 is not finite"),
    ],
)
def test_losses_that_make_no_gradient_are_refused(loss_fn, reason):
    model = built(lambda: nn.Linear(4, 3))
    with pytest.raises(ValueError, match=reason):
        stamp.ghost_gramian(model, loss_fn, normal((2, 4), (1, 4)))


def test_bad_arguments_are_refused():
    model = built(lambda: nn.Linear(4, 3))
    with pytest.raises(ValueError, match="none given"):
        stamp.ghost_gramian(model, squares, [])
    with pytest.raises(ValueError, match="weights: expected 2 numbers"):
        stamp.ghost_gramian(model, squares, normal((2, 4), (1, 4)), [1.0])
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        stamp.ghost_gramian(model.requires_grad_(False), squares, normal((2, 4)))
