"""Every registered entry at its smallest size: all contenders right, peers from the formula, output files."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fedgram import flora_na, kernels, stamp
from fedgram.bench import plots, sweeps, table
from fedgram.bench.entries_flora_na import spread
from fedgram.bench.peers import adamw, dense, herding, optional, softmax_sgd
from fedgram.bench.reference import (
    dense_update,
    dual_objective,
    list_error,
    matching_excess,
    optimal_rho,
    relative_error,
    rho,
    scalar_rho,
    worst,
)
from fedgram.bench.registry import GROUPS, MissingPeerError, entries
from fedgram.bench.run import run_benchmarks
from fedgram.bench.run_case import check
from fedgram.bench.sweeps import slope
from fedgram.bench.workloads import Lora, clustered_samples, factors, parameter_shapes, sample_weights, task_gramian

CPU = torch.device("cpu")
# contenders whose results are known not to hold, and are in the table for that reason
WRONG = {("grad_gram-close", "stack, mm"), ("factor_gram-bf16", "cat + bf16 mm")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.name)
def test_every_contender_passes_its_check(entry):
    case = entry.build("tiny", CPU)
    assert case.ours.kind == "ours"
    assert len({c.name for c in case.contenders}) == len(case.contenders)
    names = {"", *(c.name for c in case.contenders), *case.missing}
    assert all(target.against in names for target in case.targets)
    for contender in case.contenders:
        checked = check(case, contender, CPU)
        assert not checked.failure
        assert checked.right == ((entry.name, contender.name) not in WRONG), (contender.name, checked.error)


def spoiled(name, change):
    """The check of ours in an entry's tiny case, after ``change`` of its result."""
    case = next(e for e in entries([name]) if e.name == name).build("tiny", CPU)
    return check(case, replace(case.ours, run=lambda: change(case.ours.run())), CPU)


def holes(result):
    """NaN in every tensor of a list, or pair of lists, but the first."""
    flat = [t for side in result for t in side] if isinstance(result, tuple) else result
    for t in flat[1:]:
        t.fill_(math.nan)
    return result


def empty_layers(result):
    for layer in list(result.adapter.modules.values())[1:]:
        layer.B.fill_(math.nan)
    return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "change"),
    [(name, holes) for name in ("factor_gram", "factor_cross", "factor_combine-blocks", "grad_combine")]
    + [(f"aggregate-{method}", empty_layers) for method in ("als", "flora-na", "fedavg")]
    + [("estimate-flora-na", lambda e: replace(e, B=e.B * math.nan))],
)
def test_nan_is_wrong_wherever_it_stands(name, change):
    assert not spoiled(name, change).right


@pytest.mark.parametrize("method", ["als", "flora-na"])
def test_an_aggregate_that_is_off_in_the_last_module_is_wrong(method):
    def off(result):
        name = list(result.adapter.modules)[-1]
        result.adapter.modules[name].B.mul_(1.01)  # raises rho by less than what a claim is held to
        return result

    assert not spoiled(f"aggregate-{method}", off).right


@pytest.mark.parametrize("name", ["grad_combine", "lowrank_sum"])
def test_no_contender_writes_into_what_is_there_already(name):
    case = next(e for e in entries([name]) if e.name == name).build("tiny", CPU)
    for contender in case.contenders:
        first, second = contender.run(), contender.run()
        pairs = [(first, second)] if isinstance(first, torch.Tensor) else zip(first, second, strict=True)
        assert all(a.data_ptr() != b.data_ptr() for a, b in pairs), contender.name


def test_scalars_cost_two_operations_for_every_element_of_the_factors():
    cost = next(e for e in entries(["factor_combine-scalars"])).build("tiny", CPU).cost
    assert cost.flops == 2 * cost.data / torch.float32.itemsize


def test_modules_are_chosen_over_the_whole_range():
    assert spread(48, 3) == [0, 24, 47]
    assert spread(2, 3) == [0, 1]
    assert spread(1, 3) == [0]


def test_a_direction_is_checked_apart_from_our_own_sums(monkeypatch):
    def stretched(*arguments, **options):
        return [1.01 * t for t in combine(*arguments, **options)]

    combine = kernels.grad_combine
    monkeypatch.setattr(kernels, "grad_combine", stretched)
    assert not spoiled("match", lambda m: replace(m, direction=[1.01 * t for t in m.direction])).right


def test_the_worst_of_some_errors_is_nan_where_one_is_not_finite():
    assert worst([]) == 0
    assert worst([1.0, 3.0, 2.0]) == 3
    for value in (math.nan, math.inf):
        assert all(math.isnan(worst(errors)) for errors in ([value, 1.0], [1.0, value], [1.0, value, 2.0]))


def test_entries_are_chosen_by_name_and_group():
    assert {e.group for e in entries()} == set(GROUPS)
    assert [e.name for e in entries(["grad_combine"])] == ["grad_combine"]
    assert {e.group for e in entries(["flora_na"])} == {"flora_na"}
    with pytest.raises(ValueError, match="no-such"):
        entries(["no-such"])


@pytest.fixture(scope="module")
def results():
    before = torch.get_num_threads()
    try:
        return run_benchmarks(entries(["estimate-flora-na", "solve_dual-8", "grad_gram-close"]), "tiny", CPU, threads=1)
    finally:
        torch.set_num_threads(before)


def test_results_are_strict_json_with_what_a_reader_needs(results, tmp_path):
    table.write_files(results, tmp_path)
    read = json.loads((tmp_path / "bench.json").read_text(), parse_constant=pytest.fail)
    assert read["schema"] == 1
    assert set(read) == {"schema", "size", "environment", "ceilings", "cases", "sweeps", "failed", "seconds"}
    assert read["failed"] == {}
    where = read["environment"]
    assert where["threads"] == 1
    assert where["versions"]["torch"]
    assert {"device", "commit", "date", "python", "cores", "load", "compiler"} <= set(where)
    assert [c["entry"] for c in read["cases"]] == ["estimate-flora-na", "solve_dual-8", "grad_gram-close"]
    for case in read["cases"]:
        for row in case["contenders"]:
            assert row["q1_s"] <= row["median_s"] <= row["q3_s"]
            assert row["runs"] >= 1
    assert {s["name"] for s in read["sweeps"]} == {
        "time against clients",
        "time against length",
        "time against tasks",
        "matching error against time",
        "estimate error against time",
    }


def test_csv_has_a_line_per_contender(results, tmp_path):
    table.write_files(results, tmp_path)
    with open(tmp_path / "bench.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(c["contenders"]) for c in results["cases"])
    assert lines[0]["entry"] == "estimate-flora-na"
    assert float(lines[0]["median_s"]) > 0


def test_the_table_says_which_ratios_are_refused(results):
    console = Console(record=True, width=130, force_terminal=False)
    table.print_tables(results, console)
    text = console.export_text()
    assert "WRONG" in text
    assert "no ratio to stack, mm: its result is wrong" in text
    assert "estimate(flora-na)" in table.markdown(results)


def test_pictures_are_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    names = {p.name for p in plots.draw(results, tmp_path)}
    assert {"ratios.png", "roofline.png", "time-against-clients.png", "matching-error-against-time.png"} <= names


@pytest.mark.parametrize("flops", [1e-3, 1.0, 1e3])  # left of both knees, between them, right of both
def test_the_roof_is_the_lower_of_both_rates_wherever_the_points_lie(flops):
    pytest.importorskip("matplotlib")
    case = {"entry": "e", "cost": {"flops": flops, "bytes": 1.0, "rate": "float64"}, "contenders": [{"median_s": 2.0}]}
    rates = {"read": 10.0, "flops": {"float64": 5.0, "float32": 50.0}}
    figure = plots._roofline({"cases": [case], "ceilings": rates})
    *roofs, point = figure.axes[0].lines
    for roof, peak in zip(roofs, rates["flops"].values(), strict=True):
        assert sorted(roof.get_xdata()) == list(roof.get_xdata())
        assert list(roof.get_ydata()) == [min(peak, 10 * x) for x in roof.get_xdata()]
    assert point.get_xydata().tolist() == [[flops, flops / 2]]
    assert point.get_color() == roofs[0].get_color()


def test_adamw_loop_reaches_the_least_squares_optimum():
    (B,), (A,) = factors(Lora(1, 4, 30, 26, 3), CPU)
    w = sample_weights(4)
    dW = dense_update(B, A, w)
    reached = rho(adamw.adamw_scalars(B, A, w), dW)
    assert scalar_rho(B, A, w) * (1 - 1e-6) <= reached < rho(dense.average(B, A, w), dW)


def test_errors_relative_to_zero():
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_error(zero, zero) == 0
    assert relative_error(one, zero) == math.inf
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert math.isnan(list_error([one, zero], [one, one[:1]]))
    assert math.isnan(list_error([one, one * torch.nan], [one, zero]))


def test_references_agree_with_dense_singular_values():
    (B,), (A,) = factors(Lora(1, 3, 20, 17, 2), CPU)
    w = sample_weights(3)
    s = torch.linalg.svdvals(dense_update(B, A, w))
    assert optimal_rho(B, A, w, 2) == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-9)
    assert flora_na.estimate(B, A, w, method="flora-na").rho == pytest.approx(scalar_rho(B, A, w), rel=1e-4)


def test_softmax_loop_improves_with_steps_and_stays_above_the_optimum():
    G = task_gramian(6)
    upper = dual_objective(stamp.solve_dual(G, 0.25).weights, G, 0.25)
    errors = []
    for steps in (1, 10, 1000):
        w = softmax_sgd.softmax_weights(G, 0.25, steps=steps)
        errors.append(matching_excess(softmax_sgd.coefficients(w, G, 0.25), G, upper, 0.25))
    assert errors[0] > errors[1] > errors[2] >= -1e-12


def test_matching_excess_brings_directions_back_into_the_ball():
    G = task_gramian(4)
    dual = stamp.solve_dual(G, 0.25)
    upper = dual_objective(dual.weights, G, 0.25)
    assert abs(matching_excess(dual.coefficients, G, upper, 0.25)) < 1e-9
    outside = 0.25 + 100 * (dual.coefficients - 0.25)
    assert matching_excess(outside, G, upper, 0.25) > -1e-9


def test_herding_is_no_worse_than_random_subsets():
    X, y = clustered_samples(2, 60, 8)
    errors = {}
    for choose in (herding.herding, herding.random_subset):
        chosen = choose(X, y, 5)
        assert len(set(chosen.tolist())) == 10
        errors[choose.__name__] = sum(
            float((X[chosen[y[chosen] == c]].mean(0) - X[y == c].mean(0)).norm()) for c in range(2)
        )
    assert errors["herding"] < errors["random_subset"]


def test_a_missing_package_is_a_reason_with_its_pip_line():
    with pytest.raises(MissingPeerError, match=r"no_such_package.*pip install 'fedgram\[bench\]'"):
        optional.need("peer", "no_such_package")


def test_parameter_shapes_add_up():
    for d in (1, 7, 300, 5_000_000):
        assert sum(math.prod(s) for s in parameter_shapes(d)) == d


def test_slopes_are_exponents():
    assert slope([(x, 3 * x**2) for x in (1, 2, 4, 8)]) == pytest.approx(2)


def test_a_result_that_is_not_finite_is_no_point_of_a_curve(monkeypatch):
    monkeypatch.setattr(sweeps, "matching_excess", lambda *_: math.nan)
    found = sweeps.matching_error_against_time("tiny", CPU).to_dict()
    assert found["curves"] == {}
    assert found["missing"]["solve_dual"] == "a result is not finite"
