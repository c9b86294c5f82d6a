"""What is read for the last time leaves the page cache, unless it was there before or is small beside the memory."""

import os
from pathlib import Path

import pytest
import torch

from fedgram.bindings.files import read_behind
from fedgram.bindings.files.read_behind import mostly_cached, reading_once
from fedgram.bindings.files.tensor_file import TensorFile, spec_of, write_tensors
from fedgram.bindings.peft import save_adapter
from fedgram.bindings.streaming import aggregate_directories
from fedgram.flora_na import Adapter, LoraLayer

TENSORS, NUMBERS = 16, 1 << 18


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(read_behind, "PERIOD", 1 << 20)
    monkeypatch.setattr(read_behind, "MEMORY_SHARE", 0)


@pytest.fixture
def path(tmp_path) -> Path:
    """A file of 16 MiB that is on disk and, unless a test reads it, not in the cache."""
    path, values = tmp_path / "x.safetensors", torch.arange(NUMBERS, dtype=torch.float32)
    write_tensors(path, {key: spec_of(values, key) for key in keys()}, lambda key: values + int(key))
    forget(path)
    return path


def forget(path):
    """Have a file that is on disk leave the cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("files here cannot leave the page cache, or the system does not tell whether they have")


def keys():
    return [f"{i:02d}" for i in range(TENSORS)]


def cached(path):
    with open(path, "rb") as file:
        return mostly_cached(file.fileno())


def read(path, order):
    file = TensorFile(path)
    for key in order:
        assert torch.equal(file.read(key), torch.arange(NUMBERS, dtype=torch.float32) + int(key))


def test_a_file_that_is_read_once_leaves_the_cache(path):
    with reading_once(1):
        read(path, keys())
    assert not cached(path)


def test_a_file_that_is_read_otherwise_stays(path):
    read(path, keys())
    with reading_once(1):
        pass
    assert cached(path)


def test_a_file_that_was_cached_before_stays(path):
    path.read_bytes()
    assert cached(path)
    with reading_once(1):
        read(path, keys())
    assert cached(path)


def test_files_that_are_small_beside_the_memory_stay(path, monkeypatch):
    monkeypatch.setattr(read_behind, "MEMORY_SHARE", 1 / 4)
    with reading_once(path.stat().st_size):
        read(path, keys())
    assert cached(path)


@pytest.mark.parametrize("share", [0, 1 / 4])
def test_streaming_leaves_large_files_as_it_found_them(tmp_path, monkeypatch, share):
    monkeypatch.setattr(read_behind, "MEMORY_SHARE", share)
    dirs = [tmp_path / name for name in "ab"]
    for directory in dirs:
        layers = {f"m{i:02d}": LoraLayer(A=torch.randn(8, 4096), B=torch.randn(4096, 8)) for i in range(16)}
        save_adapter(Adapter(layers), directory)
        forget(directory / "adapter_model.safetensors")
    aggregate_directories(dirs, tmp_path / "global", method="fedavg")
    assert [cached(directory / "adapter_model.safetensors") for directory in dirs] == [share > 0] * 2


def test_whatever_the_order_the_numbers_are_right(path):
    with reading_once(1):
        read(path, [*reversed(keys()), "03", "03", *keys()])


def test_where_the_system_does_not_tell_nothing_is_dropped(path, monkeypatch):
    monkeypatch.setattr(read_behind, "CACHESTAT", 100_000)  # no such call
    with reading_once(1):
        read(path, keys())
    monkeypatch.undo()
    assert cached(path)


def test_where_a_system_takes_no_advice_files_are_read_all_the_same(path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    with reading_once(1):
        read(path, keys())
    assert cached(path)
