"""The thread that reads the next modules: how far it goes, in which order, what it says of errors, that it ends."""

import threading

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import _read_ahead, portions, streamed
from fedgram.flora_na._read_ahead import ReadAhead
from fedgram.flora_na.aggregation import aggregate_cohort
from fedgram.flora_na.streamed import iter_aggregate
from fedgram_testing.recorded import LAYER_BYTES, Recorded, names, settled


@pytest.fixture(autouse=True)
def portion_bytes(monkeypatch):
    """A portion is one module of two clients, and bounds are in units of portions."""
    monkeypatch.setattr(portions, "CHUNK_BYTES", 2 * LAYER_BYTES)
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 0)
    monkeypatch.setattr(_read_ahead, "SPARE", 0)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fedgram-read-ahead"]


@pytest.fixture
def begun(monkeypatch):
    """While each portion is worked on, how many layers of two clients have been read."""
    clients, seen = [Recorded(names(9), seed) for seed in range(2)], []

    def watched(*args, **options):
        seen.append(tuple(settled(client.reads) for client in clients))
        return aggregate_cohort(*args, **options)

    monkeypatch.setattr(streamed, "aggregate_cohort", watched)
    return clients, seen


def test_it_reads_ahead_while_a_portion_is_worked_on_but_not_beyond_its_budget(begun):
    clients, seen = begun
    parts = iter_aggregate(clients, method="fedavg")
    assert clients[0].reads == []
    for i in range(3):
        assert list(next(parts).adapter.modules) == [f"m{i}"]
    parts.close()
    assert reading_threads() == []
    assert seen == [(2, 1), (3, 2), (4, 3)]  # held at most are 1.5 portions: of the next one, the first client's layer


def test_what_is_done_with_is_given_back_at_once():
    clients = [Recorded(names(9), seed) for seed in range(2)]
    parts = iter_aggregate(clients, method="fedavg")
    for i in range(3):
        next(parts)
        assert [settled(client.reads) for client in clients] == [i + 3, i + 2]
    parts.close()


@pytest.mark.parametrize(("spare", "third"), [(1, 0), (100, 1)])
def test_a_second_portion_is_read_ahead_where_it_fits_and_half_a_third(monkeypatch, begun, spare, third):
    monkeypatch.setattr(_read_ahead, "SPARE", spare * LAYER_BYTES)
    clients, seen = begun
    parts = iter_aggregate(clients, method="fedavg")
    for _ in range(3):
        next(parts)
    parts.close()
    assert seen == [(i + 2 + third, i + 2) for i in range(3)]


def test_small_portions_do_not_wait_for_each_other(monkeypatch, begun):
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 3 * 2 * LAYER_BYTES)
    clients, seen = begun
    parts = iter_aggregate(clients, method="fedavg")
    next(parts)
    parts.close()
    assert seen == [(3, 3)]  # one is worked on, two are ready


def test_no_more_than_two_are_ready_however_small_they_are(monkeypatch, begun):
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 1 << 30)
    clients, seen = begun
    parts = iter_aggregate(clients, method="fedavg")
    for _ in range(3):
        next(parts)
    parts.close()
    assert seen == [(3, 3), (4, 4), (5, 5)]


def test_no_memory_is_spared_where_ranks_exceed_a_side(monkeypatch, begun):
    """There the decomposition takes it."""
    monkeypatch.setattr(_read_ahead, "SPARE", 100 * LAYER_BYTES)
    clients, seen = begun
    for client in clients:
        client.sizes = lambda name: (7, 8, 4)
    parts = iter_aggregate(clients, method="fedavg")
    for _ in range(3):
        next(parts)
    parts.close()
    assert seen == [(2, 1), (3, 2), (4, 3)]


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
