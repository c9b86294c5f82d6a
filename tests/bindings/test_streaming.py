"""Aggregation from files module by module: the same bits as in memory, resumed after interrupts, never mixed."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from fedgram import flora_na
from fedgram.bindings import streaming
from fedgram.bindings._streaming import extras
from fedgram.bindings.files.linked_file import PAGE
from fedgram.bindings.files.tensor_file import TensorFile
from fedgram.bindings.peft import load_adapter, load_adapters, save_adapter
from fedgram.bindings.streaming import aggregate_directories, aggregate_to_directory
from fedgram.flora_na import portions
from fedgram_testing.cli_clients import refused, run
from fedgram_testing.peft_adapters import edit_config
from fedgram_testing.streaming import MODULES, files_of, interrupted, write_adapter, write_clients


@pytest.fixture(autouse=True)
def one_module_at_a_time(monkeypatch):
    """So small are the test's modules that portions must be made smaller for there to be several."""
    monkeypatch.setattr(portions, "CHUNK_BYTES", 1)


def in_memory(dirs, output, weights=None, *, residual=None, anchor=None, align_to=None, **options):
    """What the library's own functions on whole adapters write; returns the report."""
    adapters = load_adapters(dirs)
    done = flora_na.aggregate(
        adapters,
        weights,
        names=[str(path) for path in dirs],
        residual=residual is not None,
        anchor=anchor and load_adapter(anchor),
        align_to=align_to and load_adapter(align_to),
        **options,
    )
    save_adapter(done.adapter, output)
    if residual is not None:
        save_adapter(done.residual, residual, config=done.adapter.config | {"task_type": None})
    return done.report


def same(root, dirs, weights=None, *, residual=False, **options):
    """Stream and aggregate in memory; files and reports must agree to the last bit."""
    rests = [root / "rest", root / "rest-expected"] if residual else [None, None]
    expected = in_memory(dirs, root / "expected", weights, residual=rests[1], **options)
    found = aggregate_directories(dirs, root / "out", weights, residual=rests[0], **options)
    assert files_of(root / "out") == files_of(root / "expected")
    assert found.report.to_dict() == expected.to_dict()
    if residual:
        assert files_of(rests[0]) == files_of(rests[1])
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    return found


@pytest.mark.parametrize("size", [1, 6000, 1 << 30], ids=["alone", "in pairs", "all together"])
@pytest.mark.parametrize("method", flora_na.METHODS)
def test_the_bits_are_those_of_aggregate(tmp_path, monkeypatch, method, size):
    monkeypatch.setattr(portions, "CHUNK_BYTES", size)
    heads = [{"score.weight": torch.full((3, 4), float(i)), "score.bias": torch.randn(3)} for i in range(3)]
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16]
    dirs = [
        write_adapter(tmp_path / f"c{i}", seed=i, r=2 + i, dtype=dtype, saved=heads[i])
        for i, dtype in enumerate(dtypes)
    ]
    same(tmp_path, dirs, [3, 1, 2.5], method=method)


def test_a_client_of_weight_zero_has_no_say_in_the_configuration(tmp_path):
    dirs = write_clients(tmp_path)
    edit_config(dirs[0], target_modules=".*(query|value)", base_model_name_or_path="another")
    adapters = [load_adapter(path) for path in dirs]
    streaming.aggregate_to_directory(adapters, tmp_path / "out", [0, 1, 1])
    save_adapter(flora_na.aggregate(adapters, [0, 1, 1]).adapter, tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_plain_mappings_are_adapters(tmp_path):
    modules = [dict(load_adapter(path).modules) for path in write_clients(tmp_path, 2)]
    found = aggregate_to_directory(modules, tmp_path / "out")
    assert found.report.to_dict() == flora_na.aggregate(modules).report.to_dict()
    assert set(load_adapter(tmp_path / "out").modules) == set(modules[0])


def test_anchor_alignment_residual_screening_and_missing_modules(tmp_path):
    (tmp_path / "first").mkdir()
    dirs = write_clients(tmp_path)
    aggregate_directories(dirs, tmp_path / "global", method="flora-na")
    options = {"method": "flora-na", "anchor": tmp_path / "global", "clip": "1x"}
    for i, extra in enumerate([options, {"align_to": tmp_path / "global", "rank": 5}, {"rank": "auto:0.8"}]):
        (tmp_path / f"{i}").mkdir()
        same(tmp_path / f"{i}", dirs, [5, 1, 1], residual=True, **extra)
    found = same(tmp_path / "first", dirs, method="flora-na", shared=True)
    assert set(found.report.modules) == set(MODULES)
    fewer = {name: shape for name, shape in MODULES.items() if name != "layers.1.q"}
    dirs.append(write_adapter(tmp_path / "c9", seed=9, modules=fewer))
    with pytest.raises(ValueError, match=r"layers.1.q: .*c9 has no such module"):
        aggregate_directories(dirs, tmp_path / "0" / "out")
    same(tmp_path / "1", dirs, [1, 2, 3, 4], missing="renormalize")
    same(tmp_path / "2", dirs, [1, 2, 3, 0])


def test_full_tensors_are_averaged_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "PIECE", 7)
    reads = []
    read = TensorFile.read
    monkeypatch.setattr(
        TensorFile, "read", lambda self, key, *part: reads.append((key, part)) or read(self, key, *part)
    )
    kinds = [torch.float32, torch.bfloat16, torch.float32]
    saved = [
        {
            "head.weight": torch.randn(5, 6, generator=torch.Generator().manual_seed(i)).to(dtype),
            "head.scale": torch.tensor(float(i)),
            "head.empty": torch.zeros(0, 4),
            "head.steps": torch.arange(20),
        }
        for i, dtype in enumerate(kinds)
    ]
    dirs = [write_adapter(tmp_path / f"c{i}", seed=i, saved=tensors) for i, tensors in enumerate(saved)]
    expected = in_memory(dirs, tmp_path / "expected", [1, 2, 4], method="fedavg")
    reads.clear()
    found = aggregate_directories(dirs, tmp_path / "out", [1, 2, 4], method="fedavg")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert found.report.to_dict() == expected.to_dict()
    parts = [part for key, part in reads if key.endswith("head.weight")]
    assert len(parts) == 3 * 5
    assert all(stop - start <= 7 for start, stop in parts)
    write_adapter(dirs[1], seed=1, saved=saved[1] | {"head.weight": torch.zeros(6, 5)})
    with pytest.raises(ValueError, match=r"head.weight: .*c1 has shape \(6, 5\), .*c0 has \(5, 6\)"):
        aggregate_directories(dirs, tmp_path / "out")


def test_an_interrupted_run_is_gone_on_with_and_nothing_is_done_twice(tmp_path, monkeypatch):
    saved = {"head.weight": torch.ones(3, 3)}
    dirs = write_clients(tmp_path, saved=saved)
    in_memory(dirs, tmp_path / "expected")
    interrupted(dirs, tmp_path / "out")
    reads = []
    read = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, key, *part: reads.append(key) or read(self, key, *part))
    seen = []
    found = aggregate_directories(dirs, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert found.resumed == 2
    assert seen == [(3, 4, "layers.1.q"), (4, 4, "layers.1.up")]
    assert not [key for key in reads if "layers.0" in key or "head" in key]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c1", "c2", "expected", "out"]


def cut(path, count):
    os.truncate(path, path.stat().st_size - count)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "line cut": (lambda journal: cut(journal / "done.jsonl", 5), 1),
    "line not JSON": (lambda journal: flip(journal / "done.jsonl", 0), 0),
    "data cut": (lambda journal: cut(journal / "results.bin", 1), 1),
    "data changed": (lambda journal: flip(journal / "results.bin", PAGE + 3), 0),
    "data gone": (lambda journal: (journal / "results.bin").unlink(), 0),
    "lines gone": (lambda journal: (journal / "done.jsonl").unlink(), 0),
    "data not counted": (lambda journal: os.truncate(journal / "results.bin", 1 << 16), 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_counts_as_far_as_it_is_whole(tmp_path, damage):
    dirs = write_clients(tmp_path)
    in_memory(dirs, tmp_path / "expected")
    interrupted(dirs, tmp_path / "out")
    spoil, left = DAMAGES[damage]
    spoil(tmp_path / ".out.journal")
    assert aggregate_directories(dirs, tmp_path / "out").resumed == left
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_bad_input_leaves_the_previous_output_and_no_journal(tmp_path):
    dirs = write_clients(tmp_path)
    aggregate_directories(dirs, tmp_path / "out")
    before = files_of(tmp_path / "out")
    spoilt = {"layers.1.up.lora_A.weight": torch.full((3, 20), float("nan"))}
    write_adapter(dirs[1], seed=1, r=3, changes=spoilt)
    line = refused("aggregate", *dirs, "-o", tmp_path / "out")
    assert "layers.1.up" in line
    assert str(dirs[1]) in line
    assert files_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c1", "c2", "out"]


def test_a_link_in_the_place_of_the_journal_is_not_followed(tmp_path):
    dirs = write_clients(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="in the way"):
        aggregate_directories(dirs, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_second_run_into_the_same_output_is_refused_while_the_first_works(tmp_path):
    dirs = write_clients(tmp_path)
    errors = []

    def second(*_):
        with pytest.raises(OSError, match="another run is writing this output") as caught:
            aggregate_directories(dirs, tmp_path / "out", method="svd")
        errors.append(caught.value)

    def progress(done, total, module):
        if done == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    aggregate_directories(dirs, tmp_path / "out", progress=progress)
    assert len(errors) == 1
    in_memory(dirs, tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


KILLED = """
import sys, time
from fedgram.flora_na import portions
portions.CHUNK_BYTES = 1
from fedgram.bindings.streaming import aggregate_directories, aggregate_to_directory
def progress(done, total, module):
    print(done, flush=True)
    if done == 3:
        time.sleep(600)
aggregate_directories(sys.argv[2:], sys.argv[1], progress=progress)
"""


def test_a_killed_run_is_gone_on_with_from_the_command_line(tmp_path):
    dirs = write_clients(tmp_path)
    aggregate_directories(dirs, tmp_path / "out", method="fedavg")
    before = files_of(tmp_path / "out")
    command = [sys.executable, "-P", "-c", KILLED, str(tmp_path / "out"), *map(str, dirs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert [child.stdout.readline() for _ in range(3)] == ["1\n", "2\n", "3\n"]
        assert files_of(tmp_path / "out") == before
        child.send_signal(signal.SIGKILL)
    expected = in_memory(dirs, tmp_path / "expected")
    result = run("aggregate", *dirs, "-o", tmp_path / "out")
    assert "3 of 4 modules were done by an interrupted run" in result.stdout
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    again = run("aggregate", *dirs, "-o", tmp_path / "out", "--json", "--no-resume")
    report = json.loads(again.stdout)
    assert report == {"output": str(tmp_path / "out"), "residual": None, **expected.to_dict()}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


MEASURED = """
import sys
from pathlib import Path
from fedgram.bindings.streaming import aggregate_directories, aggregate_to_directory
aggregate_directories(sorted(Path(sys.argv[1]).glob("c*")), Path(sys.argv[1]) / "out", method=sys.argv[2])
status = Path("/proc/self/status").read_text().splitlines()
print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
def test_peak_memory_is_bounded_by_one_module(tmp_path):
    # Four modules of 67 MB and an embedding of 67 MB a client; all together they are more than twice the bound.
    wide = dict.fromkeys(("layers.0.q", "layers.1.q", "layers.2.q", "layers.3.q"), (1 << 18, 1 << 18))
    head = {"head.weight": torch.ones(1 << 13, 1 << 12, dtype=torch.bfloat16)}
    dirs = [
        write_adapter(tmp_path / f"c{i}", seed=i, r=16, modules=wide, dtype=torch.bfloat16, saved=head)
        for i in range(4)
    ]
    module = 4 * 2 * 16 * (1 << 18) * 2
    bound = 1.5 * module + 300e6
    assert sum(path.stat().st_size for folder in dirs for path in folder.iterdir()) > 1.2 * bound
    command = [sys.executable, "-P", "-c", MEASURED, str(tmp_path), "flora-na"]
    peaks: list[int] = []
    while len(peaks) < 3 and (
        not peaks or peaks[-1] > bound
    ):  # how far threads run ahead of each other varies by some MB
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert min(peaks) <= bound, peaks
    merged = load_adapter(tmp_path / "out").extras["base_model.model.head.weight"]
    assert torch.equal(merged, head["head.weight"])


def test_streaming_names_what_it_returns(tmp_path):
    dirs = write_clients(tmp_path, count=2)
    found = aggregate_directories(dirs, tmp_path / "out", method="svd")
    assert isinstance(found, streaming.Streamed)
    assert list(found.report.clients) == [str(path) for path in dirs]
