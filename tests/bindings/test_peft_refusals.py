"""Everything that is not plain LoRA of linear layers, and every broken file, is refused in one line that says what."""

import dataclasses
import pickle
import shutil

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn

from fedgram.bindings._peft.config import HARMLESS, IN_FILES, REFUSED
from fedgram.bindings.peft import load_adapter
from fedgram_testing.peft_adapters import bert, edit_config, llama, mlp, quietly, write_client

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = tmp_path_factory.mktemp("clients") / "good"
    write_client(path, mlp(), target_modules=["0", "2"], modules_to_save=["3"], r=2)
    return path


@pytest.fixture
def folder(client, tmp_path):
    """A fresh copy of a good adapter, to be damaged."""
    shutil.copytree(client, tmp_path / "c")
    return tmp_path / "c"


def edit_tensors(folder, add=None, drop=()):
    tensors = load_file(folder / WEIGHTS) | (add or {})
    save_file({key: value for key, value in tensors.items() if key not in drop}, folder / WEIGHTS)


def refusal(folder) -> str:
    with pytest.raises(ValueError, match=str(folder)) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS = {
    "DoRA": (mlp, {"target_modules": ["0"], "use_dora": True}, "every module: DoRA is not supported (use_dora is set)"),
    "grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)),
        {"target_modules": ["0"]},
        ": 0: LoRA of a convolution of 2 groups is not supported",
    ),
    "depthwise convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, groups=2)),
        {"target_modules": ["0"]},
        ": 0: LoRA of a convolution of 2 groups is not supported",
    ),
    "mica": (mlp, {"target_modules": ["0"], "init_lora_weights": "mica"}, "init_lora_weights='mica' is not supported"),
    "pissa": (mlp, {"target_modules": ["0"], "init_lora_weights": "pissa"}, "='pissa' is not supported without"),
    "pissa_niter": (
        mlp,
        {"target_modules": ["0"], "init_lora_weights": "pissa_niter_4"},
        "init_lora_weights='pissa_niter_4' is not",
    ),
    "olora": (mlp, {"target_modules": ["0"], "init_lora_weights": "olora"}, "init_lora_weights='olora' is not"),
    "alora": (
        llama,
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "alora_invocation_tokens": [3]},
        "every module: aLoRA is not supported (alora_invocation_tokens is set)",
    ),
}


@pytest.mark.parametrize(("base", "options", "reason"), KINDS.values(), ids=KINDS)
def test_other_kinds_of_lora_written_by_peft_are_refused_by_name(tmp_path, base, options, reason):
    quietly(write_client, tmp_path / "c", base(), r=2, **options)
    assert reason in refusal(tmp_path / "c")


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(target_modules=["query"]),
        IA3Config(target_modules=["query"], feedforward_modules=[]),
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_other_methods_of_peft_are_refused_by_name(tmp_path, config):
    quietly(lambda: get_peft_model(bert(), config).save_pretrained(str(tmp_path)))
    assert f"peft_type '{config.peft_type.value}' is not supported" in refusal(tmp_path)


@pytest.mark.parametrize("option", sorted(REFUSED.keys() - IN_FILES))
def test_every_refused_option_is_named(folder, option):
    edit_config(folder, **{option: [1]})
    assert f"{REFUSED[option]} is not supported ({option} is set)" in refusal(folder)


INITS = ["PiSSA", "pissa_niter_4", "OLoRA", "corda", "lora_ga", "loftq", "mica", "tomorrow's", 1, 0.5, []]


@pytest.mark.parametrize("init", INITS)
def test_initialisations_that_are_not_known_to_keep_the_base_weights_are_refused(folder, init):
    edit_config(folder, init_lora_weights=init)
    assert f"init_lora_weights={init!r} is not supported" in refusal(folder)


def test_every_option_of_the_installed_peft_is_classified():
    """A new option in PEFT fails here first; in a file it is refused only where it is set."""
    options = {field.name for field in dataclasses.fields(LoraConfig)}
    assert options - HARMLESS - REFUSED.keys() == set()


def test_an_option_that_nobody_knows_is_refused_only_where_it_is_set(folder):
    edit_config(folder, use_future_lora=False, future_config=None)
    load_adapter(folder)
    edit_config(folder, use_future_lora=True)
    assert "option 'use_future_lora' is set and not known here" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model.0.lora_magnitude_vector", ": 0: DoRA is not declared by the configuration"),
        ("base_model.model.0.lora_B.bias", ": 0: lora_bias is not declared by the configuration"),
        ("base_model.model.0.token_adapter.trainable_tokens_delta", ": 0: trainable tokens are not declared"),
        ("base_model.model.0 [conv 3].lora_A.weight", "names that hold ' [' are not supported"),
        ("base_model.model.0.lora_embedding_A", ": 0: has factors of an embedding and of a linear map"),
        ("base_model.model.5.lora_embedding_A", ": 5: lora_embedding_B is missing"),
        ("base_model.model.0.lora_diag", ": 0: KaSA"),
        ("base_model.model.0.lora_E", ": 0: AdaLoRA"),
        ("base_model.model.0.lora_A.default.weight", ": 0: unknown kind of LoRA tensor 'lora_A.default.weight'"),
        ("base_model.model.0.lora_C.weight", ": 0: unknown kind of LoRA tensor"),
        ("base_model.model.0.weight", "unknown tensor: neither"),
        ("base_model.model.0.bias", "unknown tensor: neither"),
        ("0.lora_A.weight", "unknown tensor: names of PEFT start with"),
        ("base_model.model.9.lora_A.weight", ": 9: lora_B.weight is missing"),
        ("base_model.model.9.lora_B.weight", ": 9: lora_A.weight is missing"),
    ],
)
def test_a_tensor_that_does_not_belong_is_refused(folder, name, reason):
    edit_tensors(folder, add={name: torch.ones(2, 2)})
    assert reason in refusal(folder)


def test_wrappers_without_target_parameters_are_refused(folder):
    add = {f"base_model.model.e.base_layer.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    edit_tensors(folder, add=add)
    assert ": e: 1 adapted parameters, but target_parameters names 0" in refusal(folder)
    edit_tensors(folder, add={key.replace("base_layer", "base_layer.x"): value for key, value in add.items()}, drop=add)
    assert ": e.base_layer.x: a layer inside a wrapper of this kind" in refusal(folder)


@pytest.mark.parametrize(
    ("A", "B", "reason"),
    [
        (torch.ones(3, 6), torch.ones(7, 3), ": 0: rank 3 in the file, 2 by r and rank_pattern"),
        (torch.ones(2, 6), torch.ones(7, 3), ": 0: lora_B (7, 3) and lora_A (2, 6) do not multiply"),
        (torch.ones(0, 6), torch.ones(7, 0), ": 0: lora_B (7, 0) and lora_A (0, 6) do not multiply"),
        (torch.ones(2), torch.ones(7, 2), "LoRA of this shape is not supported"),
        (torch.ones(2, 6).half(), torch.ones(7, 2), ": 0: lora_A is F16 and lora_B is F32"),
        (torch.ones(2, 6).int(), torch.ones(7, 2).int(), ": 0: lora_A is I32 and lora_B is I32"),
        (torch.ones(2, 6).to(torch.float8_e4m3fn), torch.ones(7, 2), "dtype F8_E4M3 is not supported"),
        (torch.ones(2, 6, dtype=torch.bool), torch.ones(7, 2), "dtype BOOL is not supported"),
    ],
)
def test_factors_that_do_not_fit_are_refused(folder, A, B, reason):
    edit_tensors(folder, add={"base_model.model.0.lora_A.weight": A, "base_model.model.0.lora_B.weight": B})
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("r", 0, "r: expected a positive integer, got 0"),
        ("r", 2.0, "r: expected a positive integer, got 2.0"),
        ("r", True, "r: expected a positive integer, got True"),
        ("r", "2", "r: expected a positive integer, got '2'"),
        ("r", 10**30, "rank 2 in the file, 1000000000000000000000000000000 by r"),
        ("lora_alpha", "8", "lora_alpha: expected a finite number, got '8'"),
        ("lora_alpha", float("nan"), "lora_alpha: expected a finite number, got nan"),
        ("lora_alpha", float("inf"), "lora_alpha: expected a finite number, got inf"),
        ("lora_alpha", 10**400, "lora_alpha: expected a finite number"),
        ("lora_alpha", None, "lora_alpha: expected a finite number, got None"),
        ("use_rslora", "yes", "use_rslora: expected true or false, got 'yes'"),
        ("rank_pattern", ["0"], "rank_pattern: expected an object, got ['0']"),
        ("rank_pattern", {"0": 3}, ": 0: rank 2 in the file, 3 by r and rank_pattern"),
        ("rank_pattern", {"(": 3}, "rank_pattern: '(' is not a regular expression"),
        ("alpha_pattern", {"0": []}, "alpha_pattern['0']: expected a finite number, got []"),
        ("alpha_pattern", {"a{5,2}": 1}, "alpha_pattern: 'a{5,2}' is not a regular expression"),
        ("bias", "some", "bias: expected none, all or lora_only, got 'some'"),
        ("modules_to_save", "3", "modules_to_save: expected a list of names, got '3'"),
        ("modules_to_save", [3], "modules_to_save: expected a list of names, got [3]"),
        ("modules_to_save", None, "3.bias: unknown tensor"),
        ("peft_type", None, "peft_type None is not supported: only 'LORA' is"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(folder, field, value, reason):
    edit_config(folder, **{field: value})
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_json_is_refused(folder, text, reason):
    (folder / CONFIG).write_bytes(text)
    assert reason in refusal(folder)


def test_a_truncated_file_is_refused_at_every_length(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        assert "not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize("content", [b"hello" * 9, b"\0" * 64, b"\xff" * 64, pickle.dumps({"a": 1})])
def test_a_foreign_file_is_refused(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    assert "not a whole safetensors file" in refusal(folder)


def test_a_file_without_lora_factors_is_refused(folder):
    save_file({"base_model.model.3.weight": torch.ones(2)}, folder / WEIGHTS)
    assert "holds no LoRA factors" in refusal(folder)


def test_pickles_are_refused_and_never_opened(folder):
    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemError('unpickled')",)

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "adapter_model.bin: a pickle, which is never opened" in refusal(folder)


def test_missing_things_are_named(folder, tmp_path):
    assert refusal(tmp_path / "nowhere").endswith("no such directory")
    assert refusal(folder / CONFIG).endswith("not a directory")
    (folder / WEIGHTS).unlink()
    assert refusal(folder).endswith(f"no {WEIGHTS}")
    (folder / WEIGHTS).mkdir()
    assert refusal(folder).endswith("not a regular file")
    (folder / CONFIG).unlink()
    assert f"not an adapter of PEFT: no {CONFIG}" in refusal(folder)
