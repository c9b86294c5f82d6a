"""The STAMP demo on scikit-learn's digits: same terms for all methods, repeatable, and read from real packages."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from matplotlib.axes import Axes
from rich.console import Console
from sklearn.datasets import load_digits
from torch.nn import functional as F
from typer.testing import CliRunner

from fedgram.bench.demo import stamp, stamp_data, stamp_plot
from fedgram.bench.demo.stamp_methods import METHODS, Client, RandomMemory
from fedgram.bench.demo.stamp_model import accuracies, loss, new_model
from fedgram.bench.demo.stamp_run import Run, Setting, run_one
from fedgram.bench.demo.stamp_summary import effects, mean_and_deviation, summary
from fedgram.bench.demo.stamp_table import effects_lines, table, verdict
from fedgram.stamp import PrototypeMemory

SMALL = Setting(clients=2, rounds=1, steps=4, batch=16, capacity=20, train_per_class=60, test_per_class=30)
NAMED = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    images = F.interpolate(torch.from_numpy(X).reshape(-1, 1, 8, 8) * (255 / 16), (28, 28), mode="bilinear")
    images, y = images.round().to(torch.uint8), torch.from_numpy(y)
    return stamp_data.Images("digits", (images[:1200], y[:1200]), (images[1200:], y[1200:]))


@pytest.fixture(scope="module")
def runs(digits):
    return {method.name: run_one(digits, method, SMALL, seed=0) for method in METHODS}


# Data


def test_tasks_hold_two_classes_each_and_are_dealt_without_loss(digits):
    tasks = stamp_data.split_tasks(digits.train, 40, seed=1)
    assert [y.unique().tolist() for _, y in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    for X, y in tasks:
        assert y.bincount()[y.unique()].tolist() == [40, 40]
        assert X.dtype == torch.float32
        assert 0 <= float(X.min()) < float(X.max()) <= 1
        shares = stamp_data.deal((X, y), 2, 0.3, seed=2)
        dealt = torch.cat([share for share, _ in shares]).flatten(1)
        assert torch.equal(dealt.sum(0).double().round(decimals=3), X.flatten(1).sum(0).double().round(decimals=3))
        assert sum(len(labels) for _, labels in shares) == 80


# Methods


def test_memories_hold_the_same_number_of_samples(digits):
    tasks = stamp_data.split_tasks(digits.train, 40, seed=0)
    memories = [RandomMemory(22, seed=0), PrototypeMemory(22, track_errors=False)]
    for t, (X, y) in enumerate(tasks):
        for memory in memories:
            memory.update(X, y, t)
        assert memories[0].nbytes == memories[1].nbytes == 22 * 784 * 4
        for name in memories[0].tasks:
            labels = [memory.task(name)[1] for memory in memories]
            assert torch.equal(*labels)
    everything = {image.numpy().tobytes() for image in tasks[0][0]}
    assert {image.numpy().tobytes() for image in memories[0].task(0)[0]} <= everything


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def client(name, task, c=0.0):
    model = new_model(0)
    made = Client(model, NAMED[name], 20, c, seed=0)
    made.remember(task, 0)
    return made


def gradient_of(model, batch):
    return flat(torch.autograd.grad(loss(model, batch), list(model.parameters())))


def test_steps_are_what_they_are_called(digits):
    first, second = stamp_data.split_tasks(digits.train, 20, seed=0)[:2]
    for name in ("FedAvg + replay", "A-GEM", "STAMP without temporal", "FedAvg"):
        own = client(name, first)
        own.fill_grad(second)
        found = flat(p.grad for p in own.model.parameters())
        g = gradient_of(own.model, second)
        if name == "FedAvg":
            assert torch.equal(found, g)
            assert own.sample_gradients == 40
            continue
        held = own.memory.task(0)
        r = gradient_of(own.model, held)
        assert own.sample_gradients == 60
        # float32 gradients of one batch, summed in another order: a few rounding errors of the largest entry
        close = {"rtol": 0, "atol": 1e-5 * float(g.abs().max())}
        if name == "FedAvg + replay":
            torch.testing.assert_close(found, (40 * g + 20 * r) / 60, **close)
        elif name == "STAMP without temporal":
            torch.testing.assert_close(found, (g + r) / 2, **close)
        else:
            expected = g - min(0.0, float(g @ r) / float(r @ r)) * r
            torch.testing.assert_close(found, expected, **close)


def test_a_gem_leaves_no_component_against_the_memory(digits):
    zeros = digits.train[0][digits.train[1] == 0][:20].float() / 255
    own = client("A-GEM", (zeros, torch.zeros(20, dtype=torch.int64)))
    opposed = (zeros, torch.ones(20, dtype=torch.int64))  # the same images under another label
    held = gradient_of(own.model, own.memory.task(0))
    assert gradient_of(own.model, opposed) @ held < 0
    own.fill_grad(opposed)
    found = flat(p.grad for p in own.model.parameters())
    assert abs(float(found @ held)) < 1e-5 * float(found.norm() * held.norm())


def test_accuracies_among_all_classes_and_among_a_tasks_own(digits):
    class Fixed(torch.nn.Module):
        def forward(self, X):  # always class 3, then 0, then the others
            return torch.tensor([5.0, 0, 0, 9, 0, 0, 0, 0, 0, 0]).expand(len(X), 10)

    X = torch.zeros(4, 1, 28, 28)
    tasks = [(X, torch.tensor([0, 0, 0, 1])), (X, torch.tensor([3, 2, 3, 2]))]
    assert accuracies(Fixed(), tasks[:1]) == ([0.75], [0.75])  # class 3 is not among those seen yet
    assert accuracies(Fixed(), tasks) == ([0.0, 0.5], [0.75, 0.5])


# Runs


def test_all_methods_start_alike_and_cost_what_is_said(runs):
    # Without a memory yet, and with one gradient to match, every method without spatial matching takes FedAvg's steps.
    for name in ("FedAvg + replay", "A-GEM", "STAMP without spatial"):
        assert runs[name].class_incremental[0, 0] == runs["FedAvg"].class_incremental[0, 0]
        assert runs[name].curve[: SMALL.rounds] == runs["FedAvg"].curve[: SMALL.rounds]
    memory = {name: run.memory_bytes for name, run in runs.items() if name != "FedAvg"}
    assert set(memory.values()) == {20 * 784 * 4}
    assert runs["FedAvg"].memory_bytes == 0
    with_memory = {run.sample_gradients for name, run in runs.items() if name != "FedAvg"}
    current = 5 * SMALL.rounds * SMALL.clients * SMALL.steps * SMALL.batch
    assert with_memory == {current + 4 * SMALL.rounds * SMALL.clients * SMALL.steps * SMALL.capacity}
    assert runs["FedAvg"].sample_gradients == current
    parameters = sum(p.numel() for p in new_model(0).parameters())
    assert {run.upload_bytes for run in runs.values()} == {5 * SMALL.rounds * parameters * 4}
    assert all(run.worst_gap < 1e-9 for run in runs.values())


def test_runs_repeat_to_the_bit_and_seeds_differ(digits, runs):
    again = run_one(digits, NAMED["STAMP"], SMALL, seed=0)
    assert np.array_equal(again.class_incremental, runs["STAMP"].class_incremental, equal_nan=True)
    assert again.curve == runs["STAMP"].curve
    other = run_one(digits, NAMED["FedAvg"], SMALL, seed=1)
    assert other.curve != runs["FedAvg"].curve


@pytest.mark.slow
def test_fedavg_forgets_and_a_memory_helps(digits):
    setting = replace(SMALL, rounds=4, steps=8, lr=0.1)
    fedavg, full = (run_one(digits, NAMED[name], setting, seed=0) for name in ("FedAvg", "STAMP"))
    assert np.nanmean(fedavg.class_incremental[-1, :-1]) < 0.1
    assert full.curve[-1] > fedavg.curve[-1] + 0.2


@pytest.mark.slow
def test_the_whole_demo_does_not_depend_on_the_number_of_processes(digits, monkeypatch):
    monkeypatch.setattr(stamp, "load_images", lambda dataset: digits)
    methods = [NAMED["FedAvg"], NAMED["STAMP"]]
    ticks = []
    options = {"seeds": (1, 0), "setting": SMALL, "methods": methods}
    alone = stamp.run(**options, jobs=1, progress=lambda *tick: ticks.append(tick))
    together = stamp.run(**options, jobs=2)
    assert [(run.method, run.seed) for run in alone.runs] == [("FedAvg", 0), ("FedAvg", 1), ("STAMP", 0), ("STAMP", 1)]
    assert [run.curve for run in alone.runs] == [run.curve for run in together.runs]
    assert [tick[:2] for tick in ticks] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(ValueError, match="distinct seeds"):
        stamp.run(seeds=(0, 0))


ENDLESS = """import os, signal, sys, time
from pathlib import Path
from fedgram.bench.demo import stamp

def run_one(*arguments):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(300)

stamp.run_one = run_one  # in the workers too, which read this file first
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    list(stamp._finished(None, [(stamp.METHODS[0], seed) for seed in range(4)], None, 2))
"""


def processes_of(session):
    """The processes of a session that are not yet gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = stat.parent.name, stat.read_text().rsplit(")", 1)[1].split()
            if int(rest[3]) == session and rest[0] != "Z":
                found.append(int(pid))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_demo(tmp_path, number):
    (tmp_path / "demo.py").write_text(ENDLESS)
    (begun := tmp_path / "begun").mkdir()
    command = [sys.executable, "-P", str(tmp_path / "demo.py"), str(begun)]
    demo = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while len(os.listdir(begun)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        (os.killpg if number == signal.SIGINT else os.kill)(demo.pid, number)
        demo.wait(60)  # a fifth of what a worker left alone would take
        until = time.monotonic() + 10
        while processes_of(demo.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert processes_of(demo.pid) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)
        demo.wait()


# Figures, table, pictures, command


def made_run(method, seed, last):
    a = np.array([[0.8, math.nan], [0.8 - last, last]])
    return Run(method, seed, a, a, [0.8, last], 1000, 2000, 3_000_000, 0.0, 1.0)


RUNS = [made_run("FedAvg", s, 0.2) for s in (0, 1)] + [made_run("STAMP", s, 0.4 + s / 10) for s in (0, 1)]
RUNS += [made_run("STAMP without spatial", s, last) for s, last in ((0, 0.3), (1, 0.9))]


def test_figures_worked_out_by_hand():
    found = summary(RUNS)
    assert found["methods"]["STAMP"]["class_accuracy"] == pytest.approx({"mean": 0.4, "deviation": 0.0})
    assert found["methods"]["STAMP"]["class_forgetting"] == pytest.approx({"mean": 0.45, "deviation": 0.5**0.5 / 10})
    assert mean_and_deviation([0.5]) == (0.5, 0.0)
    runs = [replace(run, class_incremental=np.array([[run.seed / 10 + (run.method == "STAMP")]])) for run in RUNS]
    assert effects(runs)["all of STAMP, over FedAvg"] == pytest.approx([1.0, 1.0])


def test_what_does_not_help_is_said():
    assert verdict([0.1, 0.2]) == "better with every seed"
    assert verdict([-0.1, -0.2]) == "worse with every seed"
    assert verdict([0.1, -0.2]) == "the seeds disagree: no effect shown"
    assert verdict([0.1]) == "one seed shows nothing"
    worse = [replace(run, class_incremental=np.array([[0.5 - 0.1 * (run.method == "STAMP")]])) for run in RUNS]
    assert "  spatial matching: -10.0 (-10.0 -10.0: worse with every seed)" in effects_lines(worse)
    assert effects_lines([run for run in RUNS if run.method == "FedAvg"]) == []
    assert effects_lines(worse)[-1] == "  (Without any effect, 2 seeds agree in 1 of 2 cases.)"
    assert "agree" not in " ".join(effects_lines([run for run in worse if run.seed == 0]))


def test_the_table_shows_every_method_with_its_deviation():
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(RUNS, "some images; [/tmp/x] cannot be read"))
    text = console.export_text()
    console.file.close()
    row = next(line for line in text.splitlines() if "STAMP " in line and "without" not in line)
    assert "40.0 ± 0.0" in row
    assert "45.0 ± 7.1" in row
    assert "some images; [/tmp/x] cannot be read" in text


def test_the_curves_show_the_deviation_that_the_table_has(monkeypatch, tmp_path):
    bands = []
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **style: bands.append((high - low) / 2))
    stamp_plot.save_curves([run for run in RUNS if run.method == "STAMP"], tmp_path / "curves.png")
    assert bands[0].tolist() == pytest.approx([0.0, mean_and_deviation([0.4, 0.5])[1]])
    stamp_plot.save_curves(RUNS[:1], tmp_path / "curves.png")
    assert bands[1].tolist() == [0.0, 0.0]


def test_the_command_writes_figures_and_pictures(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(stamp, "load_images", lambda dataset: digits)
    monkeypatch.setattr(stamp, "METHODS", METHODS[-2:])
    monkeypatch.setattr(stamp, "Setting", lambda **options: replace(SMALL, **options))
    app = typer.Typer()
    app.command()(stamp.stamp_command)
    arguments = ["--seeds", "1", "--rounds", "1", "--clients", "2", "--jobs", "1", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    for heading in ("class-inc.", "task-inc."):  # of accuracy and of forgetting
        assert done.output.count(heading) == 2
    assert "STAMP, random samples" in done.output
    assert "selected instead of random samples" in done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "stamp.json",
        "stamp_curves.png",
        "stamp_matrices.png",
    ]
    for picture in (tmp_path / "out").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    document = json.loads(printed.stdout)
    written = json.loads((tmp_path / "out/stamp.json").read_text())
    assert document["methods"] == written["methods"]
    assert [len(row) for row in written["runs"][0]["class_incremental"]["accuracy"]] == [1, 2, 3, 4, 5]
    assert written["setting"]["clients"] == 2


@pytest.mark.parametrize("place", ["file", "/proc"])  # no folder; a folder into which nobody can write
def test_an_output_that_cannot_be_written_is_found_before_the_run(place, monkeypatch, tmp_path):
    monkeypatch.setattr(stamp, "run", lambda **_: pytest.fail("ran"))
    app = typer.Typer()
    app.command()(stamp.stamp_command)
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["-o", str(tmp_path / place)])
    assert done.exit_code == 1
    assert done.stderr.startswith("fedgram: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_package_is_named_with_its_line():
    hidden = "import sys; sys.modules['typer'] = None; import fedgram.bench.demo.stamp"
    done = subprocess.run([sys.executable, "-P", "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "pip install 'fedgram[demo]'" in done.stderr
