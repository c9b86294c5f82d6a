"""What a client may be given: batches of any type, losses, step lengths; and that a refusal leaves the model whole."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing._internal.distributed.fake_pg import FakeStore

from fedgram import stamp
from fedgram.stamp._batches import to_device
from fedgram_testing.memories import OneTask

Batch = collections.namedtuple("Batch", "x y")


class Moved:
    """A batch of a library of its own."""

    def __init__(self, x, device="cpu"):
        self.x, self.device = x, device

    def to(self, device):
        return Moved(self.x, device)


def data(seed=0, n=8):
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 3, generator=g), torch.arange(n) % 2)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def whole(model):
    """Everything that a refusal must leave alone."""
    modes = {name: m.training for name, m in model.named_modules()}
    return {n: t.clone() for n, t in model.state_dict().items()}, modes


def unchanged(model, before):
    state, modes = whole(model)
    assert modes == before[1]
    assert all(torch.equal(t, before[0][name]) for name, t in state.items())
    assert all(p.grad is None for p in model.parameters())


# --- batches


def test_a_batch_keeps_its_types():
    meta = torch.device("meta")
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    x, y = data()
    batch = {
        "named": Batch(x, y),
        "list": [x, (y, "b", None)],
        "ordered": collections.OrderedDict(z=x, a=y),
        "default": collections.defaultdict(list, a=x),
        "own": Moved(x),
    }
    moved = to_device(batch, meta)
    assert type(moved["named"]) is Batch
    assert moved["named"].x.device == moved["list"][0].device == moved["list"][1][0].device == meta
    assert type(moved["list"]) is list
    assert moved["list"][1][1:] == ("b", None)
    assert list(moved["ordered"]) == ["z", "a"]
    assert [type(moved[name]) for name in ("ordered", "default")] == [collections.OrderedDict, collections.defaultdict]
    assert moved["default"]["a"].device == meta
    assert moved["default"]["new"] == []
    assert moved["own"].device == meta
    assert batch["ordered"]["z"] is x
    assert batch["default"]["a"] is x
    assert type(to_device(packed, meta)) is type(packed)
    assert to_device(packed, meta).data.device == meta


def test_named_and_packed_batches_and_mappings_are_steps_like_others():
    def named(m, b):
        return F.cross_entropy(m(b.x), b.y)

    expected = stamp.TemporalMatcher(network(), loss_fn, OneTask(data(1))).step(data(0)).match.coefficients
    found = stamp.TemporalMatcher(network(), named, OneTask(data(1))).step(data(0))
    assert torch.equal(found.match.coefficients, expected)
    by_name = stamp.TemporalMatcher(
        network(), lambda m, b: F.cross_entropy(m(b["x"]), b["y"]), OneTask(data(1)._asdict())
    ).step(data(0)._asdict())
    assert torch.equal(by_name.match.coefficients, expected)
    model = nn.LSTM(3, 4)
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    steps = stamp.TemporalMatcher(model, lambda m, b: m(b[0])[0].data.square().mean(), OneTask((packed, 0)))
    assert steps.step((packed, 0)).match.status == "optimal"


# --- losses


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda m, b: torch.tensor(3),
            r"expected one floating-point number for the current task, got torch.int64 \(\)",
        ),
        (lambda m, b: 3.0, "expected one floating-point number for the current task, got float"),
        (lambda m, b: loss_fn(m, b).detach(), "the loss of the current task depends on no trainable parameter"),
        (
            lambda m, b: loss_fn(m, b) if len(b[0]) == 8 else torch.zeros(()),
            "the loss of earlier task 'old' depends on no trainable parameter",
        ),
    ],
)
def test_losses_that_are_none_are_named(loss, message):
    model = network()
    before = whole(model)
    matcher = stamp.TemporalMatcher(model, loss, OneTask(data(1, 6)))
    with pytest.raises(ValueError, match=f"loss_fn: {message}"):
        matcher.step(data())
    with pytest.raises(ValueError, match=f"loss_fn: {message}"):
        matcher.multi_step([data()], steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    unchanged(model, before)


# --- refusals


def test_a_refused_batch_leaves_running_statistics_and_modes():
    model, bad = network(), data(1)
    bad.x[0, 0] = float("nan")
    before = whole(model)
    with pytest.raises(ValueError, match=r"the current task, '0.weight' is not finite"):
        stamp.TemporalMatcher(model, loss_fn, OneTask(data())).step(bad)
    unchanged(model, before)

    def evaluating(m, b):
        m.eval()
        return loss_fn(m, b)

    with pytest.raises(ValueError, match="is not finite"):
        stamp.TemporalMatcher(model, evaluating, OneTask(data())).step(bad)
    unchanged(model, before)


def test_an_earlier_task_that_changes_modes_does_not_change_them_for_good():
    model = network()

    def loss(m, b):
        m.train(len(b[0]) == 8)
        return loss_fn(m, b)

    stamp.TemporalMatcher(model, loss, OneTask(data(1, 6))).step(data())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), "a", None])
def test_the_outer_step_has_a_finite_length(lr):
    model = network()
    before = whole(model)
    with pytest.raises(ValueError, match="lr: expected a finite number"):
        stamp.TemporalMatcher(model, loss_fn, OneTask(data(1))).multi_step(
            [data()], steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lr=lr
        )
    unchanged(model, before)


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float16, 1e9), (torch.float32, 1e60), (torch.float64, 1e308)])
def test_an_outer_step_out_of_range_is_refused(dtype, lr):
    model = network(dtype)
    before = whole(model)
    now, old = (Batch(b.x.to(dtype), b.y) for b in (data(), data(1)))
    with pytest.raises(ValueError, match=rf"lr: with .*, '.*' would exceed .*, the largest number of {dtype}"):
        stamp.TemporalMatcher(model, loss_fn, OneTask(old)).multi_step(
            [now], steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=100.0), lr=lr
        )
    unchanged(model, before)


def test_a_whole_number_of_steps_may_be_a_float():
    matcher = stamp.TemporalMatcher(network(), loss_fn, OneTask(data()))
    matcher.multi_step([data()] * 2, steps=2.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


@pytest.mark.parametrize("weight", ["a", float("nan"), -0.1, [0.5, 0.5]])
def test_the_current_weight_is_a_share(weight):
    with pytest.raises(ValueError, match="current_weight: expected a"):
        stamp.TemporalMatcher(network(), loss_fn, OneTask(data()), current_weight=weight)


class Output(collections.OrderedDict):
    """A mapping as transformers' outputs are: entries can be set, ``update`` is refused."""

    def update(self, *args, **kwargs):
        raise RuntimeError("you cannot use update")


def test_mappings_that_refuse_update_keep_their_type():
    batch = Output()
    batch["x"] = torch.ones(2)
    assert to_device(batch, torch.device("cpu")) is batch
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is Output
    assert moved["x"].device.type == "meta"
    assert batch["x"].device.type == "cpu"


def test_lazy_modules_take_their_first_step():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    matcher = stamp.TemporalMatcher(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), stamp.PrototypeMemory(4))
    assert matcher.step((torch.randn(8, 5), torch.arange(8) % 3)).match.status == "optimal"
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("traced", [False, True])
def test_scripted_models(traced):
    def loss_fn(model, x):
        return model(x).square().sum()

    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model = torch.jit.trace(model, torch.randn(2, 5), check_trace=False) if traced else torch.jit.script(model)
    stamp.TemporalMatcher(model, loss_fn, OneTask(torch.randn(6, 5))).step(torch.randn(8, 5))
    passes = int(model.state_dict()["1.num_batches_tracked"])
    with pytest.raises(ValueError, match="current task"):
        stamp.TemporalMatcher(model, loss_fn, OneTask(torch.randn(6, 5))).step(torch.full((8, 5), torch.nan))
    with pytest.warns(UserWarning, match="no ghost form for 0, 1, 2"):
        stamp.ghost_gramian(model, loss_fn, [torch.randn(8, 5)])
    assert int(model.state_dict()["1.num_batches_tracked"]) == passes


def test_ranks_whose_gradients_nobody_would_average_are_refused():
    model = nn.Linear(3, 2)
    memory = stamp.PrototypeMemory(capacity=4)
    for ranks in (1, 2):
        torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        try:
            matcher = stamp.TemporalMatcher(nn.parallel.DistributedDataParallel(model), lambda m, x: m(x).sum(), memory)
            if ranks == 1:
                matcher.step(torch.ones(4, 3))
                assert (model.bias.grad > 0).all()
                continue
            with pytest.raises(ValueError, match=r"model: step would not average over the ranks .*pass its \.module"):
                matcher.step(torch.ones(4, 3))
            matcher = stamp.TemporalMatcher(matcher.model.module, matcher.loss_fn, memory)
            matcher.step(torch.ones(4, 3))
        finally:
            torch.distributed.destroy_process_group()
