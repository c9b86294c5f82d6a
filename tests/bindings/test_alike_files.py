"""Clients' files that are laid out alike share what is known of their tensors, and nothing else."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from fedgram.bindings._peft import contents as peft_contents
from fedgram.bindings.files import tensor_header
from fedgram.bindings.files.tensor_file import TensorFile, write_tensors
from fedgram.bindings.files.tensor_header import TensorSpec
from fedgram.bindings.peft import load_adapter, load_adapters

KEYS = [f"base_model.model.m{i}.lora_{side}.weight" for i in range(3) for side in "AB"]


def client(folder, seed, rank=2, **config):
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: (rank, 5) if "lora_A" in key else (4, rank) for key in KEYS}
    write_tensors(
        folder / "adapter_model.safetensors",
        {key: TensorSpec("F32", shape) for key, shape in shapes.items()},
        lambda key: torch.randn(shapes[key], generator=generator),
    )
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": ["m0", "m1", "m2"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def counted(monkeypatch, module, name):
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(a), function(*a, **k))[1])
    return calls


def test_what_is_alike_is_parsed_once_and_values_are_each_clients_own(tmp_path, monkeypatch):
    headers = counted(monkeypatch, tensor_header, "_entries")
    contents = counted(monkeypatch, peft_contents, "_contents")
    adapters = load_adapters([client(tmp_path / f"c{i}", i) for i in range(4)])
    assert len(headers) == len(contents) == 1
    values = [adapter.modules["m1"].A for adapter in adapters]
    assert not any(torch.equal(values[0], other) for other in values[1:])
    for i, value in enumerate(values):
        assert torch.equal(value, load_adapter(tmp_path / f"c{i}").modules["m1"].A)


def test_another_configuration_of_the_same_layout_is_read_for_itself(tmp_path):
    alphas = (2, 6, 2)
    dirs = [client(tmp_path / f"c{i}", i, lora_alpha=alpha) for i, alpha in enumerate(alphas)]
    assert [adapter.modules["m0"].scaling for adapter in load_adapters(dirs)] == [1.0, 3.0, 1.0]


def test_a_configuration_that_does_not_fit_the_shared_layout_is_refused_by_its_own_name(tmp_path):
    dirs = [client(tmp_path / "a", 0), client(tmp_path / "b", 1, r=3)]
    with pytest.raises(ValueError, match=r"b/adapter_model\.safetensors: m0: rank 2 in the file, 3 by r"):
        load_adapters(dirs)


def test_a_file_cut_short_under_a_known_header_is_refused(tmp_path):
    kept = TensorFile(client(tmp_path / "a", 0) / "adapter_model.safetensors")
    short = client(tmp_path / "b", 1) / "adapter_model.safetensors"
    assert TensorFile(short).specs is kept.specs
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"b/adapter_model\.safetensors: not a whole safetensors file"):
        TensorFile(short)


def test_nothing_is_kept_once_the_adapters_are_gone(tmp_path):
    before = len(tensor_header._alike), len(peft_contents._alike)
    adapter = load_adapter(client(tmp_path / "a", 0, rank=7))
    assert (len(tensor_header._alike), len(peft_contents._alike)) == (before[0] + 1, before[1] + 1)
    del adapter
    assert (len(tensor_header._alike), len(peft_contents._alike)) == before


def test_a_file_for_which_no_descriptor_is_left_is_named(tmp_path, monkeypatch):
    save_file({"x": torch.ones(2)}, tmp_path / "t.safetensors")
    file = TensorFile(tmp_path / "t.safetensors")

    def none_left(descriptor):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", none_left)
    with pytest.raises(OSError, match="Too many open files") as caught:
        file.read("x")
    assert caught.value.filename == str(tmp_path / "t.safetensors")
