"""The cost model: bytes by hand, and loads near the best possible."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgram.bindings import sizing
from fedgram.bindings.sizing import Host, Module, aggregation, assign, flops, llama_7b, working_memory


def test_the_workload_is_a_7b_llama():
    modules = llama_7b()
    assert len(modules) == 224
    # per block and unit of rank: four of 4096 + 4096, three of 4096 + 11008; 32 blocks, rank 16, two bytes
    assert sum(m.bytes for m in modules) == 32 * 16 * 2 * (4 * 8192 + 3 * 15104) == 79_953_920
    assert aggregation(modules, 100, 1, own=False).factors == 7_995_392_000


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_loads_are_within_a_third_of_the_best(costs, ranks):
    owners = assign(costs, ranks)

    def largest(chosen):
        return max(sum(c for c, k in zip(costs, chosen, strict=True) if k == rank) for rank in range(ranks))

    best = min(largest(chosen) for chosen in itertools.product(range(ranks), repeat=len(costs)))
    assert largest(owners) <= 4 / 3 * best + 1e-9
    assert owners == assign(costs, ranks)


def test_loads_that_are_there_already_count():
    assert assign([1.0, 1.0], 3, [5.0, float("inf"), 4.5]) == [2, 0]
    assert assign([3.0, 2.0], 1) == [0, 0]


def test_bytes_by_hand():
    a, b = Module(10, 20, 4, 4), Module(30, 10, 4, 4)  # 480 and 640 bytes a client
    shared = aggregation([a, b], 6, 2, own=False)
    assert (shared.factors, shared.sent, shared.received) == (6 * 1120, 0, 0)
    assert shared.read == 6 * 640 + 1120 / 2  # the larger module, and its part of a look at one client
    assert shared.gathered == 480  # rank 0 has the larger one
    own = aggregation([a, b], 6, 2, own=True)
    assert (own.read, own.sent, own.received, own.gathered) == (3 * 1120, 3 * 640, 3 * 640, 480)
    alone = aggregation([a, b], 6, 1, own=True)
    assert (alone.sent, alone.received, alone.gathered, alone.exchange_seconds) == (0, 0, 0, 0)


def test_work_of_both_regimes():
    square = Module(4096, 4096, 16)
    assert flops(square, 60) == 2 * 960**2 * 8192 + sizing.DENSE * 960**3
    assert working_memory(square, 60) == 60 * square.bytes + sizing.SQUARES * 8 * 960**2 + sizing.WORK
    # where factors are not multiplied with each other, work and memory are linear in the clients
    products = sizing.PRODUCTS * 4 * 16000 * (16 + sizing.OVERSAMPLING) * 8192
    assert flops(square, 1000) == products + sizing.NORMS * 2 * 4096**2 * 16000
    assert flops(square, 2000) == 2 * flops(square, 1000)
    assert working_memory(square, 1000) == sizing.COPIES * 1000 * square.bytes + sizing.WORK


def test_time_follows_the_rates_and_the_hosts():
    slow, fast = Host(1e8, 1e8, 1e10), Host(2e8, 1e9, 4e10)
    one, other = (aggregation(llama_7b(), 200, 8, own=True, host=host) for host in (slow, fast))
    assert one.read_seconds == 2 * other.read_seconds
    assert one.exchange_seconds == pytest.approx(10 * other.exchange_seconds)
    assert one.solve_seconds == 4 * other.solve_seconds
    assert one.seconds == one.open_seconds + one.read_seconds + one.exchange_seconds + one.solve_seconds
    # 224 modules over 8 hosts come out even to a fifth
    alone = aggregation(llama_7b(), 200, 1, own=True, host=slow)
    assert alone.solve_seconds / 8 <= one.solve_seconds <= 1.2 * alone.solve_seconds / 8


def test_every_host_opens_the_files_that_it_can_see():
    def opening(hosts, *, own):
        return aggregation(llama_7b(), 6400, hosts, own=own).open_seconds

    per_client, per_layer = 224 * sizing.OPENING, 224 * sizing.LAYER
    assert opening(1, own=False) == opening(1, own=True) == pytest.approx(6400 * (per_client + per_layer))
    assert opening(64, own=True) == pytest.approx(100 * (per_client + per_layer))
    assert opening(64, own=False) == pytest.approx(6400 * (per_client + per_layer * 4 / 224), rel=0.02)


def test_bad_numbers_are_refused():
    for arguments in ((llama_7b(), 0, 1), (llama_7b(), 1, 0), ([], 1, 1)):
        with pytest.raises(ValueError, match="expected at least one"):
            aggregation(*arguments, own=True)
