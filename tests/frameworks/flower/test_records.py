"""State dicts through Flower's records and back, to the bit."""

import io
import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from peft import LoraConfig

from fedgram.bindings._frameworks.records import sent_lora_config
from fedgram.bindings.flower import lora_record, to_arrays, to_state_dict


def every_bfloat16() -> torch.Tensor:
    """All 65,536 bit patterns: subnormals, infinities and NaNs among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(256, 256)


def sent(record: ArrayRecord) -> ArrayRecord:
    """The record as the other side has it after Flower took it apart and put it together again."""
    arrays = {
        name: Array.inflate(array.deflate(), {c.object_id: c for c in array.children.values()})
        for name, array in record.items()
    }
    return ArrayRecord.inflate(record.deflate(), {a.object_id: a for a in arrays.values()})


def test_flower_itself_cannot_carry_bfloat16():
    with pytest.raises(TypeError, match="BFloat16"):
        ArrayRecord({"w": torch.ones(2, dtype=torch.bfloat16)})


def test_packed_bfloat16_comes_back_to_the_bit():
    w = every_bfloat16()
    record = sent(to_arrays({"w": w, "t": w.t(), "empty": w[:0], "one": w[0, 0]}, pack_bf16=True))
    back = to_state_dict(record)
    for name, expected in {"w": w, "t": w.t(), "empty": w[:0], "one": w[0, 0]}.items():
        assert back[name].dtype == torch.bfloat16
        assert back[name].shape == expected.shape
        assert torch.equal(back[name].view(torch.int16), expected.contiguous().view(torch.int16))
    assert len(record["w"].data) == 2 * w.numel()


def test_packed_arrays_are_refused_by_code_that_does_not_know_them():
    with pytest.raises(TypeError, match=r"fedgram\.bfloat16"):
        to_arrays({"w": torch.ones(2, dtype=torch.bfloat16)}, pack_bf16=True)["w"].numpy()


def test_unpacked_bfloat16_travels_as_float32_without_loss():
    w = every_bfloat16()
    record = sent(to_arrays({"w": w}))
    back = to_state_dict(record)["w"]
    assert back.dtype == torch.float32
    assert torch.equal(back.to(torch.bfloat16)[~w.isnan()], w[~w.isnan()])
    assert np.array_equal(record["w"].numpy(), back.numpy(), equal_nan=True)  # every other strategy reads it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_what_numpy_knows_keeps_its_type(dtype):
    w = torch.arange(12).reshape(3, 4).to(dtype)
    back = to_state_dict(sent(to_arrays({"w": w, "t": w.t(), "empty": w[:0], "one": w[0, 1]})))
    for name, expected in {"w": w, "t": w.t(), "empty": w[:0], "one": w[0, 1]}.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], expected)


def test_arrays_of_other_senders_are_read():
    big_endian = np.arange(6, dtype=">f4").reshape(2, 3)
    by_column = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    back = to_state_dict(ArrayRecord({"a": Array(big_endian), "b": Array(by_column)}))
    assert torch.equal(back["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(back["b"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.ones(2).to(torch.float8_e5m2), "float8_e5m2"),
        ([1.0], "list"),
        (torch.eye(2).to_sparse(), "cannot"),
        (torch.eye(2, dtype=torch.bfloat16).to_sparse(), "sparse_coo: cannot"),
        (torch.empty(2, device="meta"), "float32, meta: cannot"),
        (torch.empty(2, device="meta", dtype=torch.bfloat16), "bfloat16, meta: cannot"),
    ],
)
@pytest.mark.parametrize("pack", [True, False])
def test_what_records_cannot_carry_is_refused_by_name(value, reason, pack):
    with pytest.raises(ValueError, match=rf"layer\.w: .*{reason}"):
        to_arrays({"layer.w": value}, pack_bf16=pack)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([object()]), allow_pickle=True)
    return buffer.getvalue()


def archived() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def headed(header: str, data: bytes = b"") -> Array:
    """An array whose header says what it likes."""
    text = header.encode("latin1") + b"\n"
    return Array("float32", (1,), "numpy.ndarray", b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + data)


def shaped(shape: str, data: bytes = b"", descr: str = "<f4") -> Array:
    return headed(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}", data)


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (3,), "numpy.ndarray", archived()),
        Array("float32", (3,), "numpy.ndarray", b"PK\x03\x04 no archive"),
        Array("float32", (3,), "numpy.ndarray", b"\x93NUMPY\x07\0" + b"x" * 20),
        shaped(f"({10**14},)"),
        shaped(f"({10**14},)", b"\0" * 4, "|V0"),
        shaped(f"({10**30},)"),
        shaped("(-1,)", b"\0" * 4),
        shaped("(-1, -1)", b"\0" * 4),
        shaped("(2,)", b"\0" * 4),
        shaped("(1,)", b"\0" * 8),
        headed("{'descr': (((("),
        headed("{'descr': \0"),
        headed("(" * 9000),
        Array("bfloat16", (-1,), "fedgram.bfloat16", b"\0\0\0\0"),
        Array("float32", (2,), "numpy.ndarray", b"not an array"),
        Array("float32", (2,), "numpy.ndarray", b""),
        Array("object", (1,), "numpy.ndarray", pickled()),
        Array("bfloat16", (3,), "fedgram.bfloat16", b"\0\0\0\0"),
        Array("bfloat16", (1,), "fedgram.bfloat16", b"\0\0\0"),
        Array("float32", (2,), "somebody.else", b"\0" * 8),
        Array(np.array(["text"])),
    ],
)
def test_arrays_that_cannot_be_read_are_refused_by_sender_and_name(array):
    with pytest.raises(ValueError, match=r"node 7: layer\.w: not an array"):
        to_state_dict(ArrayRecord({"layer.w": array}), label="node 7")


def test_lora_settings_travel_in_a_config_record():
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules={"query", "value"}, alpha_pattern={"3.query": 2}, task_type="SEQ_CLS"
    )
    content = RecordDict({"arrays": to_arrays({"w": torch.ones(1)}), "lora": lora_record(config)})
    back = sent_lora_config(content, "node 1")
    assert (back["r"], back["lora_alpha"]) == (4, 6)
    assert back["target_modules"] == ["query", "value"]
    assert back["alpha_pattern"] == {"3.query": 2}
    assert back["task_type"] == "SEQ_CLS"
    assert sent_lora_config(RecordDict({"other": ConfigRecord({"lr": 0.1})}), "node 1") is None


@pytest.mark.parametrize("text", ["{", json.dumps([1]), "[" * 100000, '{"r": 4, "r": 8}', "\ud800"])
def test_broken_lora_settings_are_refused_by_sender(text):
    with pytest.raises(ValueError, match="node 3: lora-config: "):
        sent_lora_config(RecordDict({"lora": ConfigRecord({"lora-config": text})}), "node 3")


def test_lora_record_wants_a_configuration():
    with pytest.raises(ValueError, match=r"config: expected a peft\.LoraConfig or a mapping, got int"):
        lora_record(8)
