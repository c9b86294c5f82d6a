"""``fedgram bench``: what fails costs its own figures only, and no output place is found wanting after the run."""

import json
import sys
from functools import partial

import pytest
import torch
import typer
from typer.testing import CliRunner

from fedgram.bench import run
from fedgram.bench.registry import Case, Contender, Entry, with_peers

CPU = torch.device("cpu")


def case(ours, size, device):
    return Case("none", [Contender("ours", ours, "ours", 0.0, memory=True)], float, "distance from zero")


def no_memory():
    raise RuntimeError("not enough memory:\nyou tried to allocate 1 bytes")


GOOD = Entry("good", "kernels", partial(case, lambda: 0.0), gpu=False)
BAD = Entry("bad", "kernels", partial(case, no_memory), gpu=False)


@pytest.fixture
def command(monkeypatch):
    """The command on a chosen list of entries, small."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(run.bench_command)
    whole = run.run_benchmarks

    def tiny(chosen, size, device, **options):
        return whole(chosen, "tiny", device, **options | {"sweeps": False})

    def invoke(chosen, *arguments):
        monkeypatch.setattr(run, "entries", lambda only, gpu: chosen)
        return CliRunner().invoke(app, ["--threads", "1", "--no-plots", *map(str, arguments)])

    monkeypatch.setattr(run, "run_benchmarks", tiny)
    monkeypatch.setattr(run, "measure_apart", lambda *_: 1)
    before = torch.get_num_threads()
    yield invoke
    torch.set_num_threads(before)


def test_an_output_that_cannot_be_written_is_found_before_the_run(command, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run_benchmarks", lambda *_, **__: pytest.fail("ran"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        done = command([GOOD], "--out", out)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"fedgram: {out}: ")
        assert done.stderr.count("\n") == 1


def test_figures_are_printed_before_an_output_fails(command, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")  # without a file name, as write itself says it

    monkeypatch.setattr(run, "write_files", full)
    done = command([GOOD], "--json", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["cases"][0]["entry"] == "good"
    assert done.stderr.endswith("fedgram: No space left on device\n")


def test_files_of_an_earlier_run_are_replaced_whole(command, tmp_path):
    for _ in range(2):
        assert command([GOOD], "--out", tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.csv", "bench.json", "bench.md"]


def test_an_entry_that_fails_is_told_and_the_others_are_written(command, tmp_path):
    done = command([BAD, GOOD], "--out", tmp_path)
    assert done.exit_code == 1
    assert done.stderr.endswith("fedgram: failed: bad\n")
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [c["entry"] for c in results["cases"]] == ["good"]
    told = "RuntimeError: not enough memory: you tried to allocate 1 bytes"
    assert results["failed"] == {"bad": told}
    assert f"bad failed: {told}" in done.stdout
    assert f"**bad** failed: {told}" in (tmp_path / "bench.md").read_text()


def test_paths_and_the_line_that_installs_are_printed_as_they_are(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = command([GOOD], "--plots", "--out", tmp_path / "out [a]")
    assert done.exit_code == 0
    assert "pip install 'fedgram[plot]'\n" in done.stderr
    assert f"wrote {tmp_path}/out [a]/bench.json, " in done.stderr
    assert "targets met" not in done.stdout  # none was set


def test_a_memory_figure_that_fails_is_a_remark(command, monkeypatch, tmp_path):
    def killed(*_):
        raise RuntimeError("Killed")

    monkeypatch.setattr(run, "measure_apart", killed)
    monkeypatch.setattr(run, "RESET", tmp_path)  # as where the system can tell the peak
    assert command([GOOD], "--out", tmp_path / "out").exit_code == 0
    [found] = json.loads((tmp_path / "out/bench.json").read_text())["cases"]
    assert found["missing"] == {"memory of ours": "not measured: RuntimeError: Killed"}
    assert found["contenders"][0]["right"]


def test_a_peer_that_cannot_be_made_is_a_remark():
    def their_engine():
        raise TypeError("changed in their last\nrelease")

    found, missing = with_peers([Contender("ours", float, "ours", 0.0)], their_engine)
    assert [c.name for c in found] == ["ours"]
    assert missing == {"their_engine": "failed: TypeError: changed in their last release"}
