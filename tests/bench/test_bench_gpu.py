"""The GPU script without a GPU: its dry run from a bare checkout, and that it would find what it looks for."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedgram import stamp
from fedgram.bench import gpu, gpu_checks, gpu_end_to_end, gpu_estimates, gpu_models
from fedgram.bench.ceilings import Ceilings, Cost
from fedgram.bench.gpu_cases import TINY, factor_cases, small_cases
from fedgram.bench.gpu_checks import _check, _displace, _not_finite, _repeat, _replay
from fedgram.bench.gpu_support import LAYOUTS, Guarded, Journal, laid, poisoned
from fedgram.bench.workloads import name_of
from fedgram.kernels.trials import FILES, trials

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The script run as a file, from elsewhere and isolated: what is installed under the name is not what it takes."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-P", gpu.__file__, "--dry-run", "--out", str(folder / "gpu.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "gpu.json").read_text(), parse_constant=pytest.fail), done.stdout


@pytest.mark.slow
@INTERPRETED
def test_the_dry_run_goes_through_every_section(dry_run):
    report, printed = dry_run
    assert report["schema"] == 1
    assert report["dry_run"] is True
    assert list(report["sections"]) == list(gpu.SECTIONS)
    for name, section in report["sections"].items():
        assert section["rows"] or name in ("correctness fp16", "correctness fp64"), name  # only on a GPU
        assert not [row for row in section["rows"] if row["ok"] is False], name
        assert name in printed
    correct = [row for part in gpu.PARTS for row in report["sections"][f"correctness {part}"]["rows"]]
    checked = {row["op"] for row in correct}
    assert checked == {
        "factor_gram", "factor_cross", "factor_combine", "lowrank_sum", "grad_gram", "grad_combine", "ghost_gram",
        "subset_select", "estimate_modules", "aggregate", "match",
    }  # fmt: skip
    for row in correct:
        assert row["ok"] is True
        assert row["error"] <= row["tolerance"]
    names = {row["name"] for row in report["sections"]["end_to_end"]["rows"]}
    assert {"W1 aggregate(als)", "W2 streamed from the host", "V1 match", "V2 grad_gram", "duals"} <= names
    assert {"W2 estimate_modules(als)", "W2 slab filled from the host"} <= names
    tried = [row["name"] for row in report["sections"]["choices"]["rows"]]
    assert {name.split()[0] for name in tried if name.endswith(", shipped")} == set(FILES)
    for op, dtype in product(FILES, (torch.float32, torch.bfloat16)):
        for trial in trials(op, dtype):
            assert any(n.startswith(op) and n.endswith(f" {name_of(dtype)}, {trial}") for n in tried), trial
    traced = {row["name"]: row["ok"] for row in report["sections"]["compiled"]["rows"]}
    assert traced["whole match"] is True
    assert traced["whole estimate_modules(als)"] is True
    assert all(row["seconds"] > 0 for row in report["sections"]["end_to_end"]["rows"] if row["name"] == "V1 match")


def test_without_a_gpu_the_script_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "no GPU" in capsys.readouterr().err


@INTERPRETED
def test_a_wrong_operation_is_found():
    case = next(factor_cases(CPU, TINY, torch.float32, "plain"))
    assert _check(case)["ok"]
    assert not _check(replace(case, run=lambda k: [1.001 * t for t in case.run(k)]))["ok"]
    with_hole = replace(case, run=lambda k: [torch.empty_like(case.run(k)[0]), *case.run(k)[1:]])
    found = _check(with_hole)
    assert not found["ok"]
    assert found["error"] != found["error"]  # NaN: the poison shows


@INTERPRETED
def test_writing_beside_an_output_is_found():
    case = next(c for c in small_cases(CPU) if c.op == "lowrank_sum")

    def strays(backend):
        out = case.run(backend)
        case.guards[0].room[0, 0] = 1.0
        return out

    assert not _check(replace(case, run=strays))["ok"]


@INTERPRETED
def test_bits_that_change_are_found():
    case = next(factor_cases(CPU, TINY, torch.float32, "plain"))
    assert _repeat(case, 2, CPU)["ok"]
    count = iter(range(100))
    drifting = replace(case, run=lambda k: [t + 1e-7 * next(count) for t in case.run(k)])
    assert _repeat(drifting, 3, CPU)["different"] == 2


@INTERPRETED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_between_replays_is_on_other_tensors_of_the_layout(layout):
    case = next(factor_cases(CPU, TINY, torch.float32, layout))
    kinds = [(t.data_ptr(), t.stride(), t.storage_offset()) for t in case.inputs]
    values = [t.clone() for t in case.inputs]
    seen = []

    def run():
        seen.extend((t.data_ptr(), t.stride(), t.storage_offset()) for t in case.inputs)
        return case.run("triton")

    taken = _displace(run, case.inputs)
    assert len(taken) == 128
    assert all(int(t[0]) == kinds[0][0] for t in taken)
    assert [kind[1:] for kind in seen] == [kind[1:] for kind in kinds]
    assert not {kind[0] for kind in seen} & {kind[0] for kind in kinds}
    assert [(t.data_ptr(), t.stride(), t.storage_offset()) for t in case.inputs] == kinds
    assert all(torch.equal(t, v) for t, v in zip(case.inputs, values, strict=True))


class Streams:
    """Stands in for ``torch.cuda`` where work goes to streams: which of them is current, and what a capture's is."""

    def __init__(self):
        self.current, self.made, self.waits = "default", 0, []

    def __getattr__(self, name):
        return getattr(torch.cuda, name)

    def Stream(self, device):
        self.made += 1
        return self._named(f"side {self.made}")

    def _named(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.waits.append((name, other.name)))

    def current_stream(self, device):
        return self._named(self.current)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def graph(self, graph):
        return self.stream(self._named("capture"))

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)

    def synchronize(self, device):
        pass


def test_all_but_captures_run_on_one_stream_that_is_not_the_default_one(monkeypatch):
    """Tables are kept per stream: calls on another one let go of nothing that the graph reads."""
    streams, called, filled = Streams(), [], set()
    monkeypatch.setattr(torch, "cuda", streams)
    full, x = torch.full, torch.ones(3)
    monkeypatch.setattr(torch, "full", lambda *a, **k: (filled.add(streams.current), full(*a, **k))[1])

    def run():
        called.append(streams.current)
        return [2 * x]

    def section(journal, device):
        for _ in range(2):
            assert _replay(run, [x], torch.device("cuda"))["tolerance"] == 0

    monkeypatch.setattr(gpu_checks, "_graphs", section)
    gpu_checks.graphs(Journal(None), torch.device("cuda"))
    assert called == 2 * (["side 1"] * 3 + ["capture"] + ["side 1"] * 2)  # warm, capture, displace, compare
    assert filled == {"side 1"}
    assert streams.waits == [("side 1", "default"), ("default", "side 1")]


@INTERPRETED
def test_what_is_not_finite_is_looked_for(monkeypatch):
    assert _not_finite(CPU, torch.bfloat16, 5, float("nan"))["ok"]
    swallowed = SimpleNamespace(grad_gram=lambda lists, backend: (torch.zeros(()), torch.zeros(5), torch.zeros(5, 5)))
    monkeypatch.setattr(gpu_checks, "kernels", swallowed)
    assert not _not_finite(CPU, torch.bfloat16, 5, float("nan"))["ok"]


@pytest.mark.parametrize("hole", ["pair last", "rho last"])
def test_nan_from_the_device_is_no_agreement_with_the_cpu(hole):
    right = {"pair first": torch.ones(2, 2), "pair last": torch.ones(2, 2), "rho first": 0.5, "rho last": 0.5}
    for found, ok in ((right, True), (right | {hole: right[hole] * torch.nan}, False)):
        answers = iter((right, found))
        assert gpu_estimates._compared(lambda *_: next(answers), [], CPU, torch.float32)["ok"] is ok  # noqa: B023


def test_a_direction_with_nan_is_no_match():
    calls = []

    def call(lists):
        found = stamp.match(lists, c=0.4)
        calls.append(found)
        if len(calls) == 2:
            for t in found.direction[1:]:
                t.fill_(torch.nan)
        return found

    assert not gpu_estimates._matched(call, CPU)["ok"]


def test_what_takes_longest_comes_last_and_is_left_out_in_time(monkeypatch):
    """Of W2: a section that is ended loses its exit code, and what would have come after."""
    rows = []
    bench = SimpleNamespace(
        device=CPU, journal=Journal(None), row=lambda name, work, need_s: rows.append((name, need_s)), timed=len
    )
    monkeypatch.setattr(gpu_end_to_end, "LARGE", 0)
    model = gpu_models.Model("W2", ((24, 20), (40, 20)), 4, 2, torch.bfloat16)
    made = gpu_models.Pinned(model.shapes, model.clients, model.rank, model.dtype, CPU)
    gpu_end_to_end._resident(bench, model, made)
    assert rows[-3:] == [("W2 aggregate(fedavg)", 40), ("W2 aggregate(flora-na)", 20), ("W2 aggregate(als)", 30)]
    before = {name for name, need_s in rows[:-3] if need_s <= 40}
    assert {"W2 slab filled from the host", "W2 streamed from the host"} <= before
    assert "W2 estimate_modules(fedavg, precise=False)" in before


def test_what_fails_between_the_rows_of_a_model_leaves_the_other_workloads(monkeypatch):
    monkeypatch.setattr(gpu_end_to_end, "ceilings_of", lambda device: Ceilings(1e9, 1e9, {"float32": 1e9}))
    monkeypatch.setattr(gpu_end_to_end, "_operations", lambda *_: iter(()))
    monkeypatch.setattr(gpu_end_to_end.kernels, "prepare", lambda B, A: 1 / 0)
    monkeypatch.setattr(gpu_end_to_end, "_vectors", lambda *_: {"ok": True})
    monkeypatch.setattr(gpu_end_to_end, "_duals", lambda device: {"ok": True})
    journal = Journal(None)
    gpu_end_to_end.end_to_end(journal, CPU)
    found = {row["name"]: row["ok"] for row in journal.rows}
    assert found["W1 resident"] is found["W2 resident"] is False
    assert found["V2 gradients"] is found["duals"] is found["W2 made"] is True


def test_timings_that_are_left_out_are_named():
    rows = [{"name": f"W2 {n}", "ok": None, "skipped": "out of time"} for n in ("one", "two")]
    where = {"device": "x", "versions": {"torch": "2"}}
    report = {"environment": where, "sections": {"end_to_end": {"exit": 0, "rows": rows}}}
    assert "skipped out of time: W2 one, W2 two" in gpu.summary(report)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 4), (7,), (), (0,), (0, 3)])
def test_layouts_keep_the_values(shape, layout):
    t = torch.randn(shape)
    assert torch.equal(laid(t, layout), t)
    if layout == "misaligned" and t.numel():
        assert laid(t, layout).storage_offset() == 1


def test_guards_see_every_side():
    guard = Guarded.of((2, 3), torch.float32, CPU)
    assert torch.isnan(guard.view).all()
    guard.view.zero_()
    assert guard.untouched()
    guard.room[-1, -1] = 0
    assert not guard.untouched()


def test_poison_reaches_every_way_to_allocate_and_leaves():
    with poisoned():
        made = [torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty((4,))]
        assert all(torch.isnan(t).all() for t in made)
        assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
    assert torch.empty.__name__ == "empty"


def test_failures_are_named_in_the_summary_and_json_stays_strict(tmp_path):
    rows = [{"name": "op", "ok": False, "error": float("nan"), "tolerance": 1e-6}]
    where = {"device": "x", "versions": {"torch": "2"}}
    report = {"environment": where, "sections": {"correctness": {"exit": 0, "rows": rows}}}
    assert "FAILED op" in gpu.summary(report)
    gpu.write(report, tmp_path / "a" / "gpu.json")
    read = json.loads(Path(tmp_path / "a" / "gpu.json").read_text(), parse_constant=pytest.fail)
    assert read["sections"]["correctness"]["rows"][0]["error"] is None


def test_a_first_run_that_compiles_is_not_what_is_timed(monkeypatch):
    took = iter((60.0, 0.001))  # a compilation, then the kernels alone
    monkeypatch.setattr(gpu_end_to_end, "seconds", lambda run, device: run())
    bench = gpu_end_to_end.Bench(Journal(None), CPU, Ceilings(1e9, 1e9, {"float32": 1e9}))
    row = bench.timed(lambda: next(took, 0.001), Cost(1, 1, 1), most=3)
    assert row["runs"] == 3  # what takes above ``ONCE`` is timed by its first run
    assert "host_s" in row
