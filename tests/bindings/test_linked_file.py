"""Results that lie in the journal as the output has them become the output by a second name; others are written."""

import errno
import json
import os
import stat
import threading
import tracemalloc

import pytest
import torch

from fedgram.bindings import peft
from fedgram.bindings._streaming import journal, results
from fedgram.bindings.files import linked_file, write_behind
from fedgram.bindings.files.linked_file import PAGE, header_room, link_tensors
from fedgram.bindings.files.tensor_file import TensorFile, header_of
from fedgram.bindings.files.tensor_header import MAX_HEADER, TensorSpec
from fedgram.bindings.peft import load_adapter, load_adapters, merge_configs, save_adapter
from fedgram.bindings.streaming import aggregate_directories
from fedgram.flora_na import aggregate, portions
from fedgram_testing.streaming import files_of, tensors_of, write_adapter, write_clients


@pytest.fixture
def written(monkeypatch):
    """The files that are written tensor by tensor."""
    paths = []
    write = peft.write_tensors
    monkeypatch.setattr(peft, "write_tensors", lambda path, *rest: (paths.append(path), write(path, *rest))[1])
    return paths


def expected(dirs, output, **options):
    adapters = load_adapters(dirs)
    config = merge_configs(adapter.config for adapter in adapters)
    save_adapter(aggregate(adapters, **options).adapter, output, config=config)
    return files_of(output)


@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd", "stack"])
def test_the_output_is_the_journal_under_another_name(tmp_path, monkeypatch, written, method):
    inodes = []
    link = results.link_tensors

    def noted(data, *rest):
        inodes.append(data.stat().st_ino)
        return link(data, *rest)

    monkeypatch.setattr(results, "link_tensors", noted)
    dirs = write_clients(tmp_path)
    aggregate_directories(dirs, tmp_path / "out", method=method)
    file = tmp_path / "out" / "adapter_model.safetensors"
    assert written == []
    assert [file.stat().st_ino] == inodes
    assert file.stat().st_nlink == 1
    assert files_of(tmp_path / "out") == expected(dirs, tmp_path / "expected", method=method)


def test_it_is_as_readable_as_any_new_file(tmp_path, written):
    dirs = write_clients(tmp_path)
    before = os.umask(0o027)
    try:
        aggregate_directories(dirs, tmp_path / "out")
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "out" / "adapter_model.safetensors").stat().st_mode)
    assert written == []
    assert mode == 0o640


def test_full_tensors_come_along_and_it_is_read_back(tmp_path, written):
    dirs = [tmp_path / "c0", tmp_path / "c1"]
    for seed, path in enumerate(dirs):
        saved = {"classifier.weight": torch.full((5, 7), seed + 1.0), "classifier.bias": torch.ones(5)}
        write_adapter(path, seed=seed, saved=saved, config={"modules_to_save": ["classifier"]})
    aggregate_directories(dirs, tmp_path / "out", method="fedavg")
    assert written == []
    found = load_adapter(tmp_path / "out")
    assert torch.equal(found.extras["base_model.model.classifier.weight"], torch.full((5, 7), 1.5))
    assert files_of(tmp_path / "out") == expected(dirs, tmp_path / "expected", method="fedavg")


CASES = {
    "a residual lies between": {"residual": True},
    "no links here": {"links": False},
    "no room for the header": {"room": 0},
    "a tensor that would lie askew": {"askew": True},
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_linked_is_written(tmp_path, monkeypatch, written, case):
    wanted, options = CASES[case], {}
    if wanted.get("residual"):
        options["residual"] = tmp_path / "rest"
    if not wanted.get("links", True):
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    if "room" in wanted:
        monkeypatch.setattr("fedgram.bindings.streaming.header_room", lambda names: len(list(names)) * 0)
    saved = {"classifier.weight": torch.ones(3).half()} if wanted.get("askew") else None
    config = {"modules_to_save": ["classifier"]} if saved else None
    dirs = [tmp_path / "c0", tmp_path / "c1"]
    for seed, path in enumerate(dirs):
        write_adapter(path, seed=seed, saved=saved, config=config)
    aggregate_directories(dirs, tmp_path / "out", method="fedavg", **options)
    assert [path.name for path in written].count("adapter_model.safetensors") == len(written) > 0
    assert files_of(tmp_path / "out") == expected(dirs, tmp_path / "expected", method="fedavg")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_kill_between_linking_and_publishing_loses_nothing(tmp_path, monkeypatch):
    """The header lies where the journal has no results: the next run takes all of them over, and links again."""
    dirs = write_clients(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(peft, "_write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            aggregate_directories(dirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert aggregate_directories(dirs, tmp_path / "out").resumed == 4
    assert files_of(tmp_path / "out") == expected(dirs, tmp_path / "expected")


@pytest.mark.parametrize("lost", [False, True])
def test_a_journal_that_is_an_output_too_is_not_written_to(tmp_path, monkeypatch, lost):
    """Killed after the output appeared and before the journal went; with ``lost``, a power cut took its lines."""
    dirs = write_clients(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_remove", lambda directory: None)
        aggregate_directories(dirs, tmp_path / "out")
    data, file = tmp_path / ".out.journal" / "results.bin", tmp_path / "out" / "adapter_model.safetensors"
    assert data.stat().st_ino == file.stat().st_ino
    before = file.read_bytes()
    if lost:
        os.truncate(data.with_name("done.jsonl"), 0)
    seen = []

    def look(done, total, module):
        seen.append((file.read_bytes(), data.stat().st_ino == file.stat().st_ino))
        raise KeyboardInterrupt

    if lost:
        with pytest.raises(KeyboardInterrupt):
            aggregate_directories(dirs, tmp_path / "out", progress=look)
        assert seen == [(before, False)]
        assert file.read_bytes() == before
    assert aggregate_directories(dirs, tmp_path / "out").resumed == 4
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c1", "c2", "out"]


def test_an_error_of_writing_behind_is_told(tmp_path, monkeypatch):
    dirs = write_clients(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(write_behind, "STEP", 1)
    monkeypatch.setattr(os, "fdatasync", full)
    monkeypatch.setattr(portions, "CHUNK_BYTES", 1)
    monkeypatch.setattr(write_behind.Future, "done", lambda self: True)
    with pytest.raises(OSError, match="no space left on device") as caught:
        aggregate_directories(dirs, tmp_path / "out")
    assert caught.value.filename == str(tmp_path / ".out.journal" / "results.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c1", "c2"]


def test_what_is_appended_is_flushed_meanwhile(tmp_path, monkeypatch):
    dirs, flushed = write_clients(tmp_path), []
    flush = os.fdatasync
    monkeypatch.setattr(write_behind, "STEP", 1)
    monkeypatch.setattr(portions, "CHUNK_BYTES", 1)
    monkeypatch.setattr(
        os, "fdatasync", lambda descriptor: (flushed.append(threading.current_thread().name), flush(descriptor))
    )
    aggregate_directories(dirs, tmp_path / "out")
    assert 0 < len(flushed) <= 4
    assert all(name.startswith("fedgram-write-behind") for name in flushed)
    assert not any(t.name.startswith("fedgram-write-behind") for t in threading.enumerate())


def data_file(path, room, *tensors):
    path.write_bytes(b"\0" * room + b"".join(t.numpy().tobytes() for t in tensors))


def test_a_file_of_any_order_of_tensors(tmp_path):
    one, two = torch.arange(6.0).view(2, 3), torch.arange(4, dtype=torch.int32)
    data_file(tmp_path / "data", PAGE, one, two)
    specs = {"two": TensorSpec("I32", (4,), PAGE + 24), "one": TensorSpec("F32", (2, 3), PAGE)}
    assert link_tensors(tmp_path / "data", tmp_path / "file", PAGE, specs)
    file = TensorFile(tmp_path / "file")
    assert torch.equal(file.read("one"), one)
    assert torch.equal(file.read("two"), two)
    metadata, found = tensors_of(tmp_path / "file")
    assert metadata == {"format": "pt"}
    assert found["one"] == ("F32", [2, 3], one.numpy().tobytes())


@pytest.mark.parametrize(
    "specs",
    [
        {"one": TensorSpec("F32", (2, 3), PAGE)},  # bytes left over
        {"one": TensorSpec("F32", (2, 3), PAGE), "two": TensorSpec("I32", (3,), PAGE + 28)},  # a gap
        {"one": TensorSpec("F32", (2, 3), PAGE), "two": TensorSpec("I32", (5,), PAGE + 20)},  # an overlap
        {"one": TensorSpec("F32", (2, 3), PAGE), "n" * PAGE: TensorSpec("I32", (4,), PAGE + 24)},  # too long a header
    ],
)
def test_what_does_not_fill_the_file_is_not_linked(tmp_path, specs):
    data_file(tmp_path / "data", PAGE, torch.arange(6.0), torch.arange(4, dtype=torch.int32))
    before = (tmp_path / "data").read_bytes()
    assert not link_tensors(tmp_path / "data", tmp_path / "file", PAGE, specs)
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "data").read_bytes() == before


def test_the_room_is_in_pages_and_bounded():
    assert header_room(["a"]) == PAGE
    assert header_room(["m" * 1000] * 100) % PAGE == 0
    assert header_room(["m" * 1000] * 100) > 100_000
    assert header_room(["m" * 1000] * (MAX_HEADER // 1000)) == 0
    assert len('"base_model.model..lora_A.weight":{"dtype":"BF16","shape":[16384,128],') <= linked_file.ENTRY


def test_a_header_of_many_tensors_takes_little_more_than_its_text():
    specs = {f"base_model.model.layers.{i}.q.lora_A.weight": TensorSpec("F32", (4, 32)) for i in range(2000)}
    tracemalloc.start()
    header = header_of(specs, list(specs))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(header)
    entries = json.loads(header[8:])
    assert entries["base_model.model.layers.1.q.lora_A.weight"] == {
        "dtype": "F32", "shape": [4, 32], "data_offsets": [512, 1024]
    }  # fmt: skip
