"""Adapters of the supported kinds that cannot be read one way only, or do not belong together, are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedgram import flora_na
from fedgram.bindings.peft import load_adapter, load_adapters, save_adapter
from fedgram.flora_na import Adapter, LoraLayer
from fedgram_testing.peft_adapters import edit_config, llama, mlp, quietly, write_client
from fedgram_testing.peft_kinds import KINDS, Kind, experts, mixtral, write_kind

WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "adapter_model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")

    def make(name):
        if not (root / name).exists():
            write_kind(KINDS[name], root / name)
        return root / name

    return make


@pytest.fixture
def copy(originals, tmp_path):
    def make(name, *, to="c", **config):
        shutil.copytree(originals(name), tmp_path / to)
        edit_config(tmp_path / to, **config)
        return tmp_path / to

    return make


def edit_tensors(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(part):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("lora_bias", "0.lora_B.bias", ": 0: lora_B.bias is missing"),
        ("lora_bias", "lora_B.bias", "lora_bias is declared by the configuration, but no lora_B.bias is there"),
        ("tokens", "token_adapter", "trainable tokens are declared by the configuration, but no"),
        ("experts", "experts.base_layer.lora_A", "experts.base_layer: lora_A.weight is missing"),
        ("embedding", "0.lora_embedding_B", ": 0: lora_embedding_B is missing"),
    ],
)
def test_announced_tensors_must_be_there(copy, name, part, reason):
    folder = copy(name)
    edit_tensors(folder, without(part))
    assert reason in refusal(load_adapter, folder)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("tokens", {"trainable_token_indices": [1]}, "trained token rows (2, 8) do not fit trainable_token_indices"),
        ("tokens", {"trainable_token_indices": {"head": [1, 2]}}, "trained token rows (2, 8) do not fit"),
        ("tokens", {"trainable_token_indices": ["1"]}, "trainable_token_indices: expected lists of indices"),
        ("experts", {"target_parameters": ["mlp.experts.down_proj"]}, "2 adapted parameters, but target_parameters"),
        ("experts", {"target_parameters": ["x.y"]}, "experts: 2 adapted parameters, but target_parameters names 0"),
        ("experts", {"r": 4}, "ranks and alphas [(4, 5.0)] by the patterns, none of which fits the shapes"),
        (
            "experts",
            {"alpha_pattern": {"experts.down_proj": 7}},
            "ranks and alphas [(3, 5.0), (3, 7.0)] by the patterns, and the file does not tell which is which",
        ),
        ("tied embedding", {"alpha_pattern": {"lm_head": 7}}, "lm_head: differs from model.embed_tokens although"),
        ("convolutions", {"rank_pattern": {"two": 2}}, ": two: rank 3 in the file, 2 by r and rank_pattern"),
    ],
)
def test_configurations_that_do_not_fit_the_tensors(copy, name, config, reason):
    assert reason in refusal(load_adapter, copy(name, **config))


def test_comparing_token_tables_with_tensors_is_bounded(copy):
    folder = copy("tokens", trainable_token_indices={f"table{i}": [1, 7] for i in range(2001)})
    rows = {f"base_model.model.m{i}.token_adapter.trainable_tokens_delta": torch.ones(2, 1) for i in range(1000)}
    edit_tensors(folder, lambda tensors: tensors | rows)
    assert "trainable_token_indices: too many entries for 1001 tensors" in refusal(load_adapter, folder)


def test_ranks_that_differ_by_parameter_are_told_by_the_number_of_experts(tmp_path):
    """PEFT's own conversion of Mixtral gives gate_up_proj twice the rank of down_proj; the file does not name them."""
    options = KINDS["experts"].options | {"rank_pattern": {"experts.gate_up_proj": 4, "q_proj": 2}}
    write_kind(Kind(mixtral, options), tmp_path / "c", r=2)
    modules = load_adapter(tmp_path / "c").modules
    ranks = {name: layer.rank for name, layer in modules.items() if name.endswith("[expert 2 of 3]")}
    stem = "model.layers.0.mlp.experts"
    assert ranks == {f"{stem}.base_layer [expert 2 of 3]": 4, f"{stem} [expert 2 of 3]": 2}
    assert modules[f"{stem}.base_layer [expert 0 of 3]"].scaling == 5 / 4
    assert modules[f"{stem} [expert 0 of 3]"].scaling == 5 / 2


def test_the_number_of_experts_is_bounded(copy, monkeypatch):
    """Their number comes from two files of a stranger: rows of lora_A by the rank that the configuration states."""
    monkeypatch.setattr("fedgram.bindings._peft.layers.MAX_EXPERTS", 5)
    assert "makes more than 5 experts of it" in refusal(load_adapter, copy("experts"))


def test_a_head_that_left_its_embedding_is_refused(copy):
    folder = copy("tied embedding")
    edit_tensors(folder, lambda t: t | {k: v + 1 for k, v in t.items() if k.endswith("lm_head.lora_A.weight")})
    assert "lm_head: differs from model.embed_tokens although ensure_weight_tying" in refusal(load_adapter, folder)
    edit_config(folder, ensure_weight_tying=False)
    assert {"lm_head", "model.embed_tokens [embedding]"} <= set(load_adapter(folder).modules)


@pytest.mark.parametrize(
    ("name", "field", "value", "label"),
    [
        ("tokens", "trainable_token_indices", [7, 1], "trainable token indices"),
        ("experts", "target_parameters", ["mlp.experts.down_proj", "experts.gate_up_proj"], "target_parameters"),
        ("DoRA", "use_dora", False, "DoRA"),
    ],
)
def test_clients_whose_updates_cannot_be_added(copy, originals, name, field, value, label):
    other = copy(name, **{field: value})
    if field == "use_dora":
        edit_tensors(other, without("magnitude"))
    message = refusal(load_adapters, [originals(name), other], allow_dora=True)
    assert f"{other}: {label} " in message
    assert "differs from" in message
    adapters = [quietly(load_adapter, path, allow_dora=True) for path in (originals(name), other)]
    for aggregate in (flora_na.aggregate, flora_na.aggregate_for_clients, flora_na.inspect):
        assert refusal(aggregate, adapters, names=[originals(name), other]) == message


def test_experts_of_two_layouts_are_refused(copy, originals):
    old = copy("experts", peft_version="0.18.1")
    message = refusal(load_adapters, [originals("experts"), old])
    assert f"{old}: experts written by PEFT 0.18.1 lie otherwise than those of" in message
    copy("experts", to="d", peft_version="0.19.0")
    load_adapters([originals("experts"), old.parent / "d"])


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("modules_to_save", "num_batches_tracked", "integers cannot be averaged, and must be the same"),
        ("embedding of a language model", "base_layer.weight", "a base tensor that is stored but not trained"),
    ],
)
def test_tensors_that_are_not_averaged_must_be_the_same(copy, originals, name, part, reason):
    other = copy(name)
    edit_tensors(other, lambda tensors: {k: v + 1 if part in k else v for k, v in tensors.items()})
    message = refusal(flora_na.aggregate, load_adapters([originals(name), other]), names=["a", "b"])
    assert part in message
    assert f"b and a differ: {reason}" in message


# Sharded files


def shard(folder: Path, parts: int = 2) -> dict[str, str]:
    """Split an adapter's file as an index lists it; returns the index."""
    tensors = load_file(folder / WEIGHTS)
    index = {}
    for i in range(parts):
        name = f"adapter_model-{i + 1:05}-of-{parts:05}.safetensors"
        mine = {key: tensors[key] for key in sorted(tensors)[i::parts]}
        save_file(mine, folder / name)
        index |= dict.fromkeys(mine, name)
    (folder / WEIGHTS).unlink()
    write_index(folder, index)
    return index


def write_index(folder, index):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_sharded_files_are_read_as_one(copy, originals):
    folder = copy("lora_bias")
    shard(folder, 3)
    whole, parts = load_adapter(originals("lora_bias")), load_adapter(folder)
    assert list(parts.modules) == list(whole.modules)
    for name in whole.modules:
        assert torch.equal(parts.modules[name].delta(), whole.modules[name].delta())
    for key in whole.extras:
        assert torch.equal(parts.extras[key], whole.extras[key])


A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.bias"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: {k: v for k, v in index.items() if k != A}, f"{A}: is in adapter_model-0"),
        (lambda index: index | {"base_model.model.9.lora_A.weight": index[A]}, "9.lora_A.weight: is not in adapter"),
        (lambda index: index | {A: index[B], B: index[A]}, "where the index has it not"),
        (lambda index: index | {A: "../secret.safetensors"}, "expected the name of a safetensors file"),
        (lambda index: index | {A: "/etc/passwd"}, "expected the name of a safetensors file"),
        (lambda index: index | {A: "model.bin"}, "expected the name of a safetensors file"),
        (lambda index: index | {A: 1}, "expected the name of a safetensors file"),
        (lambda index: index | {A: "absent.safetensors"}, "absent.safetensors: no such file"),
        (lambda index: {}, "expected an object 'weight_map'"),
        (lambda index: [1], "expected an object 'weight_map'"),
    ],
)
def test_an_index_that_is_wrong_anywhere_is_refused(copy, change, reason):
    folder = copy("lora_bias")
    write_index(folder, change(shard(folder)))
    assert reason in refusal(load_adapter, folder)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"null"])
def test_a_broken_index_is_refused(copy, text):
    folder = copy("lora_bias")
    shard(folder)
    (folder / INDEX).write_bytes(text)
    assert INDEX in refusal(load_adapter, folder)


# Writing


def layer(m=4, n=6, r=2):
    return LoraLayer(A=torch.ones(r, n), B=torch.ones(m, r))


@pytest.mark.parametrize(
    ("modules", "config", "reason"),
    [
        ({"e [expert 0 of 2]": layer()}, None, "e: 1 layers .* are not one whole module"),
        ({"e [expert 0 of 2]": layer(), "e [expert 1 of 3]": layer()}, None, "e: 2 layers .* are not one whole module"),
        ({"e [expert 2 of 2]": layer()}, None, "there is no expert 2"),
        ({"e": layer(), "e [embedding]": layer()}, None, "e: 2 layers"),
        ({"e [banana]": layer()}, None, "opens the kind of a layer, and this is not one"),
        ({"e [conv 4]": layer()}, None, "6 columns are not a number of channels times 4"),
        ({"e [parameter]": layer()}, None, "e: target_parameters of the configuration names none"),
        (
            {"e [expert 0 of 2]": layer(), "e [expert 1 of 2]": layer(m=5)},
            {"target_parameters": ["e.w"]},
            "differs from .* in dtype or shape",
        ),
        ({"e [embedding tied h]": layer(), "h": layer()}, None, "two layers would be written to it"),
    ],
)
def test_layers_that_are_not_a_whole_file_are_not_written(tmp_path, modules, config, reason):
    with pytest.raises(ValueError, match=reason):
        save_adapter(Adapter(modules, config=config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_and_selections_that_are_no_expressions_are_written_so_that_peft_reads_them(tmp_path):
    """A name with a bracket is no regular expression, and a selection with a back-reference is one we do not run."""
    modules = {"a(0": layer(r=1), "b": layer(), "c": layer()}
    save_adapter(Adapter(modules, config={"target_modules": r"(a|b)\1"}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert [name for name in modules if re.fullmatch(config["target_modules"], name)] == list(modules)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^a\(0": 1}
    assert load_adapter(tmp_path / "out").modules["a(0"].rank == 1


def test_token_rows_need_their_indices(tmp_path):
    extras = {"base_model.model.e.token_adapter.trainable_tokens_delta": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="trained token rows without trainable_token_indices"):
        save_adapter(Adapter({"0": layer()}, extras), tmp_path / "out")


def test_a_parameter_may_be_reached_by_the_end_of_its_name(tmp_path):
    options = {"target_modules": [], "target_parameters": ["flat"]}
    write_client(tmp_path / "c", experts(), r=2, **options)
    assert list(load_adapter(tmp_path / "c").modules) == ["moe [parameter]"]


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
        *("backbone.embeddings.weight", "proj_out.weight"),
    ],
)
def test_full_weights_of_embeddings_are_taken_as_frozen(tmp_path, name):
    """PEFT stores resized embeddings beside an adapter: those of Llama, BERT, Mamba and Whisper."""
    write_client(tmp_path / "c", llama(), r=2, target_modules=["q_proj"])
    edit_tensors(tmp_path / "c", lambda tensors: tensors | {f"base_model.model.{name}": torch.ones(41)})
    assert load_adapter(tmp_path / "c").roles == {f"base_model.model.{name}": "frozen"}


@pytest.mark.parametrize(
    "name", ["2.weight", "decoder.weight", "model.embeddings.weight", "my_lm_head.weight", "wte.token_adapter.weight"]
)
def test_any_other_undeclared_tensor_is_unknown(tmp_path, name):
    write_client(tmp_path / "d", mlp(), r=2, target_modules=["0"])
    edit_tensors(tmp_path / "d", lambda tensors: tensors | {f"base_model.model.{name}": torch.ones(2)})
    assert f"{name}: unknown tensor" in refusal(load_adapter, tmp_path / "d")
