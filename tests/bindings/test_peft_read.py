"""The reader against PEFT: the delta weights, the scalings and the extra tensors are those that PEFT itself has."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from fedgram.bindings.peft import check_compatible, load_adapter, load_adapters
from fedgram.flora_na import Adapter
from fedgram_testing.peft_adapters import bert, gpt2, llama, mlp, peft_deltas, write_client

OPTIONS = {
    "alpha over r": {"target_modules": ["0", "2"], "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": ["0", "2"], "r": 3, "lora_alpha": 5, "use_rslora": True},
    "rank pattern": {"target_modules": ["0", "2"], "r": 3, "lora_alpha": 5, "rank_pattern": {"2": 2}},
    "alpha pattern": {"target_modules": ["0", "2"], "r": 3, "lora_alpha": 5, "alpha_pattern": {"[0-1]": 7}},
    "both, rslora": {
        "target_modules": ["0", "2"],
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"^0": 1, "2": 5},
        "alpha_pattern": {"0": 3},
    },
    "targets by regex": {"target_modules": "[02]", "r": 2, "lora_alpha": 8},
    "orthogonal": {"target_modules": ["0"], "r": 2, "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": ["0"], "r": 2, "init_lora_weights": "gaussian"},
    "random": {"target_modules": ["0"], "r": 2, "init_lora_weights": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_delta_weights_are_those_of_peft(tmp_path, options):
    model = write_client(tmp_path, mlp(), **options)
    expected = peft_deltas(model)
    adapter = load_adapter(tmp_path)
    assert set(adapter.modules) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(adapter.modules[name].delta(), delta)


def test_transposed_weights_have_the_same_factors(tmp_path):
    """GPT-2's Conv1D: PEFT's delta is that of the stored, transposed weight; B A is the update of the linear map."""
    model = write_client(tmp_path, gpt2(), target_modules=["c_attn", "c_fc"], r=3, lora_alpha=5, fan_in_fan_out=True)
    adapter, expected = load_adapter(tmp_path), peft_deltas(model)
    assert set(adapter.modules) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(adapter.modules[name].delta(), delta.T)


def test_patterns_match_as_peft_matches_them_on_dotted_names(tmp_path):
    """Ends of names, regular expressions, and a pattern that must not match inside a name."""
    patterns = {"layers.0.self_attn.q_proj": 2, r"model\.layers\.\d+\.self_attn\.k_proj": 3, "attn.v_proj": 9}
    alphas = {"layers.0.self_attn.(q|k)_proj": 5, r"layers\.1\..*": 11}
    model = write_client(
        tmp_path,
        llama(),
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=4,
        lora_alpha=6,
        rank_pattern=patterns,
        alpha_pattern=alphas,
    )
    adapter = load_adapter(tmp_path)
    expected = peft_deltas(model)
    assert set(adapter.modules) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(adapter.modules[name].delta(), delta)
    q, k, v = (adapter.modules[f"model.layers.0.self_attn.{x}_proj"] for x in "qkv")
    assert (q.rank, k.rank, v.rank) == (2, 3, 4)  # "attn.v_proj" is not an end of the name after a dot
    assert (q.scaling, k.scaling, v.scaling) == (5 / 2, 5 / 3, 6 / 4)
    assert adapter.modules["model.layers.1.mlp.up_proj"].scaling == 11 / 4


def test_overlapping_alpha_patterns_are_refused_because_peft_does_not_keep_their_order(tmp_path):
    """In memory the first entry counts (alpha 5); PEFT writes them sorted, and would read the file with alpha 3."""
    model = write_client(tmp_path, mlp(), target_modules=["0", "2"], r=2, alpha_pattern={"0": 5, "(0|1)": 3})
    assert model.base_model.model[0].lora_alpha["default"] == 5
    with pytest.raises(ValueError, match=r"adapter_config.json: 0: several entries of alpha_pattern .*\[3.0, 5.0\]"):
        load_adapter(tmp_path)


def test_overlapping_rank_patterns_are_settled_by_the_shapes(tmp_path):
    """PEFT itself cannot load this file: sorted, the pattern of rank 3 comes first."""
    model = write_client(tmp_path, mlp(), target_modules=["0", "2"], r=2, rank_pattern={"0": 5, "(0|1)": 3})
    for name, delta in peft_deltas(model).items():
        torch.testing.assert_close(load_adapter(tmp_path).modules[name].delta(), delta)


def test_rslora_scaling_uses_the_rank_of_the_module(tmp_path):
    write_client(tmp_path, mlp(), target_modules=["0", "2"], r=4, lora_alpha=6, use_rslora=True, rank_pattern={"2": 2})
    modules = load_adapter(tmp_path).modules
    assert modules["0"].scaling == 6 / math.sqrt(4)
    assert modules["2"].scaling == 6 / math.sqrt(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_come_in_the_dtype_of_the_file_bit_for_bit(tmp_path, dtype):
    write_client(tmp_path, mlp(), target_modules=["0"], r=3, dtype=dtype)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    layer = load_adapter(tmp_path).modules["0"]
    assert layer.A.dtype == dtype
    assert torch.equal(layer.A, stored["base_model.model.0.lora_A.weight"])
    assert torch.equal(layer.B, stored["base_model.model.0.lora_B.weight"])


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_saved_modules_and_biases_are_extras_under_their_file_names(tmp_path, bias):
    write_client(tmp_path, bert(), task_type="SEQ_CLS", target_modules=["query", "value"], r=2, bias=bias)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    adapter = load_adapter(tmp_path)
    assert set(adapter.extras) == {key for key in stored if ".lora_" not in key}
    assert "base_model.model.classifier.weight" in adapter.extras
    assert ("base_model.model.bert.pooler.dense.bias" in adapter.extras) == (bias == "all")
    for key, tensor in adapter.extras.items():
        assert torch.equal(tensor, stored[key])


def test_saved_module_of_a_plain_model(tmp_path):
    write_client(tmp_path, mlp(), target_modules=["0"], modules_to_save=["3"], r=2)
    assert set(load_adapter(tmp_path).extras) == {"base_model.model.3.weight", "base_model.model.3.bias"}


def test_layers_are_read_when_asked_for_and_not_kept(tmp_path):
    write_client(tmp_path, mlp(), target_modules=["0", "2"], r=2)
    adapter = load_adapter(tmp_path)
    assert adapter.modules["0"].A is not adapter.modules["0"].A
    with pytest.raises(KeyError):
        adapter.modules["1"]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="changed while it was being read"):
        adapter.modules["0"]


def test_adapters_in_subdirectories_are_read_by_name(tmp_path):
    write_client(tmp_path / "x", mlp(), target_modules=["0"], r=2)
    assert load_adapter(tmp_path, "x").modules["0"].rank == 2
    with pytest.raises(ValueError, match="holds the adapters x: name one"):
        load_adapter(tmp_path)
    with pytest.raises(ValueError, match="no adapter 'y'"):
        load_adapter(tmp_path, "y")
    for trick in ("..", "../x", "/etc", ""):
        with pytest.raises(ValueError, match="adapter_name"):
            load_adapter(tmp_path / "x", trick)


def test_a_byte_order_mark_before_the_configuration_is_passed_over(tmp_path):
    write_client(tmp_path / "c", mlp(), target_modules=["0"], r=3)
    config = tmp_path / "c" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_adapter(tmp_path / "c").config == json.loads(config.read_text(encoding="utf-8-sig"))


def test_clients_of_one_model_are_opened_together(tmp_path):
    for i in range(3):
        write_client(tmp_path / f"c{i}", mlp(), target_modules=["0"], r=i + 1, seed=i)
    adapters = load_adapters([tmp_path / f"c{i}" for i in range(3)])
    assert [a.modules["0"].rank for a in adapters] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"c0: given twice"):
        load_adapters([tmp_path / "c0", tmp_path / "c1", tmp_path / "c1" / ".." / "c0"])
    with pytest.raises(ValueError, match=r"c0: given twice"):
        load_adapters([tmp_path / "c0"] * 2)
    with pytest.raises(ValueError, match="no adapter directories"):
        load_adapters([])


@pytest.mark.parametrize(
    ("field", "value", "label"),
    [
        ("base_model_name_or_path", "other/model", "base model"),
        ("task_type", "CAUSAL_LM", "task type"),
        ("peft_type", "LOHA", "peft type"),
        ("layer_replication", [[0, 2]], "layer replication"),
    ],
)
def test_clients_that_do_not_belong_together_are_refused(field, value, label):
    config = {"base_model_name_or_path": "a/model", "task_type": None, "peft_type": "LORA"}
    clients = [Adapter({}, config=config), Adapter({}), Adapter({}, config={**config, field: value})]
    with pytest.raises(ValueError, match=f"third: {label} .* differs from .* of first"):
        check_compatible(clients, ["first", "second", "third"])
    check_compatible(clients[:2])
