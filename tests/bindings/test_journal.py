"""What a journal keeps of its results in memory and on the disk, and tensors in the memory of what was read."""

import json

import numpy as np
import pytest
import torch

from fedgram.bindings._streaming.journal import LINES, Journal
from fedgram.bindings._streaming.records import Record, Records, StoredTensor
from fedgram.bindings.files.buffers import empty_buffer, tensor_in
from fedgram.bindings.files.tensor_header import DTYPES

NAMES = ["layer model.q_proj", 'extra "quoted" \\ name', "residual ünïcode", ""]


def record(i):
    tensors = {"A": StoredTensor("BF16", (2, i), 64, 4 * i, 7), "B": StoredTensor("BF16", (), 64 + 4 * i, 2, 2**32 - 1)}
    return Record({"layer": {"scaling": 0.1 + i}, "report": {"rho": float("nan"), "status": "converged"}}, tensors)


def same(x, y):
    assert (repr(x.facts), x.tensors) == (repr(y.facts), y.tensors)  # NaN is not equal to itself


def test_records_come_back_as_they_were_kept():
    records = Records()
    records.add({name: record(i).text() for i, name in enumerate(NAMES[:2])})
    records.add({name: record(i + 2).text() for i, name in enumerate(NAMES[2:])})
    assert list(records) == NAMES
    assert (len(records), "another" in records, records.get("another")) == (4, False, None)
    for i, name in [*enumerate(NAMES), (1, NAMES[1]), (1, NAMES[1])]:
        same(records[name], record(i))
    with pytest.raises(KeyError):
        records["another"]


def test_a_key_kept_again_is_the_new_one():
    records = Records()
    records.add({"x": record(1).text()})
    same(records["x"], record(1))
    records.add({"x": record(2).text()})
    same(records["x"], record(2))


def test_a_journal_opened_again_has_the_same_records(tmp_path):
    journal = Journal(tmp_path)
    tensors = {"A": torch.randn(3, 4), "B": torch.randn(5, 3).bfloat16()}
    journal.append({name: ({"number": i}, tensors) for i, name in enumerate(NAMES)})
    kept = {name: journal.records[name] for name in NAMES}
    journal.close()
    [line] = (tmp_path / LINES).read_text().splitlines()
    assert list(json.loads(line)) == NAMES
    again = Journal(tmp_path)
    assert {name: again.records[name] for name in again.records} == kept
    assert all(torch.equal(again.read(name, "B"), tensors["B"]) for name in NAMES)
    again.close()


def test_what_could_not_be_written_is_not_kept(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.append({"first": ({}, {"A": torch.ones(3)})})
    write = Journal._write

    def full(self, file, part):
        if file is self._lines:
            raise OSError(28, "No space left on device", "disk")
        write(self, file, part)

    monkeypatch.setattr(Journal, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        journal.append({"second": ({}, {"A": torch.ones(3)})})
    assert list(journal.records) == ["first"]
    journal.close()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("nbytes", [4096, 1 << 22])
def test_tensors_lie_in_the_memory_that_was_read(dtype, nbytes):
    buffer = empty_buffer(nbytes)
    memoryview(buffer)[:] = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8).data
    for shape, offset in (((3, 5), 0), ((4, 2, 8), 64), ((), 8), ((0, 3), 0)):
        tensor = tensor_in(buffer, dtype, shape, offset)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
        raw = bytes(memoryview(buffer)[offset : offset + tensor.nbytes])
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == raw
    whole = tensor_in(buffer, torch.uint8, (nbytes,))
    whole[8] += 1
    assert memoryview(buffer)[8] == int(whole[8])
