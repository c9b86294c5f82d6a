"""Files that stay open between reads: no more than the system allows, and read again all the same."""

import os

import pytest
import torch

from fedgram.bindings.files import kept_file
from fedgram.bindings.files.tensor_file import TensorFile, write_tensors
from fedgram.bindings.files.tensor_header import TensorSpec


def open_here(folder):
    """How many files of a folder this process has open."""
    seen = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(f"{folder}/") for link in seen)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files cannot be counted here")
@pytest.mark.parametrize(("allowed", "kept"), [(20, 10), (100_000, 30), (-1, 30)])
def test_half_of_the_files_that_are_allowed_stay_open(tmp_path, monkeypatch, allowed, kept):
    numbers = torch.arange(40.0).view(40, 1)
    for i, row in enumerate(numbers):
        write_tensors(tmp_path / f"{i}", {"x": TensorSpec("F32", (1,))}, lambda _, row=row: row)
    monkeypatch.setattr(kept_file, "MOST", 30)
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: allowed if name == "SC_OPEN_MAX" else real(name))
    files = [TensorFile(tmp_path / f"{i}") for i in range(40)]
    for _ in range(2):
        assert torch.equal(torch.stack([file.read("x") for file in files]), numbers)
        assert open_here(tmp_path) == kept
