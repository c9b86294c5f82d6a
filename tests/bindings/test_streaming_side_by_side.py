"""Two portions worked on at a time: where, within which memory, and that nothing else is different."""

import threading
import time

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import _read_ahead, portions, streamed
from fedgram.flora_na._read_ahead import ReadAhead
from fedgram.flora_na.aggregation import aggregate_cohort
from fedgram.flora_na.streamed import Stream, iter_aggregate
from fedgram.kernels import native_calls, spread_over_jobs
from fedgram_testing.gradients import threads
from fedgram_testing.recorded import LAYER_BYTES, Recorded, names, settled


@pytest.fixture(autouse=True)
def portion_bytes(monkeypatch):
    """A portion is one module of two clients, of which two are held."""
    monkeypatch.setattr(portions, "CHUNK_BYTES", 2 * LAYER_BYTES)
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 2 * 2 * LAYER_BYTES)
    monkeypatch.setattr(_read_ahead, "SPARE", 0)


@pytest.fixture(autouse=True)
def four_threads():
    with threads(4), spread_over_jobs():
        yield


@pytest.fixture
def clients():
    return [Recorded(names(8), seed) for seed in range(2)]


@pytest.fixture
def working(monkeypatch):
    """Of each portion, how many are worked on when it is begun, with time for another to be."""
    now, seen = [], []

    def watched(*args, **options):
        now.append(threading.get_ident())
        seen.append(len(now))
        time.sleep(0.05)
        try:
            return aggregate_cohort(*args, **options)
        finally:
            now.remove(threading.get_ident())

    monkeypatch.setattr(streamed, "aggregate_cohort", watched)
    return seen


def test_two_portions_are_worked_on_at_a_time_and_come_in_order(monkeypatch, clients):
    both = threading.Barrier(2, timeout=30)
    monkeypatch.setattr(streamed, "aggregate_cohort", lambda *a, **o: (both.wait(), aggregate_cohort(*a, **o))[1])
    parts = list(iter_aggregate(clients, [3, 1], method="svd"))
    whole = flora_na.aggregate([{n: c[n] for n in c} for c in clients], [3, 1], method="svd")
    assert [list(part.adapter.modules) for part in parts] == [[name] for name in names(8)]
    for part, name in zip(parts, names(8), strict=True):
        assert torch.equal(part.adapter.modules[name].B, whole.adapter.modules[name].B)
        assert part.report.modules[name].to_dict() == whole.report.modules[name].to_dict()


def test_never_more_than_two(clients, working):
    list(iter_aggregate(clients, method="fedavg"))
    assert max(working) == 2


def test_one_where_both_would_be_more_than_may_be_held(monkeypatch, clients, working):
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 0)
    held, count = [], ReadAhead._count

    def counted(self, nbytes):
        held.append(self._held + nbytes)
        return count(self, nbytes)

    monkeypatch.setattr(ReadAhead, "_count", counted)
    list(iter_aggregate(clients, method="fedavg"))
    assert working == [1] * 8
    assert max(held) <= 1.5 * 2 * LAYER_BYTES


def test_one_where_portions_are_of_several_modules(monkeypatch, clients, working):
    monkeypatch.setattr(portions, "CHUNK_BYTES", 1 << 15)
    mine, threads_of = threading.get_ident(), []
    monkeypatch.setattr(Stream, "_settled", lambda self, done: (threads_of.append(threading.get_ident()), done)[1])
    sizes = [len(part.adapter.modules) for part in iter_aggregate(clients, method="fedavg")]
    assert max(sizes) > 1
    assert len(sizes) > 2
    assert working == [1] * len(sizes)
    assert threads_of == [mine] * len(sizes)  # two would each keep what it has freed


@pytest.mark.parametrize(("n", "most"), [(8, 2), (7, 1)])
def test_one_where_the_ranks_of_any_module_exceed_a_side(clients, working, n, most):
    """What such a module takes each thread would keep."""
    for client in clients:
        client.sizes = lambda name: (8, n if name == "m7" else 8, 4)
    list(iter_aggregate(clients, method="fedavg"))
    assert max(working) == most


def test_several_modules_among_larger_ones_are_worked_on_one_at_a_time(monkeypatch, working):
    class Sized(Recorded):
        def __getitem__(self, name):
            self.r = 400 if name == "m0" else 4
            return super().__getitem__(name)

    monkeypatch.setattr(portions, "CHUNK_BYTES", 1 << 15)
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 1 << 30)
    sizes = [len(p.adapter.modules) for p in iter_aggregate([Sized(names(40)), Sized(names(40), 1)], method="fedavg")]
    assert sizes[0] == 1
    assert min(sizes[1:-1]) > 1
    assert max(working[2:-1]) == 1  # the second beside the large one, the last may be one module


def test_one_where_the_factors_are_in_memory(clients, working):
    list(iter_aggregate([{n: c[n] for n in c} for c in clients], method="fedavg"))
    assert working == [1] * len(working)


def test_one_outside_of_spread_jobs(monkeypatch, clients, working):
    assert native_calls.width_within() == 4
    with monkeypatch.context() as outside:
        outside.setattr(native_calls, "_width", None)
        assert native_calls.width_within() == 1
        list(iter_aggregate(clients, method="fedavg"))
    assert working == [1] * 8


def test_reading_goes_on_while_two_are_worked_on(monkeypatch, clients):
    monkeypatch.setattr(_read_ahead, "LEAST_HELD", 3 * 2 * LAYER_BYTES)
    both, seen = threading.Barrier(2, timeout=30), []

    def watched(*args, **options):
        if both.wait() == 0:
            seen.append([settled(client.reads) for client in clients])
        both.wait()
        return aggregate_cohort(*args, **options)

    monkeypatch.setattr(streamed, "aggregate_cohort", watched)
    parts = iter_aggregate(clients, method="fedavg")
    next(parts)
    assert seen == [[3, 3]]
    parts.close()


def test_an_error_comes_in_its_place_and_ends_all():
    clients = [Recorded(names(40), 0), Recorded(names(40), 1, broken=["m3"])]
    parts = iter_aggregate(clients, method="fedavg")
    assert [list(next(parts).adapter.modules) for _ in range(3)] == [["m0"], ["m1"], ["m2"]]
    with pytest.raises(ValueError, match="m3: cannot be read"):
        next(parts)
    assert not [t for t in threading.enumerate() if t.name.startswith("fedgram-")]
    assert len(clients[0].reads) < 9


@pytest.mark.parametrize(("argument", "method"), [("anchor", "flora-na"), ("align_to", "als")])
def test_earlier_factors_are_read_by_one_thread_at_a_time(clients, argument, method):
    inside, most = [], []

    class Earlier(Recorded):
        def __getitem__(self, name):
            inside.append(name)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(name)
            return super().__getitem__(name)

    list(iter_aggregate(clients, method=method, **{argument: Earlier(names(8), 7)}))
    assert len(most) == 8
    assert max(most) == 1


def test_progress_is_told_in_order_by_the_thread_that_asks(clients):
    told = []
    list(iter_aggregate(clients, method="fedavg", progress=lambda *of: told.append((threading.get_ident(), *of))))
    assert told == [(threading.get_ident(), i + 1, 8, name) for i, name in enumerate(names(8))]


def test_portions_have_one_thread_of_torch_although_another_run_has_ended(monkeypatch, clients):
    seen = []

    def watched(*args, **options):
        seen.append(torch.get_num_threads())
        return aggregate_cohort(*args, **options)

    monkeypatch.setattr(streamed, "aggregate_cohort", watched)

    def another_run():
        with spread_over_jobs():
            pass

    another = threading.Thread(target=another_run)
    another.start()
    another.join()
    list(iter_aggregate(clients, method="svd"))
    assert seen == [1] * 8
