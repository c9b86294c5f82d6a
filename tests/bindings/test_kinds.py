"""Every kind of adapter that PEFT writes: read, aggregated and written back, against what PEFT itself computes."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

from fedgram import flora_na
from fedgram.bindings._peft.names import LayerName
from fedgram.bindings.peft import load_adapter, load_adapters, merge_configs, save_adapter
from fedgram.flora_na import Adapter, LoraLayer
from fedgram_testing.peft_adapters import PeftModel, edit_config, quietly
from fedgram_testing.peft_kinds import KINDS, Kind, loaded, matrices, mixtral, tied_llama, trained, whisper, write_kind

RANKS, ALPHAS, WEIGHTS = (3, 2, 4), (5, 3, 4), [1.0, 2.0, 5.0]


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """kind -> directories of three clients of different ranks and scalings, and what PEFT makes of each."""
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp("kind")
            models = [
                write_kind(KINDS[name], root / f"c{i}", r=r, lora_alpha=alpha, seed=i)
                for i, (r, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True))
            ]
            made[name] = root, models[0], [trained(model) for model in models]
        return made[name]

    return make


def read(name, *paths):
    return quietly(load_adapters, paths, **KINDS[name].reading)


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # Entries of size 1 and sums of at most 40 float32 products: 1e-5 is about 10 times the rounding.
        difference = (found[key] - tensor).abs() - tolerance * tensor.abs()
        assert float(difference.max()) <= tolerance, key


@pytest.mark.parametrize("name", KINDS)
def test_every_layer_is_the_delta_weight_that_peft_computes(clients, name):
    root, model, _ = clients(name)
    expected, [adapter] = matrices(model), read(name, root / "c0")
    seen = set()
    for text in adapter.modules:
        layer, stored = LayerName.parse(text), adapter.modules[text]
        assert str(layer) == text
        assert adapter.modules.sizes(text) == (*stored.B.shape[:1], *stored.A.shape[::-1])
        seen |= {layer.path, *layer.tied}
        delta = expected[layer.path]
        torch.testing.assert_close(stored.delta(), delta[layer.expert] if layer.experts > 1 else delta)
    assert seen == expected.keys()


@pytest.mark.parametrize("name", KINDS)
def test_one_client_comes_back_as_itself(clients, tmp_path, name):
    """By the default method; test_kinds_invariance has all of them, without the way through PEFT."""
    root, _, [own, *_] = clients(name)
    result = flora_na.aggregate(read(name, root / "c0"), [3.0])
    save_adapter(result.adapter, tmp_path / "out")
    assert_same(loaded(KINDS[name], tmp_path / "out"), own)


@pytest.mark.parametrize("name", KINDS)
def test_the_stack_of_three_clients_is_their_weighted_mean(clients, tmp_path, name):
    """Different ranks and scalings; ``stack`` loses nothing, so PEFT must find the mean of all that it computes."""
    root, _, everyone = clients(name)
    adapters = read(name, *(root / f"c{i}" for i in range(3)))
    result = flora_na.aggregate(adapters, WEIGHTS, method="stack")
    save_adapter(result.adapter, tmp_path / "out", config=merge_configs(a.config for a in adapters))
    assert_same(loaded(KINDS[name], tmp_path / "out"), mean(everyone))


def mean(everyone):
    shares = [w / sum(WEIGHTS) for w in WEIGHTS]
    return {key: sum(w * one[key].double() for w, one in zip(shares, everyone, strict=True)) for key in everyone[0]}


@pytest.mark.parametrize("name", ["convolutions", "experts", "tied embedding", "lora_bias"])
def test_what_was_written_is_read_again(clients, tmp_path, name):
    root, _, _ = clients(name)
    [adapter] = read(name, root / "c0")
    save_adapter(adapter, tmp_path / "out")
    again = load_adapter(tmp_path / "out")
    assert list(again.modules) == list(adapter.modules)
    assert set(again.extras) == set(adapter.extras)
    for layer in adapter.modules:
        torch.testing.assert_close(again.modules[layer].delta(), adapter.modules[layer].delta())
    for key, tensor in adapter.extras.items():
        torch.testing.assert_close(again.extras[key], tensor)


def test_token_rows_are_read_with_the_embedding_that_is_stored_with_them(tmp_path):
    """PEFT stores it by itself where a vocabulary was resized; its key then goes through the adapter of the rows."""
    kind, everyone = KINDS["tokens by module"], []
    for i in range(3):
        model = write_kind(kind, tmp_path / f"c{i}", seed=i)
        quietly(model.save_pretrained, tmp_path / f"c{i}", save_embedding_layers=True)
        everyone.append(trained(model))
    adapters = read("tokens by module", *(tmp_path / f"c{i}" for i in range(3)))
    stored = [name for name, role in adapters[0].roles.items() if role == "frozen"]
    assert [name for name in stored if "token_adapter.base_layer" in name] == stored != []
    save_adapter(flora_na.aggregate(adapters, WEIGHTS, method="stack").adapter, tmp_path / "out")
    assert_same(loaded(kind, tmp_path / "out"), mean(everyone))


def test_files_of_different_dtypes_are_mixed_in_the_one_that_holds_all(tmp_path):
    """float16 and bfloat16 meet in float32; the mean is that of the values as they are stored."""
    everyone = []
    for i, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32)):
        model = write_kind(KINDS["lora_bias"], tmp_path / f"c{i}", seed=i, dtype=dtype)
        everyone.append(trained(model.float()))
    result = flora_na.aggregate(load_adapters([tmp_path / f"c{i}" for i in range(3)]), WEIGHTS, method="stack")
    assert {layer.A.dtype for layer in result.adapter.modules.values()} == {torch.float32}
    save_adapter(result.adapter, tmp_path / "out")
    assert_same(loaded(KINDS["lora_bias"], tmp_path / "out"), mean(everyone))


def test_experts_are_read_by_several_threads_at_once(tmp_path):
    tensors = {"A": torch.randn(32 * 2, 6), "B": torch.randn(5, 32 * 2)}
    save_file(
        {f"base_model.model.{i}.experts.lora_{side}.weight": t + i for i in range(2) for side, t in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.down"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    layers = load_adapter(tmp_path).modules
    expected = {name: layers[name].A.clone() for name in layers}

    def read(names):
        return all(torch.equal(layers[name].A, expected[name]) for _ in range(100) for name in names)

    interval, names = sys.getswitchinterval(), list(layers)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as threads:
            assert all(threads.map(read, (names, names[::-1], names[32:] + names[:32])))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_client_of_16_bits_comes_back_to_its_rounding(tmp_path, dtype):
    """Each entry of both factors is rounded once more: relative to the norms, eps of the dtype."""
    own = matrices(write_kind(KINDS["experts"], tmp_path / "c", dtype=dtype).float())
    result = flora_na.aggregate([load_adapter(tmp_path / "c")]).adapter
    assert {layer.A.dtype for layer in result.modules.values()} == {dtype}
    for name, layer in result.modules.items():
        parsed = LayerName.parse(name)
        delta = own[parsed.path][parsed.expert] if parsed.experts > 1 else own[parsed.path]
        size = float(layer.A.double().norm() * layer.B.double().norm())
        difference = layer.scaling * layer.B.double() @ layer.A.double() - delta.double()
        assert float(difference.norm()) <= torch.finfo(dtype).eps * size


@pytest.mark.parametrize("name", ["convolutions", "experts", "attention", "tied embedding", "lora_bias", "tokens"])
def test_what_the_pair_leaves_out_is_an_adapter_of_its_own(clients, tmp_path, name):
    """Written as the command line writes it: without extras, whose options the configuration must then not announce."""
    root, _, everyone = clients(name)
    adapters = read(name, *(root / f"c{i}" for i in range(3)))
    result = flora_na.aggregate(adapters, WEIGHTS, method="svd", rank=1, residual=True)
    config = merge_configs(a.config for a in adapters)
    save_adapter(result.adapter, tmp_path / "out", config=config)
    save_adapter(Adapter(result.residual.modules), tmp_path / "rest", config=config | {"task_type": None})
    pair, rest, exact = loaded(KINDS[name], tmp_path / "out"), loaded(KINDS[name], tmp_path / "rest"), mean(everyone)
    deltas = [key for key in exact if key.startswith("delta of")]
    assert deltas == [key for key in rest if key.startswith("delta of")]
    assert_same({key: pair[key] + rest[key] for key in deltas}, {key: exact[key] for key in deltas})


def test_a_tied_embedding_counts_once(clients):
    """The head's factors are the embedding's, transposed: one update of one weight, and one part of the norm."""
    root, model, _ = clients("tied embedding")
    deltas = matrices(model)
    torch.testing.assert_close(deltas["lm_head"], deltas["model.embed_tokens"].T)
    parts = [delta.double().square().sum() for name, delta in deltas.items() if name != "lm_head"]
    [norm] = flora_na.inspect(read("tied embedding", root / "c0")).client_norms.tolist()
    assert norm == pytest.approx(float(sum(parts).sqrt()), rel=1e-6)


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": r".*embed_tokens|.*q_proj|lm_head"},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "layers_to_transform": [0]},
    ],
    ids=["expression", "layers"],
)
def test_a_tied_head_is_loaded_however_modules_are_selected(tmp_path, selection):
    kind = Kind(tied_llama, {"ensure_weight_tying": True, **selection})
    expected = trained(write_kind(kind, tmp_path / "in"))
    assert "delta of lm_head" in expected
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    assert_same(loaded(kind, tmp_path / "out"), expected)


def test_a_head_that_peft_does_not_know_by_name_stays_tied(tmp_path):
    """PEFT ties where the expression matches ``embed_tokens`` or ``lm_head`` alone; else both are trained apart."""
    kind = Kind(whisper, {"ensure_weight_tying": True, "target_modules": r"(.*\.)?(embed_tokens|proj_out|q_proj)"})
    expected = trained(write_kind(kind, tmp_path / "in"))
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    assert_same(loaded(kind, tmp_path / "out"), expected)
    model = quietly(PeftModel.from_pretrained, whisper(), tmp_path / "out", is_trainable=True)
    assert model.peft_config["default"].target_modules_to_tie == {"proj_out"}


@pytest.mark.parametrize("targets", [r".*\.(q|v)_proj", r"model\.layers\.0\.self_attn\.q_proj|lin", "all-linear"])
def test_a_bare_name_of_a_parameter_leads_to_no_module_that_is_selected(tmp_path, targets):
    """It may be a parameter of any module; PEFT passes over factors of modules that the result does not select."""
    options = KINDS["experts by bare names"].options | {"target_modules": ["q_proj"]}
    write_kind(Kind(mixtral, options), tmp_path)
    edit_config(tmp_path, target_modules=targets)
    names = load_adapter(tmp_path).modules
    assert "model.layers.0.self_attn.q_proj" in names
    assert {name.partition(" [")[0] for name in names if "[expert" in name} == {
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.experts.base_layer",
    }


@pytest.fixture
def experts_of_transformers_4(tmp_path):
    """One linear map per expert then: PEFT makes parameters of them where the selection ends in their names."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for expert in range(3):
        for name, n, m in (("w1", 16, 12), ("w2", 12, 16), ("w3", 16, 12)):
            stem = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}.lora_"
            tensors |= {f"{stem}A.weight": torch.randn(2, n, generator=generator)}
            tensors |= {f"{stem}B.weight": torch.randn(m, 2, generator=generator)}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3"], "bias": "none"}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": [0]}))
    expected = trained(quietly(PeftModel.from_pretrained, mixtral(), tmp_path / "in"))
    assert len(expected) == 2
    return tmp_path / "in", expected


def test_experts_of_transformers_4_are_loaded_however_modules_are_selected(experts_of_transformers_4, tmp_path):
    folder, expected = experts_of_transformers_4
    save_adapter(load_adapter(folder), tmp_path / "out")
    assert_same(trained(quietly(PeftModel.from_pretrained, mixtral(), tmp_path / "out")), expected)


def test_experts_of_transformers_4_share_a_rank(experts_of_transformers_4, tmp_path):
    """PEFT stacks them; with ``rank="auto:..."`` each may come with a rank of its own."""
    folder, expected = experts_of_transformers_4
    adapter = load_adapter(folder)
    name, layer = next(iter(adapter.modules.items()))
    wider = LoraLayer(pad(layer.A, (0, 0, 0, 1)), pad(layer.B, (0, 1)), layer.scaling)
    save_adapter(Adapter({**adapter.modules, name: wider}, config=adapter.config), tmp_path / "out")
    assert_same(trained(quietly(PeftModel.from_pretrained, mixtral(), tmp_path / "out")), expected)


@pytest.mark.parametrize(
    ("targets", "reason"), [(r"(.)\1", "uses groupref"), ("(a)|" * 6000, "is longer than 20000 characters")]
)
def test_an_expression_that_is_not_known_is_refused_where_bare_names_leave_doubt(tmp_path, targets, reason):
    write_kind(KINDS["experts by bare names"], tmp_path)
    edit_config(tmp_path, target_modules=targets)
    with pytest.raises(ValueError, match=rf"adapter_config.json: target_modules '.*' {reason}"):
        load_adapter(tmp_path)


def test_embeddings_that_are_not_tied_count_twice(tmp_path):
    options = KINDS["tied embedding"].options | {"ensure_weight_tying": False}
    model = write_kind(Kind(tied_llama, options), tmp_path / "c")
    deltas = matrices(model)
    [norm] = flora_na.inspect([load_adapter(tmp_path / "c")]).client_norms.tolist()
    assert norm == pytest.approx(float(sum(d.double().square().sum() for d in deltas.values()).sqrt()), rel=1e-6)


@pytest.mark.parametrize("role", ["anchor", "align_to"])
def test_the_padding_of_a_written_result_does_not_count_in_the_next_round(tmp_path, role):
    """Parameters of two ranks are written with the larger; read again as a last result, they have their own."""
    options = KINDS["experts"].options | {"rank_pattern": {"experts.gate_up_proj": 4, "q_proj": 2}}
    for i in range(2):
        write_kind(Kind(mixtral, options), tmp_path / f"c{i}", r=2, seed=i)
    adapters = load_adapters([tmp_path / "c0", tmp_path / "c1"])
    first = flora_na.aggregate(adapters, method="svd").adapter
    save_adapter(first, tmp_path / "out")
    written = load_adapter(tmp_path / "out")
    assert {layer.rank for name, layer in written.modules.items() if "expert" in name} == {4}
    again = flora_na.aggregate(adapters, method="svd", **{role: written}).adapter
    for name, layer in first.modules.items():
        assert again.modules[name].rank == layer.rank
        torch.testing.assert_close(again.modules[name].delta(), layer.delta(), rtol=1e-4, atol=1e-5)
