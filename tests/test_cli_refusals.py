"""Bad input on the command line: exit code 1 and one line that names file, module and reason; usage is code 2."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedgram import flora_na
from fedgram.bindings.peft import load_adapter
from fedgram.bindings.streaming import aggregate_directories
from fedgram.flora_na import streamed
from fedgram_testing.cli_clients import CONFIG, WEIGHTS, clients, deltas, refused, run
from fedgram_testing.peft_adapters import bert, load_with_peft

__all__ = ["clients", "deltas"]  # fixtures


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["aggregate"],
        ["aggregate", "x"],
        ["inspect"],
        ["aggregate", "x", "-o", "y", "--method", "average"],
        ["aggregate", "x", "-o", "y", "--rank", "0"],
        ["aggregate", "x", "-o", "y", "--rank", "two"],
        ["aggregate", "x", "-o", "y", "--backend", "cuda"],
        ["aggregate", "x", "-o", "y", "--unknown"],
        ["collect"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments):
    assert run(*arguments).exit_code == 2


def poison(folder, value):
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"
    tensors[key][0, 0] = value
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_name_the_client_the_module_and_the_factor(clients, tmp_path, value):
    poison(clients[1], value)
    for command in (("aggregate", *clients, "-o", tmp_path / "out"), ("inspect", *clients)):
        line = refused(*command)
        assert str(clients[1]) in line
        assert "bert.encoder.layer.1.attention.self.value" in line
        assert "lora_B" in line
    assert not (tmp_path / "out").exists()


def drop(folder, part):
    tensors = load_file(folder / WEIGHTS)
    save_file({key: value for key, value in tensors.items() if part not in key}, folder / WEIGHTS)


def test_a_missing_module_is_named_or_handled_as_told(clients, tmp_path):
    drop(clients[2], "layer.0.attention.self.query")
    line = refused("aggregate", *clients, "-o", tmp_path / "out")
    assert "bert.encoder.layer.0.attention.self.query" in line
    assert str(clients[2]) in line
    assert line.endswith("choose missing='renormalize' or 'zero' (--missing) to go on")
    for policy in ("renormalize", "zero"):
        result = run("aggregate", *clients, "-o", tmp_path / policy, "--missing", policy)
        assert result.exit_code == 0, result.output
        load_with_peft(bert(), tmp_path / policy)


def test_a_missing_head_names_the_client_and_the_tensor(clients, tmp_path):
    drop(clients[0], "classifier.bias")
    line = refused("aggregate", *clients, "-o", tmp_path / "out")
    assert str(clients[0]) in line
    assert "base_model.model.classifier.bias" in line


def test_shapes_that_differ_name_the_client_and_the_module(clients, tmp_path):
    tensors = load_file(clients[2] / WEIGHTS)
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    save_file(tensors | {key: torch.ones(4, 17)}, clients[2] / WEIGHTS)
    line = refused("aggregate", *clients, "-o", tmp_path / "out")
    assert str(clients[2]) in line
    assert "bert.encoder.layer.0.attention.self.query" in line


def test_broken_files_are_named(clients, tmp_path):
    whole = (clients[1] / WEIGHTS).read_bytes()
    (clients[1] / WEIGHTS).write_bytes(whole[:-1])
    assert f"{clients[1] / WEIGHTS}: not a whole safetensors file" in refused("inspect", *clients)
    (clients[1] / WEIGHTS).write_bytes(b"")
    assert f"{clients[1] / WEIGHTS}: not a whole safetensors file" in refused("inspect", *clients)
    (clients[1] / CONFIG).write_text("{")
    assert f"{clients[1] / CONFIG}: not valid JSON" in refused("inspect", *clients)


def test_clients_of_another_base_model_are_refused(clients, tmp_path):
    config = json.loads((clients[1] / CONFIG).read_text()) | {"base_model_name_or_path": "another/model"}
    (clients[1] / CONFIG).write_text(json.dumps(config))
    line = refused("aggregate", *clients, "-o", tmp_path / "out")
    assert f"{clients[1]}: base model 'another/model' differs from None of {clients[0]}" in line


@pytest.mark.parametrize("option", ["--anchor", "--align-to", "--init"])
@pytest.mark.parametrize(
    ("field", "label"), [("base_model_name_or_path", "base model"), ("revision", "base model revision")]
)
def test_earlier_adapters_of_another_base_model_are_refused(clients, tmp_path, option, field, label):
    earlier = shutil.copytree(clients[0], tmp_path / "earlier")
    for folder in (*clients, earlier):
        config = json.loads((folder / CONFIG).read_text()) | {field: "another" if folder == earlier else "this"}
        (folder / CONFIG).write_text(json.dumps(config))
    reason = f"{earlier}: {label} 'another' differs from 'this' of {clients[0]}"
    if option == "--init":
        reason = f"{clients[0]}: {label} 'this' differs from 'another' of the initial adapter (init)"
    assert reason in refused("aggregate", *clients, "-o", tmp_path / "out", option, earlier)


def test_an_anchor_with_modules_that_no_client_has_is_refused_or_cut(clients, tmp_path):
    module = "bert.encoder.layer.0.attention.self.query"
    last = shutil.copytree(clients[0], tmp_path / "last")
    for client in clients:
        drop(client, module)
    options = ("-o", tmp_path / "out", "--method", "flora-na", "--rank", "2")
    line = refused("aggregate", *clients, *options, "--anchor", last)
    assert line.startswith(f"fedgram: {last}: {module}: no client has this module")
    with pytest.raises(ValueError, match="no client has this module"):
        aggregate_directories(clients, tmp_path / "out", method="flora-na", rank=2, anchor=last)
    assert not (tmp_path / "out").exists()
    for more in (("--anchor", last, "--missing", "zero"), ("--align-to", last, "--method", "svd")):
        result = run("aggregate", *clients, *options, *more)
        assert result.exit_code == 0, result.output
        assert module not in load_adapter(tmp_path / "out").modules


def test_names_in_files_cannot_break_the_line_or_the_terminal(clients):
    tensors = load_file(clients[0] / WEIGHTS) | {"base_model.model.a\nb\x1b[31m.lora_X": torch.ones(1)}
    save_file(tensors, clients[0] / WEIGHTS)
    line = refused("inspect", *clients)
    assert "a b\\x1b[31m: unknown kind of LoRA tensor" in line


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ('{"c0": 1, "c1": 2}', "no weight for client 'c2'"),
        ('{"c0": 1, "c1": 2, "c2": 3, "c9": 4}', "'c9' is not the directory of a client"),
        ('{"c0": 1, "c1": 2, "c2": -3}', "client 'c2': expected a number of at least 0, got -3"),
        ('{"c0": 1, "c1": 2, "c2": "3"}', "client 'c2': expected a number of at least 0, got '3'"),
        ("[1, 2]", "2 weights for 3 clients"),
        (f"[1, 2, 3{'0' * 400}]", "client 'c2': expected a number of at least 0, got 300"),
        ("[1, 2, NaN]", "client 'c2': expected a number of at least 0, got nan"),
        ("[0, 0, 0]", "w.json: weights: all are zero"),
        ('{"c0": 1, "c1": 2, "c1/": 2, "c2": 3}', "'c1' and 'c1/' are the same client"),
        ('{"c0": 1, "c1": 2, "\\u0000": 3}', r"'\x00' is not the directory of a client"),
        ("[" * 40 + "]" * 40, "not valid JSON here (nested more than 32 deep)"),
        ("3", "expected an object from directory name to number, or a list"),
        ("[1, 2", "not valid JSON"),
    ],
)
def test_weights_that_do_not_fit_are_refused(clients, tmp_path, document, reason):
    (tmp_path / "w.json").write_text(document)
    assert reason in refused("aggregate", *clients, "-o", tmp_path / "out", "--weights", tmp_path / "w.json")


def test_a_weights_file_that_is_not_there_is_named(clients, tmp_path):
    line = refused("inspect", *clients, "--weights", tmp_path / "w.json")
    assert line == f"fedgram: {tmp_path / 'w.json'}: No such file or directory"


def test_clients_of_one_name_are_told_apart_by_path(clients, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree("c0", "other/c0")
    (tmp_path / "w.json").write_text('{"c0": 1, "other/c0": 3}')
    document = json.loads(run("inspect", "c0", "other/c0", "--weights", "w.json", "--json").stdout)
    assert [client["weight"] for client in document["clients"].values()] == [0.25, 0.75]
    (tmp_path / "x").mkdir()
    (tmp_path / "c0").rename(tmp_path / "x" / "c0")
    (tmp_path / "w.json").write_text('{"c0": 1}')
    line = refused("inspect", "x/c0", "other/c0", "--weights", "w.json")
    assert line == "fedgram: w.json: 'c0' is the name of x/c0 and other/c0: give their paths"


def test_weights_may_be_written_with_any_form_of_a_path(clients, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = json.dumps({"c0/": 1, str(tmp_path / "c1"): 2, "./c1/../c2/": 5})
    (tmp_path / "w.json").write_text(text, encoding="utf-8-sig")  # with a byte order mark, as some editors write it
    result = run("inspect", "c0", "./c1/", clients[2], "--weights", "w.json", "--json")
    assert [client["weight"] for client in json.loads(result.stdout)["clients"].values()] == [0.125, 0.25, 0.625]


def test_outputs_that_cannot_be_written_are_refused_before_the_work(clients, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "file: not a directory" in refused("aggregate", *clients, "-o", tmp_path / "file")
    for below in ("below", "further/below"):
        line = refused("aggregate", *clients, "-o", tmp_path / "file" / below)
        assert line.startswith(f"fedgram: {tmp_path / 'file'}")
        assert line.endswith(": Not a directory")
    assert "holds 'notes.txt'" in refused("aggregate", *clients, "-o", tmp_path / "full")
    assert "is one of the clients' directories" in refused("aggregate", *clients, "-o", clients[0])
    out = tmp_path / "out"
    assert "one output lies in the other" in refused("aggregate", *clients, "-o", out, "--residual", out / "rest")
    assert "one output lies in the other" in refused("aggregate", *clients, "-o", out, "--residual", out)
    assert "No such file or directory" in refused("aggregate", *clients, "-o", "/proc/nowhere/out")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--rank", "1025", "--method", "svd"), "query: rank 1025 of a 16 x 16 matrix: at most 1024 is read"),
        (("--rank", "1020", "--method", "svd", "--residual", "rest"), "query (residual): rank 1029 of a 16 x 16"),
    ],
)
def test_ranks_that_nobody_reads_again_are_refused(clients, tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    assert reason in refused("aggregate", *clients, "-o", "out", *options)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in clients}


def test_a_refusal_leaves_the_previous_output(clients, tmp_path):
    run("aggregate", *clients, "-o", tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    poison(clients[0], float("nan"))
    refused("aggregate", *clients, "-o", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available() or "TRITON_INTERPRET" not in os.environ, reason="a GPU can run it")
def test_a_backend_that_cannot_run_says_why(deltas, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    line = refused("aggregate", *sorted(deltas[0].iterdir()), "-o", tmp_path / "out", "--backend", "triton")
    assert "backend='triton'" in line


def unmade(size):
    raise MemoryError


@pytest.mark.parametrize(
    ("allocate", "reason"), [(torch.empty, "DefaultCPUAllocator: "), (unmade, "")], ids=["torch", "python"]
)
def test_memory_that_is_not_there_ends_in_one_line(clients, tmp_path, monkeypatch, allocate, reason):
    monkeypatch.setattr(streamed, "aggregate_cohort", lambda *_, **__: allocate(1 << 58))
    monkeypatch.setattr(flora_na, "inspect", lambda *_, **__: allocate(1 << 58))
    for command in (("aggregate", *clients, "-o", tmp_path / "out"), ("inspect", *clients)):
        line = refused(*command)
        assert line.startswith("fedgram: out of memory")
        assert reason in line
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_faults_keep_their_traceback(clients, monkeypatch):
    monkeypatch.setattr(flora_na, "inspect", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    assert isinstance(run("inspect", *clients).exception, RuntimeError)
