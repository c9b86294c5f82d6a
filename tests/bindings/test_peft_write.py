"""The writer against PEFT: what it writes, ``PeftModel.from_pretrained`` loads without a warning, update for update."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModelForSequenceClassification
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fedgram import flora_na
from fedgram.bindings.peft import load_adapter, load_adapters, merge_configs, save_adapter
from fedgram.flora_na import Adapter, LoraLayer
from fedgram_testing.peft_adapters import bert, llama, load_with_peft, mlp, peft_deltas, quietly, write_client

HARD = {
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "rank_pattern": {r"layers\.1\..*": 3, "layers.0.self_attn.v_proj": 1},
    "alpha_pattern": {"self_attn.q_proj": 11, "mlp.down_proj": 1},
}


def layer(m, n, r, scaling=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    return LoraLayer(A=A.to(dtype), B=B.to(dtype), scaling=scaling)


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


def assert_same_update(path, base, expected):
    """PEFT, on the written directory, computes ``expected`` for every module."""
    deltas = peft_deltas(load_with_peft(base, path))
    assert set(deltas) == set(expected)
    for name, delta in expected.items():
        # One more rounding (the scaling into lora_B) per factor entry: r products of relative error 2^-24 each.
        torch.testing.assert_close(deltas[name], delta, rtol=1e-5, atol=1e-6)


def test_round_trip_keeps_every_delta_weight(tmp_path):
    client = write_client(tmp_path / "in", llama(), task_type="CAUSAL_LM", target_modules="all-linear", **HARD)
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    assert_same_update(tmp_path / "out", llama(), peft_deltas(client))
    again = load_adapter(tmp_path / "out")
    assert all(again.modules[name].scaling == 1 for name in again.modules)


def test_scalings_become_one_and_patterns_are_fresh(tmp_path):
    write_client(tmp_path / "in", llama(), task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **HARD)
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["use_rslora"] is False
    assert config["r"] == config["lora_alpha"] == 3  # the commonest rank: q and v of layer 1
    expected = {"model.layers.0.self_attn.q_proj": 4, "model.layers.0.self_attn.v_proj": 1}
    assert config["rank_pattern"] == config["alpha_pattern"] == expected
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_saved_modules_and_biases_come_back(tmp_path, bias):
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2, "bias": bias}
    client = write_client(tmp_path / "in", bert(), **options)
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    loaded = load_with_peft(bert(), tmp_path / "out")
    assert isinstance(loaded, PeftModelForSequenceClassification)
    expected, actual = client.state_dict(), loaded.state_dict()
    changed = [key for key in expected if "modules_to_save" in key or (bias == "all" and key.endswith(".bias"))]
    assert any("classifier" in key for key in changed)
    for key in changed:
        torch.testing.assert_close(actual[key], expected[key], rtol=0, atol=0)
    if bias == "lora_only":
        key = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias"
        assert torch.equal(actual[key], expected[key])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_without_configuration_the_modules_are_targeted_by_name(tmp_path, dtype):
    modules = {"0": layer(7, 6, 3, 0.5, dtype=dtype), "2": layer(5, 7, 2, 4.0, dtype=dtype)}
    save_adapter(Adapter(modules), tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["0", "2"]
    back = load_adapter(tmp_path / "out")
    for name in modules:  # powers of two: the scaling is multiplied in without rounding
        assert back.modules[name].A.dtype == dtype
        assert torch.equal(back.modules[name].delta(), modules[name].delta())
    load_with_peft(mlp(), tmp_path / "out")


def test_extras_without_configuration_become_saved_modules(tmp_path):
    extras = {"base_model.model.3.weight": torch.ones(3, 5), "base_model.model.3.bias": torch.ones(3)}
    save_adapter(Adapter({"0": layer(7, 6, 2)}, extras), tmp_path / "out")
    loaded = load_with_peft(mlp(), tmp_path / "out")
    assert bool((loaded.base_model.model[3].modules_to_save["default"].weight == 1).all())


def test_declared_tensors_that_are_not_there_are_not_declared_any_more(tmp_path):
    """A factored residual carries no head; PEFT raises KeyError on a head that is declared and missing."""
    write_client(tmp_path / "in", mlp(), target_modules=["0"], modules_to_save=["3"], bias="lora_only", r=2)
    adapter = load_adapter(tmp_path / "in")
    save_adapter(Adapter(adapter.modules, {}, adapter.config), tmp_path / "out")
    assert config_of(tmp_path / "out")["modules_to_save"] is None
    assert config_of(tmp_path / "out")["bias"] == "none"
    load_with_peft(mlp(), tmp_path / "out")


def test_a_plain_mapping_is_an_adapter(tmp_path):
    modules = {"0": layer(7, 6, 2)}
    save_adapter(modules, tmp_path / "out")
    assert_same_update(tmp_path / "out", mlp(), {"0": modules["0"].delta()})


def test_the_configuration_of_a_peft_model_is_one(tmp_path):
    """``LoraConfig.to_dict`` has sets."""
    extras = {"base_model.model.3.weight": torch.ones(4, 5)}
    config = LoraConfig(target_modules=["0", "2"], modules_to_save=["3"]).to_dict()
    save_adapter(Adapter({"0": layer(7, 6, 2)}, extras), tmp_path / "out", config=config)
    assert config_of(tmp_path / "out")["target_modules"] == ["0", "2"]
    assert config_of(tmp_path / "out")["modules_to_save"] == ["3"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"auto_mapping": [torch.half]}, r"config: cannot be written as JSON \(dtype is nothing that JSON has\)"),
        ({"kasa_config": {"a": 1}}, r"config: every module: KaSA is not supported \(kasa_config is set\)"),
        ({"alora_invocation_tokens": [1]}, "config: every module: aLoRA is not supported"),
    ],
)
def test_configurations_that_cannot_be_written_or_read_again_are_refused(tmp_path, config, reason):
    with pytest.raises(ValueError, match=reason):
        save_adapter(Adapter({"0": layer(7, 6, 2)}), tmp_path / "out", config=config)
    assert list(tmp_path.iterdir()) == []


def test_an_extra_does_not_take_the_place_of_a_factor(tmp_path):
    adapter = Adapter({"0": layer(7, 6, 2)}, {"base_model.model.0.lora_A.weight": torch.ones(2, 6)})
    with pytest.raises(ValueError, match=r"0.lora_A.weight': is a factor of one of the layers"):
        save_adapter(adapter, tmp_path / "out")


@pytest.mark.parametrize(("roles", "saved"), [({}, ["proj_out"]), ({"weight": "frozen", "bias": "frozen"}, None)])
def test_a_head_is_a_saved_module_unless_it_is_known_to_be_frozen(tmp_path, roles, saved):
    """PEFT stores heads such as Whisper's proj_out also where nobody trained them."""
    head = "base_model.model.proj_out."
    layers = {"q": LoraLayer(A=torch.randn(2, 8), B=torch.randn(8, 2))}
    extras = {f"{head}weight": torch.ones(3, 8), f"{head}bias": torch.ones(3)}
    save_adapter(Adapter(layers, extras, roles={head + part: role for part, role in roles.items()}), tmp_path / "out")
    assert config_of(tmp_path / "out")["modules_to_save"] == saved
    assert config_of(tmp_path / "out")["bias"] == "none"


def test_undeclared_extras_are_refused(tmp_path):
    write_client(tmp_path / "in", mlp(), target_modules=["0"], modules_to_save=["3"], r=2)
    adapter = load_adapter(tmp_path / "in")
    extras = dict(adapter.extras) | {"base_model.model.2.weight": torch.ones(5, 7)}
    with pytest.raises(ValueError, match=r"extras: '2.weight' is declared neither by modules_to_save nor by bias"):
        save_adapter(Adapter(adapter.modules, extras, adapter.config), tmp_path / "out")
    with pytest.raises(ValueError, match="extras: 'head': names of PEFT start with"):
        save_adapter(Adapter(adapter.modules, {"head": torch.ones(1)}, adapter.config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_end_like_others_keep_their_ranks(tmp_path):
    """A plain pattern "proj" would also match "block.proj"; the written one is anchored."""
    base = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4), "block": torch.nn.ModuleDict({"proj": mlp()[0]})})
    modules = {"proj": layer(4, 4, 1), "block.proj": layer(7, 6, 2), "block.other": layer(7, 6, 2)}
    base["block"]["other"] = torch.nn.Linear(6, 7)
    save_adapter(Adapter(modules), tmp_path / "out")
    assert config_of(tmp_path / "out")["rank_pattern"] == {"^proj": 1}
    assert_same_update(tmp_path / "out", base, {name: lora.delta() for name, lora in modules.items()})
    assert load_adapter(tmp_path / "out").modules["block.proj"].rank == 2


def test_selections_that_differ_between_clients_become_the_modules_names(tmp_path):
    write_client(tmp_path / "a", mlp(), target_modules=["0", "2"], r=2)
    write_client(tmp_path / "b", mlp(), target_modules="[02]", r=2)
    write_client(tmp_path / "c", mlp(), target_modules=["2", "0"], r=2)
    write_client(tmp_path / "d", mlp(), target_modules=["2"], r=2)
    a, b, c, d = load_adapters([tmp_path / x for x in "abcd"])
    assert sorted(merge_configs([a.config, c.config, None])["target_modules"]) == ["0", "2"]
    for other, written in ((d, ["0", "2"]), (b, "0|2")):  # names, or an expression where a client has one
        save_adapter(a, tmp_path / "out", config=merge_configs([a.config, other.config]))
        assert config_of(tmp_path / "out")["target_modules"] == written
        load_with_peft(mlp(), tmp_path / "out")
    assert merge_configs([None, None]) is None


NAMES = {"target_modules": ["q_proj", "v_proj"]}
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"layers_to_transform": [1]}, {"layers_to_transform": [0, 1]}),
        ({"layers_to_transform": 0}, {}),
        ({"layers_to_transform": [1]}, {"layers_to_transform": [0]}),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, {}),
        ({"exclude_modules": [FIRST]}, {}),
        ({"exclude_modules": ".*0.*"}, {"exclude_modules": [FIRST]}),
    ],
)
def test_peft_loads_every_layer_whichever_each_client_chose(tmp_path, options, others, merged):
    write_client(tmp_path / "a", llama(), r=2, **NAMES | options)
    write_client(tmp_path / "b", llama(), r=3, **NAMES | others)
    adapters = [load_adapter(tmp_path / x) for x in "ab"]
    result = flora_na.aggregate(adapters, missing="zero", method="stack").adapter
    config = merge_configs(adapter.config for adapter in adapters) if merged else adapters[0].config
    save_adapter(result, tmp_path / "out", config=config)
    assert_same_update(tmp_path / "out", llama(), {name: x.delta() for name, x in result.modules.items()})


def test_adapters_loaded_one_by_one_are_merged_as_those_loaded_together(tmp_path):
    write_client(tmp_path / "a", mlp(), target_modules=["0"], r=2)
    write_client(tmp_path / "b", mlp(), target_modules=["0", "2"], modules_to_save=["3"], bias="all", r=3)
    paths = [tmp_path / "a", tmp_path / "b"]
    result = flora_na.aggregate([load_adapter(path) for path in paths], missing="renormalize", residual=True)
    merged = merge_configs(adapter.config for adapter in load_adapters(paths))
    assert result.adapter.config == result.residual.config == merged
    save_adapter(result.adapter, tmp_path / "out")
    assert config_of(tmp_path / "out")["modules_to_save"] == ["3"]
    load_with_peft(mlp(), tmp_path / "out")


class Nested(nn.Sequential):
    """Linear maps whose names are the ends of each other's: ``0`` and ``1.0``."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 3)))


def test_what_all_clients_left_out_is_not_adapted_by_the_end_of_its_name(tmp_path):
    for client, options in {"a": {"exclude_modules": ["1.0"]}, "b": {"exclude_modules": "1.0"}}.items():
        write_client(tmp_path / client, Nested(), target_modules=["0"], r=2, **options)
    adapters = load_adapters([tmp_path / "a", tmp_path / "b"])
    result = flora_na.aggregate(adapters).adapter
    assert list(result.modules) == ["0"]
    save_adapter(result, tmp_path / "out", config=merge_configs(adapter.config for adapter in adapters))
    assert_same_update(tmp_path / "out", Nested(), {"0": result.modules["0"].delta()})


class Selection(list):
    """Counts how often it is gone through."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def test_a_selection_is_not_gone_through_once_for_every_module(tmp_path):
    """A stranger's may name a hundred thousand modules."""
    names = Selection(["w", 7, {}, ""])
    modules = {f"layers.{i}.w": layer(2, 3, 1) for i in range(20)}
    save_adapter(Adapter(modules, config={"target_modules": names}), tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == names
    assert names.times < 10
    save_adapter(Adapter({"w2": layer(2, 3, 1)}, config={"target_modules": names}), tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["w2"]


def test_a_module_that_one_client_saves_whole_and_another_adapts_is_refused(tmp_path):
    write_client(tmp_path / "a", mlp(), target_modules=["0", "3"], r=2)
    write_client(tmp_path / "b", mlp(), target_modules=["0"], modules_to_save=["3"], r=2)
    adapters = load_adapters([tmp_path / "a", tmp_path / "b"])
    result = flora_na.aggregate(adapters, missing="renormalize").adapter
    with pytest.raises(ValueError, match=r"3: has low-rank factors, and is saved whole \(modules_to_save '3'\)"):
        save_adapter(result, tmp_path / "out", config=merge_configs(adapter.config for adapter in adapters))


def test_a_layer_of_rank_zero_is_written_as_zeros(tmp_path):
    modules = {"0": layer(7, 6, 0), "2": layer(5, 7, 2)}
    save_adapter(Adapter(modules), tmp_path / "out")
    assert_same_update(tmp_path / "out", mlp(), {name: lora.delta() for name, lora in modules.items()})


def test_negative_and_zero_scalings_are_folded(tmp_path):
    modules = {"0": layer(7, 6, 2, -0.7), "2": layer(5, 7, 2, 0.0)}
    save_adapter(Adapter(modules), tmp_path / "out")
    assert_same_update(tmp_path / "out", mlp(), {name: lora.delta() for name, lora in modules.items()})


def test_a_scaling_that_overflows_the_dtype_is_refused(tmp_path):
    big = LoraLayer(A=torch.ones(1, 3).half(), B=torch.full((2, 1), 6e4).half(), scaling=2.0)
    with pytest.raises(ValueError, match="0: lora_B holds NaN or Inf"):
        save_adapter(Adapter({"0": big}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_would_not_be_read_again_are_not_written(tmp_path):
    save_adapter(Adapter({"0": layer(3, 2, 1024)}), tmp_path / "out")
    assert load_adapter(tmp_path / "out").modules["0"].rank == 1024
    for name in ("0", "0 [embedding]"):
        with pytest.raises(ValueError, match=r"0.*: rank 1025 of a 3 x 2 matrix: at most 1024 is read and written"):
            save_adapter(Adapter({name: layer(3, 2, 1025)}), tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_no_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter: holds no layers"):
        save_adapter(Adapter({}), tmp_path / "out")


def test_views_of_one_buffer_and_strided_factors_are_written_right(tmp_path):
    buffer = torch.arange(60.0)
    modules = {
        "0": LoraLayer(A=buffer[:12].view(2, 6), B=buffer[12:26].view(2, 7).T),
        "2": LoraLayer(A=buffer[:14].view(2, 7), B=buffer[::2][:10].view(5, 2)),
    }
    save_adapter(Adapter(modules), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.0.lora_B.weight"], modules["0"].B)
    assert torch.equal(stored["base_model.model.2.lora_B.weight"], modules["2"].B)


def test_scalars_empty_tensors_and_integers_survive_as_extras(tmp_path):
    prefix = "base_model.model.n."
    extras = {
        f"{prefix}count": torch.tensor(7),
        f"{prefix}none": torch.zeros(0, 3),
        f"{prefix}half": torch.ones(3).half(),
        f"{prefix}byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }
    save_adapter(Adapter({"0": layer(7, 6, 2)}, extras), tmp_path / "out")
    back = load_adapter(tmp_path / "out").extras
    assert back.keys() == extras.keys()
    for key, tensor in extras.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)


def test_the_file_is_what_the_format_asks_for(tmp_path):
    """Metadata for transformers, and every tensor aligned to its item size, so that readers may map it."""
    modules = {"a": layer(3, 5, 1, dtype=torch.float16), "b": layer(3, 3, 1, dtype=torch.float64)}
    save_adapter(Adapter(modules), tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = [
            file.get_tensor(key) for key in ("base_model.model.a.lora_A.weight", "base_model.model.b.lora_A.weight")
        ]
        assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in tensors)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_gaussian_initialisation_of_the_clients_is_not_carried_over(tmp_path):
    quietly(write_client, tmp_path / "in", mlp(), target_modules=["0"], r=2, init_lora_weights="gaussian")
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    assert config_of(tmp_path / "out")["init_lora_weights"] is True


def test_adapters_of_parameters_alone_select_no_module(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], "exclude_modules": ["q"]}
    layers = {f"mlp.experts [expert {i} of 2]": layer(4, 5, 2, seed=i) for i in (0, 1)}
    save_adapter(Adapter(layers, {}, config | {"target_parameters": ["mlp.experts.w"]}), tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == []
