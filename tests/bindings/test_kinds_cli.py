"""The command line's options for kinds: DoRA, initial factors, several adapters, one result per client."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedgram import flora_na
from fedgram.bindings.peft import load_adapter, load_adapters, save_residual
from fedgram.bindings.streaming import aggregate_directories, aggregate_to_directory
from fedgram.flora_na import aggregate
from fedgram_testing.cli_clients import run
from fedgram_testing.peft_adapters import adapted, load_with_peft, mlp, peft_deltas, quietly, write_client
from fedgram_testing.peft_kinds import KINDS, loaded, trained, write_kind


def done(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments, code=1) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return result.stderr


def test_dora_needs_its_flag_and_warns(tmp_path):
    models = [write_kind(KINDS["DoRA"], tmp_path / f"c{i}", seed=i) for i in range(2)]
    dirs, out = [tmp_path / "c0", tmp_path / "c1"], tmp_path / "out"
    assert "DoRA is not supported (use_dora is set); allow_dora (--allow-dora)" in refused(
        "aggregate", *dirs, "-o", out
    )
    assert not out.exists()
    result = done("aggregate", *dirs, "-o", out, "--method", "stack", "--allow-dora", "--json")
    json.loads(result.stdout)
    [warning] = result.stderr.splitlines()
    assert warning.startswith(f"fedgram: warning: {dirs[0]}: DoRA: ")
    one, other, found = trained(models[0]), trained(models[1]), loaded(KINDS["DoRA"], out)
    for key in one:
        torch.testing.assert_close(found[key], (one[key] + other[key]) / 2, rtol=1e-5, atol=1e-5)
    assert "residual: DoRA" in refused("aggregate", *dirs, "-o", out, "--allow-dora", "--residual", tmp_path / "rest")
    assert "DoRA" in done("inspect", *dirs, "--allow-dora", "--json").stderr
    for command in (("inspect", *dirs), ("aggregate", *dirs, "-o", out)):
        assert not done(*command, "--allow-dora", "--quiet").stderr
    assert not done("aggregate", *dirs, "-o", tmp_path / "each", "--rank-per-client", "--allow-dora", "-q").stderr


def test_the_library_warns_of_dora(tmp_path):
    write_kind(KINDS["DoRA"], tmp_path / "c")
    with pytest.warns(UserWarning, match="c: DoRA: the low-rank parts are aggregated"):
        load_adapter(tmp_path / "c", allow_dora=True)
    with pytest.warns(UserWarning, match="c: DoRA"):
        load_adapters([tmp_path / "c"], allow_dora=True)


@pytest.mark.filterwarnings("ignore:.*DoRA")
def test_the_library_writes_no_residual_of_dora(tmp_path):
    write_kind(KINDS["DoRA"], tmp_path / "c")
    adapters = load_adapters([tmp_path / "c"], allow_dora=True)
    with pytest.raises(ValueError, match="residual: DoRA scales the sum"):
        aggregate_to_directory(adapters, tmp_path / "out", residual=tmp_path / "rest")
    with pytest.raises(ValueError, match="residual: DoRA scales the sum"):
        save_residual(flora_na.aggregate(adapters, residual=True).residual, tmp_path / "rest")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_initial_factors_are_subtracted(tmp_path):
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="pissa")
    model = quietly(get_peft_model, mlp(), config)
    quietly(model.save_pretrained, str(tmp_path / "init"))
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight += 0.5
    quietly(model.save_pretrained, str(tmp_path / "c"))
    assert "without the initial factors (init, --init)" in refused("inspect", tmp_path / "c")
    done("aggregate", tmp_path / "c", "-o", tmp_path / "out", "--init", tmp_path / "init", "-q")
    merged = PeftModel.from_pretrained(mlp(), str(tmp_path / "out")).merge_and_unload().state_dict()
    for name, tensor in quietly(model.merge_and_unload).state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)
    shown = json.loads(done("inspect", tmp_path / "c", "--init", tmp_path / "init", "--json").stdout)
    assert set(shown["modules"]) == {"0", "2"}


def test_of_several_adapters_in_a_directory_one_is_named(tmp_path):
    deltas = []
    for i in range(2):
        model = adapted(mlp(), target_modules=["0"], r=2, seed=i)
        quietly(model.add_adapter, "other", LoraConfig(target_modules=["2"], r=3, init_lora_weights=False))
        quietly(model.save_pretrained, str(tmp_path / f"c{i}"))
        deltas.append(model.base_model.model[2].get_delta_weight("other").detach())
    dirs, out = [tmp_path / "c0", tmp_path / "c1"], tmp_path / "out"
    done("aggregate", *dirs, "-o", out, "--adapter-name", "other", "--method", "stack", "-q")
    found = peft_deltas(load_with_peft(mlp(), out))
    assert found.keys() == {"2"}
    torch.testing.assert_close(found["2"], (deltas[0] + deltas[1]) / 2)
    done("aggregate", *dirs, "-o", out, "-q")
    assert peft_deltas(load_with_peft(mlp(), out)).keys() == {"0"}
    assert f"{dirs[0]}: no adapter 'third'" in refused("aggregate", *dirs, "-o", out, "--adapter-name", "third")


@pytest.fixture
def of_different_ranks(tmp_path):
    for i, r in enumerate((1, 2, 4)):
        write_client(tmp_path / f"c{i}", mlp(), target_modules=["0", "2"], modules_to_save=["3"], r=r, seed=i)
    return [tmp_path / f"c{i}" for i in range(3)]


def test_every_client_gets_the_best_pair_of_its_own_rank(of_different_ranks, tmp_path):
    dirs, out = of_different_ranks, tmp_path / "out"
    result = done("aggregate", *dirs, "-o", out, "--rank-per-client", "--method", "svd", "--json")
    document = json.loads(result.stdout)
    assert list(document) == ["schema_version", "clients"]
    assert document["schema_version"] == 1
    shown = document["clients"]
    assert list(shown) == [str(path) for path in dirs]
    for path, rank in zip(dirs, (1, 2, 4), strict=True):
        best = aggregate(load_adapters(dirs), method="svd", rank=rank).adapter
        found = peft_deltas(load_with_peft(mlp(), out / path.name))
        for name, layer in best.modules.items():
            torch.testing.assert_close(found[name], layer.delta(), rtol=1e-4, atol=1e-5)
        assert json.loads((out / path.name / "adapter_config.json").read_text())["r"] == rank
        assert shown[str(path)].keys() == {"output", *flora_na.aggregate(load_adapters(dirs)).report.to_dict()}
        assert shown[str(path)]["output"] == str(out / path.name)
        assert {m["rank"] for m in shown[str(path)]["modules"].values()} == {rank}
    table = done("aggregate", *dirs, "-o", out, "--rank-per-client").stdout
    assert all(str(out / path.name) in table for path in dirs)


def test_one_result_per_client_refuses_what_speaks_of_one(of_different_ranks, tmp_path):
    dirs, out = of_different_ranks, tmp_path / "out"
    for option in (["--rank", "2"], ["--residual", tmp_path / "r"], ["--anchor", dirs[0]], ["--shared"], ["--resume"]):
        text = refused("aggregate", *dirs, "-o", out, "--rank-per-client", *option, code=2)
        assert "one result per client does not go with" in " ".join(text.replace("│", " ").split())
    done("aggregate", *dirs, "-o", tmp_path / "anew", "--rank-per-client", "--no-resume", "-q")
    assert "is one of the clients' directories" in refused("aggregate", *dirs, "-o", tmp_path, "--rank-per-client")
    (tmp_path / "x").mkdir()
    dirs[0].rename(tmp_path / "x" / "c1")
    text = refused("aggregate", tmp_path / "x" / "c1", dirs[1], "-o", out, "--rank-per-client")
    assert "another client's directory has the name 'c1'" in text
    assert not out.exists()


def test_no_folder_that_is_read_is_an_output(tmp_path):
    """Of a named adapter it is not the client's own directory; the initial adapter is read too, and links lead on."""
    plain = {"target_modules": ["0"], "r": 2}
    for i in range(2):
        write_client(tmp_path / f"c{i}", mlp(), seed=i, **plain)
        write_client(tmp_path / f"c{i}" / "other", mlp(), seed=4 + i, **plain)
    write_client(tmp_path / "init", mlp(), seed=9, **plain)
    write_client(tmp_path / "x" / "c0", mlp(), seed=9, **plain)
    (tmp_path / "linked").mkdir()
    write_client(tmp_path / "stored", mlp(), seed=8, **plain)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "linked" / name).symlink_to(f"../stored/{name}")
    dirs, rest, out = [tmp_path / "c0", tmp_path / "c1"], tmp_path / "rest", tmp_path / "out"
    other, init = ("--adapter-name", "other"), ("--init", tmp_path / "init")
    cases = [
        (tmp_path / "c0" / "other", ("-o", tmp_path / "c0" / "other", *other)),
        (tmp_path / "c0" / "other", ("-o", rest, "--residual", tmp_path / "c0" / "other", *other)),
        (tmp_path / "init", ("-o", tmp_path / "init", *init)),
        (tmp_path / "linked", ("-o", tmp_path / "linked", tmp_path / "linked")),
        (tmp_path / "stored", ("-o", tmp_path / "stored", tmp_path / "linked")),
        (tmp_path / "c0", ("-o", tmp_path, "--rank-per-client")),
        (tmp_path / "x" / "c0", ("-o", tmp_path / "x", "--rank-per-client", "--init", tmp_path / "x" / "c0")),
    ]
    for place, options in cases:
        assert f"{place}: is one of the clients' directories, or read" in refused("aggregate", *dirs, *options)
    with pytest.raises(ValueError, match="c1: is one of the clients' directories"):
        aggregate_directories(dirs, tmp_path / "c1")
    with pytest.raises(ValueError, match="rest: one output lies in the other"):
        aggregate_directories(dirs, rest, residual=rest)
    done("aggregate", *dirs, "-o", out, "-q")
    done("aggregate", *dirs, "-o", out, "-q", "--anchor", out, "--align-to", out)  # last round's global adapter
