"""The thread that reads the next modules: how far it goes, in which order, what it says of errors, that it ends."""

import threading
import time
from collections.abc import Mapping

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import LoraLayer, _read_ahead, portions
from fedgram.flora_na._read_ahead import ReadAhead
from fedgram.flora_na.streamed import iter_aggregate

LAYER_BYTES = 2 * 4 * 8 * 4  # of both factors of rank 4 of an 8 x 8 module in float32


class Recorded(Mapping):
    """Layers made when they are asked for; ``reads`` says which were, ``broken`` which cannot be."""

    def __init__(self, modules, seed=0, broken=(), r=4):
        self.modules, self.seed, self.broken, self.r = modules, seed, broken, r
        self.reads = []

    def __getitem__(self, name):
        if name in self.broken:
            raise ValueError(f"{name}: cannot be read")
        self.reads.append(name)
        generator = torch.Generator().manual_seed(self.seed)
        A, B = torch.randn(self.r, 8, generator=generator), torch.randn(8, self.r, generator=generator)
        return LoraLayer(A=A, B=B)

    def __iter__(self):
        return iter(self.modules)

    def __len__(self):
        return len(self.modules)

    def __contains__(self, name):
        return name in self.modules


@pytest.fixture(autouse=True)
def portion_bytes(monkeypatch):
    """A portion is one module of two clients, and bounds are in units of portions."""
    monkeypatch.setattr(portions, "CHUNK_BYTES", 2 * LAYER_BYTES)
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 0)
    monkeypatch.setattr(_read_ahead, "SPARE", 0)


def names(count):
    return [f"m{i}" for i in range(count)]


def settled(values):
    """Wait until a list has stopped growing; its length."""
    before = -1
    while len(values) != before:
        before = len(values)
        time.sleep(0.1)
    return before


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fedgram-read-ahead"]


def test_it_reads_ahead_while_the_consumer_works_but_not_beyond_its_budget():
    clients = [Recorded(names(9), seed) for seed in range(2)]
    parts = iter_aggregate(clients, method="fedavg")
    assert clients[0].reads == []
    for i in range(3):
        assert list(next(parts).adapter.modules) == [f"m{i}"]
        # Held at most are 1.5 portions: of the next one, the first client's layer.
        assert settled(clients[0].reads) == i + 2
        assert settled(clients[1].reads) == i + 1
    parts.close()
    assert reading_threads() == []


@pytest.mark.parametrize(("spare", "begun"), [(1, 2), (100, 3)])
def test_a_second_portion_is_read_ahead_where_it_fits_and_half_a_third(monkeypatch, spare, begun):
    monkeypatch.setattr(_read_ahead, "SPARE", spare * LAYER_BYTES)
    clients = [Recorded(names(9), seed) for seed in range(2)]
    parts = iter_aggregate(clients, method="fedavg")
    for i in range(3):
        next(parts)
        assert settled(clients[1].reads) == i + 2
        assert settled(clients[0].reads) == i + begun
    parts.close()


def test_small_portions_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 3 * 2 * LAYER_BYTES)
    clients = [Recorded(names(9), seed) for seed in range(2)]
    parts = iter_aggregate(clients, method="fedavg")
    next(parts)
    assert settled(clients[1].reads) == 3  # one is held by the consumer, two are ready
    parts.close()


def test_what_is_held_is_bounded_whatever_the_sizes(monkeypatch):
    sizes = {"small": 1, "large": 40, "small again": 1, "large again": 40, "last": 2}

    class Sized(Recorded):
        def __getitem__(self, name):
            self.r = sizes[name]
            return super().__getitem__(name)

    clients = [Sized(list(sizes), seed) for seed in range(3)]
    held = []
    count = ReadAhead._count
    monkeypatch.setattr(
        ReadAhead, "_count", lambda self, n: (count(self, n), held.append((self._held, self._starving)))[0]
    )
    for part in iter_aggregate(clients, method="fedavg"):
        settled(held)
        del part
    layer = LAYER_BYTES * 10
    largest = 3 * layer
    assert max(amount for amount, starving in held if not starving) <= 1.5 * largest + layer
    assert max(amount for amount, _ in held) <= 2 * largest


def test_grams_count_as_well_as_factors(monkeypatch):
    clients = [Recorded(names(7), seed) for seed in range(3)]
    grams = portions.GRAM_PAIRS * 2 * 12 * 12 * 8  # G_B and G_A in float64, of total rank 12
    monkeypatch.setattr(portions, "CHUNK_BYTES", 3 * (3 * LAYER_BYTES + grams))
    sizes = [len(part.adapter.modules) for part in iter_aggregate(clients, method="fedavg")]
    assert sizes == [3, 3, 1]
    monkeypatch.setattr(portions, "CHUNK_BYTES", 3 * (3 * LAYER_BYTES + grams) - 1)
    assert [len(part.adapter.modules) for part in iter_aggregate(clients, method="fedavg")] == [2, 2, 2, 1]


def test_portions_together_are_what_aggregate_returns():
    clients = [Recorded(names(5), seed) for seed in range(3)]
    whole = flora_na.aggregate([{n: c[n] for n in c} for c in clients], [3, 1, 1], method="svd")
    layers, reports = {}, {}
    for part in iter_aggregate(clients, [3, 1, 1], method="svd"):
        layers |= part.adapter.modules
        reports |= part.report.modules
        assert part.report.clients == whole.report.clients
    assert list(layers) == names(5)
    for name, layer in whole.adapter.modules.items():
        assert torch.equal(layer.A, layers[name].A)
        assert torch.equal(layer.B, layers[name].B)
        assert reports[name].to_dict() == whole.report.modules[name].to_dict()


def test_an_error_of_the_reader_comes_after_what_was_read_before():
    clients = [Recorded(names(4), 0), Recorded(names(4), 1, broken=["m2"])]
    parts = iter_aggregate(clients, method="fedavg")
    assert [list(next(parts).adapter.modules) for _ in range(2)] == [["m0"], ["m1"]]
    with pytest.raises(ValueError, match="m2: cannot be read"):
        next(parts)
    assert reading_threads() == []


def test_an_error_of_the_consumer_ends_the_reader():
    clients = [Recorded(names(50), seed) for seed in range(2)]
    clients[0].seed = 5
    with pytest.raises(ValueError, match="align_to: has no module m0"):
        list(iter_aggregate(clients, method="svd", align_to={}))
    assert reading_threads() == []
    assert len(clients[0].reads) < 50


def test_options_are_checked_before_anything_is_read():
    clients = [Recorded(names(2)), Recorded(names(3))]
    with pytest.raises(ValueError, match="m2: client 0 has no such module"):
        iter_aggregate(clients)
    with pytest.raises(ValueError, match=r"shared: .* not streamed"):
        iter_aggregate(clients, method="flora-na", shared=True)
    assert [client.reads for client in clients] == [[], []]
    assert [list(p.adapter.modules) for p in iter_aggregate(clients, missing="zero")] == [["m0"], ["m1"], ["m2"]]
