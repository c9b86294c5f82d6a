"""Timing: plans, medians, pairing, and what a check lets through."""

import math
import time

import pytest
import torch

from fedgram.bench.ceilings import Ceilings, Cost, measure_ceilings
from fedgram.bench.measure import SHORTEST, Quartiles, Timing, interleave, plan
from fedgram.bench.memory import RESET, peak_bytes
from fedgram.bench.registry import Case, Contender, Target
from fedgram.bench.run_case import Budget, run_case

CPU = torch.device("cpu")


def test_quartiles_are_those_of_the_samples():
    assert Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Quartiles(3.0, 2.0, 4.0)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)


def test_ratios_are_paired_round_by_round():
    # the second round was three times slower for both: a ratio of medians would be off, the paired one is not
    ours, theirs = Timing((1.0, 3.0, 1.0)), Timing((10.0, 30.0))
    assert ours.ratio(theirs) == Quartiles(10.0, 10.0, 10.0)


def test_plans_follow_the_budget():
    assert plan(first=2.0, budget=3.0, least=2, most=25).rounds == 2
    assert plan(first=0.1, budget=3.0, least=2, most=25).rounds == 25
    assert plan(first=0.2, budget=3.0, least=2, most=25).rounds == 15
    short = plan(first=1e-4, budget=3.0, least=2, most=25)
    assert short.inner == 50
    assert short.rounds == 25
    for first in (2.4e-3, 2.6e-3, 4.9e-3):  # one sample lasts at least SHORTEST
        assert plan(first, budget=3.0, least=2, most=25).inner * first >= SHORTEST
    assert plan(first=SHORTEST, budget=3.0, least=2, most=25).inner == 1


def test_contenders_take_turns_and_the_slow_one_leaves_first():
    calls = []
    runs = {"fast": lambda: calls.append("fast"), "slow": lambda: (calls.append("slow"), time.sleep(0.02))}
    timings = interleave(runs, CPU, budget=0.05, least=2, most=6)
    assert len(timings["fast"].seconds) == 6
    assert len(timings["slow"].seconds) == 2
    assert timings["slow"].median >= 0.02
    last_slow = len(calls) - 1 - calls[::-1].index("slow")
    assert "fast" in calls[last_slow:]


def test_a_run_of_many_budgets_counts_once_and_is_not_repeated():
    runs = {"fast": lambda: None, "endless": lambda: pytest.fail("ran again")}
    timings = interleave(runs, CPU, budget=0.01, known={"endless": 1.0})
    assert timings["endless"].seconds == (1.0,)


def case(*contenders: Contender, targets=()) -> Case:
    return Case("none", contenders, float, "distance from zero", Cost(1, 1, 1), targets)


CEILINGS = Ceilings(1e9, 1e9, {"float32": 1e9})


def run_tiny(*contenders, targets=()):
    result = run_case(case(*contenders, targets=targets), "full", CPU, CEILINGS)
    return {row["name"]: row for row in result["contenders"]}, result


def test_no_speed_up_over_a_wrong_result():
    rows, _ = run_tiny(
        Contender("ours", lambda: 0.0, "ours", 1e-6),
        Contender("right", lambda: 1e-7, "torch", 1e-6),
        Contender("wrong", lambda: 1e-3, "torch", 1e-6),
        Contender("nan", lambda: math.nan, "peer", math.inf),
    )
    assert rows["right"]["speed_up"]["median"] > 0
    assert rows["right"]["refused"] == ""
    for name in ("wrong", "nan"):
        assert rows[name]["speed_up"] is None
        assert "its result is wrong" in rows[name]["refused"]
        assert rows[name]["median_s"] > 0


def test_no_speed_up_when_ours_is_wrong_and_no_target_is_met():
    rows, result = run_tiny(
        Contender("ours", lambda: 1e-3, "ours", 1e-6),
        Contender("peer", lambda: 0.0, "peer", 1e-6),
        targets=(Target("seconds", 1e9), Target("speed-up", 0.0, "peer")),
    )
    assert rows["peer"]["speed_up"] is None
    assert "our result is wrong" in rows["peer"]["refused"]
    assert [t["met"] for t in result["targets"]] == [False, None]


def test_a_tolerance_without_end_says_that_any_result_will_do():
    rows, _ = run_tiny(
        Contender("ours", lambda: 0.5, "ours", math.inf), Contender("peer", lambda: 0.1, "peer", math.inf)
    )
    assert rows["peer"]["speed_up"] is not None


def test_what_a_first_run_imports_or_compiles_is_not_its_time():
    calls = []
    cold = lambda: calls.append(1) or (time.sleep(0.2) if len(calls) == 1 else None) or 0.0  # noqa: E731
    budget = Budget(0.01, 1, 2)  # a run of 0.2 s counts alone
    contenders = (Contender("ours", lambda: 0.0, "ours", 0.0), Contender("cold", cold, "peer", 0.0))
    result = run_case(case(*contenders), "tiny", CPU, CEILINGS, budget=budget)
    assert result["contenders"][1]["median_s"] < 0.1


def test_a_failing_peer_is_a_row_and_our_failure_is_an_error():
    def fail():
        raise RuntimeError("no memory")

    rows, _ = run_tiny(Contender("ours", lambda: 0.0, "ours", 0.0), Contender("peer", fail, "peer", 1.0))
    assert rows["peer"]["median_s"] is None
    assert "no memory" in rows["peer"]["refused"]
    with pytest.raises(RuntimeError, match="no memory"):
        run_tiny(Contender("ours", fail, "ours", 0.0))


def test_targets_are_judged_both_ways():
    slow = Contender("slow", lambda: time.sleep(5e-3) or 0.0, "peer", 0.0)
    _, result = run_tiny(
        Contender("ours", lambda: 0.0, "ours", 0.0),
        slow,
        targets=(Target("speed-up", 2.0, "slow"), Target("speed-up", 1e12, "slow"), Target("seconds", 1e-12)),
    )
    assert [t["met"] for t in result["targets"]] == [True, False, False]


def test_floors_are_the_larger_of_traffic_and_arithmetic():
    rates = Ceilings(read=10.0, copy=10.0, flops={"float32": 100.0, "float64": 50.0})
    assert rates.floor(Cost(flops=100, bytes=1000, data=500)) == 100
    assert rates.floor(Cost(flops=10_000, bytes=1, data=1, rate="float64")) == 200
    assert rates.bound(Cost(flops=100, bytes=1000, data=500)) == "memory"
    assert rates.reads(100, Cost(1, 1, data=500)) == 2


def test_ceilings_are_measured():
    rates = measure_ceilings(CPU, scale=0.002, seconds=0.01)
    assert rates.read > 1e7
    assert rates.copy > 1e7
    assert set(rates.flops) == {"float64", "float32"}


@pytest.mark.skipif(not RESET.exists(), reason="needs Linux's resettable high-water mark")
def test_peak_memory_sees_what_a_run_takes_and_frees():
    size = 64 << 20

    def run():
        torch.ones(size // 4).sum().item()

    run()
    assert 0.9 * size <= peak_bytes(run, CPU) <= 1.3 * size
    assert peak_bytes(lambda: None, CPU) < 4 << 20
