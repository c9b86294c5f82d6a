"""The command line on directories that PEFT wrote: results, tables, JSON, exit codes, and one line per refusal."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Annotated

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedgram import flora_na
from fedgram.bench import _commands
from fedgram.bench._commands import app
from fedgram.bindings.peft import load_adapter, load_adapters
from fedgram_testing.peft_adapters import bert, load_with_peft, peft_deltas, write_client

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANKS = (2, 3, 4)


@pytest.fixture(scope="module")
def deltas(tmp_path_factory):
    """Three clients of one classifier, of different ranks and scalings; with each, the updates that PEFT computes."""
    root = tmp_path_factory.mktemp("round")
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    found = []
    for i, r in enumerate(RANKS):
        model = write_client(
            root / f"c{i}",
            bert(),
            seed=i,
            r=r,
            lora_alpha=4 + i,
            use_rslora=i == 1,
            alpha_pattern={"query": 3},
            **options,
        )
        found.append(peft_deltas(model))
    return root, found


@pytest.fixture
def clients(deltas, tmp_path):
    """Fresh copies, to be damaged; their directories in order."""
    for i in range(len(RANKS)):
        shutil.copytree(deltas[0] / f"c{i}", tmp_path / f"c{i}")
    return [tmp_path / f"c{i}" for i in range(len(RANKS))]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments) -> str:
    """The one line with which a call is refused; nothing on stdout, no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line


def mean_update(deltas, weights):
    total = sum(weights)
    return {name: sum(w / total * d[name].double() for w, d in zip(weights, deltas, strict=True)) for name in deltas[0]}


def relative_error(actual, expected) -> float:
    error = sum(float((actual[name].double() - expected[name]).square().sum()) for name in expected)
    return (error / sum(float(d.square().sum()) for d in expected.values())) ** 0.5


@pytest.mark.parametrize("method", flora_na.METHODS)
def test_the_result_loads_in_peft_and_its_error_is_the_reported_one(deltas, tmp_path, method):
    root, found = deltas
    result = run("aggregate", *sorted(root.iterdir()), "-o", tmp_path / "out", "--method", method, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    loaded = load_with_peft(bert(), tmp_path / "out")
    error = relative_error(peft_deltas(loaded), mean_update(found, [1, 1, 1]))
    # PEFT multiplies in float32: its deltas carry about 1e-7 of rounding of their own.
    assert error == pytest.approx(report["rho"], rel=1e-4, abs=1e-6)
    assert report["method"] == method
    if method == "stack":
        assert error < 1e-6


def test_the_ladder_holds_from_file_to_file(deltas, tmp_path):
    root, _ = deltas
    rho = {}
    for method in ("fedavg", "flora-na", "als", "svd"):
        result = run("aggregate", *sorted(root.iterdir()), "-o", tmp_path / method, "--method", method, "--json")
        rho[method] = json.loads(result.stdout)["rho"]
    assert rho["svd"] <= rho["als"] * (1 + 1e-9) <= rho["flora-na"] * (1 + 1e-6) < rho["fedavg"]


@pytest.mark.parametrize("form", ["object", "list"])
def test_weights_by_name_or_in_order(deltas, tmp_path, form):
    root, found = deltas
    (tmp_path / "w.json").write_text(json.dumps({"c2": 1, "c0": 8, "c1": 0.5} if form == "object" else [8, 0.5, 1]))
    dirs = [root / "c0", root / "c1", root / "c2"]
    result = run(
        "aggregate", *dirs, "-o", tmp_path / "out", "--weights", tmp_path / "w.json", "--method", "stack", "--json"
    )
    shares = json.loads(result.stdout)["clients"]
    assert shares == {str(d): pytest.approx(w / 9.5) for d, w in zip(dirs, [8, 0.5, 1], strict=True)}
    loaded = load_with_peft(bert(), tmp_path / "out")
    assert relative_error(peft_deltas(loaded), mean_update(found, [8, 0.5, 1])) < 1e-6


def test_the_head_is_the_weighted_mean(deltas, tmp_path):
    root, _ = deltas
    (tmp_path / "w.json").write_text("[3, 1, 0]")
    run("aggregate", *sorted(root.iterdir()), "-o", tmp_path / "out", "--weights", tmp_path / "w.json")
    key = "base_model.model.classifier.weight"
    heads = [load_file(root / f"c{i}" / WEIGHTS)[key] for i in range(2)]
    torch.testing.assert_close(load_file(tmp_path / "out" / WEIGHTS)[key], heads[0] * 0.75 + heads[1] * 0.25)


def test_pair_and_residual_together_are_the_mean_update(deltas, tmp_path):
    root, found = deltas
    result = run(
        "aggregate", *sorted(root.iterdir()), "-o", tmp_path / "out", "--rank", 1, "--residual", tmp_path / "rest"
    )
    assert result.exit_code == 0, result.output
    pair = peft_deltas(load_with_peft(bert(), tmp_path / "out"))
    rest = peft_deltas(load_with_peft(bert(), tmp_path / "rest"))
    whole = {name: pair[name].double() + rest[name] for name in pair}
    assert relative_error(whole, mean_update(found, [1, 1, 1])) < 1e-6


def test_rank_is_the_rank_of_the_result(deltas, tmp_path):
    root, _ = deltas
    run("aggregate", *sorted(root.iterdir()), "-o", tmp_path / "out", "--rank", 2)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    assert {layer.rank for layer in load_adapter(tmp_path / "out").modules.values()} == {2}


def test_anchor_and_alignment_take_earlier_results(deltas, tmp_path):
    root, _ = deltas
    dirs = sorted(root.iterdir())
    assert run("aggregate", *dirs, "-o", tmp_path / "first", "--method", "flora-na").exit_code == 0
    anchored = run(
        "aggregate", *dirs, "-o", tmp_path / "b", "--method", "flora-na", "--anchor", tmp_path / "first", "--json"
    )
    expected = flora_na.aggregate(load_adapters(dirs), method="flora-na", anchor=load_adapter(tmp_path / "first"))
    assert json.loads(anchored.stdout)["rho"] == pytest.approx(expected.report.rho)
    aligned = run("aggregate", *dirs, "-o", tmp_path / "c", "--align-to", tmp_path / "first", "--json")
    assert aligned.exit_code == 0, aligned.output


def test_shared_scope_is_passed_on(deltas, tmp_path):
    root, _ = deltas
    args = ("aggregate", *sorted(root.iterdir()), "-o", tmp_path / "out", "--shared", "--json")
    shared = json.loads(run(*args, "--method", "flora-na").stdout)["rho"]
    assert shared == pytest.approx(
        flora_na.aggregate(load_adapters(sorted(root.iterdir())), method="flora-na", shared=True).report.rho
    )
    assert "shared" in refused(*args, "--method", "svd")


def test_tables_show_modules_and_totals(deltas, tmp_path):
    root, _ = deltas
    result = run("aggregate", *sorted(root.iterdir()), "-o", tmp_path / "out")
    report = flora_na.aggregate(load_adapters(sorted(root.iterdir()))).report
    assert "module of bert.encoder.layer" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("1.attention.self.value"))
    assert f"{report.modules['bert.encoder.layer.1.attention.self.value'].rho_fedavg:.4f}" in row
    assert f"{report.rho:.4f}" in next(line for line in result.stdout.splitlines() if line.startswith("all 4"))
    assert result.stdout.endswith(f"wrote {tmp_path / 'out'}\n")
    assert result.stderr == ""


def test_inspect_shows_the_ladder_the_clients_and_the_curve(deltas):
    root, _ = deltas
    result = run("inspect", *sorted(root.iterdir()))
    assert result.exit_code == 0, result.output
    for word in ("rho fedavg", "rho flora-na", "rho als", "rho svd", "cosine to mean", "outlier score", "output rank"):
        assert word in result.stdout
    assert all(str(path) in result.stdout for path in root.iterdir())
    assert result.stdout.splitlines()[-1].split()[-1] == "0.0000"  # at the total rank nothing is left


def test_inspect_prints_only_json_that_holds_everything(deltas):
    root, found = deltas
    result = run("inspect", *sorted(root.iterdir()), "--json", "--rank", 2)
    document = json.loads(result.stdout)
    assert set(document["ladder"]) == {"fedavg", "flora-na", "als", "svd"}
    norms = [client["norm"] for client in document["clients"].values()]
    expected = [sum(float(d.double().square().sum()) for d in client.values()) ** 0.5 for client in found]
    assert norms == pytest.approx(expected, rel=1e-5)
    module = document["modules"]["bert.encoder.layer.0.attention.self.query"]
    assert module["rank"] == 2
    assert module["rank_curve"][1] == pytest.approx(module["rho"]["svd"], rel=1e-6)


def test_many_modules_are_cut_to_the_worst(tmp_path):
    names = [str(i) for i in range(30)]
    for i in range(2):
        base = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in names))
        write_client(tmp_path / f"c{i}", base, target_modules=names, r=1, seed=i)
    result = run("inspect", tmp_path / "c0", tmp_path / "c1")
    assert "(18 more, better approximated; --json has all)" in result.stdout
    assert any(line.startswith("all 30") for line in result.stdout.splitlines())


def test_quiet_says_nothing(deltas, tmp_path):
    root, _ = deltas
    result = run("aggregate", *sorted(root.iterdir()), "-o", tmp_path / "out", "-q")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out" / WEIGHTS).exists()
    assert run("inspect", *sorted(root.iterdir()), "--quiet").output == ""


def test_the_console_script_and_the_module_are_the_same_program(deltas, tmp_path):
    root, _ = deltas
    dirs = [str(path) for path in sorted(root.iterdir())]
    script = os.path.join(os.path.dirname(sys.executable), "fedgram")
    for i, start in enumerate(([script], [sys.executable, "-P", "-m", "fedgram.bench.cli"])):
        command = [*start, "aggregate", *dirs, "-o", str(tmp_path / f"out{i}"), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["output"] == str(tmp_path / f"out{i}")
        assert done.stderr == ""
    command = [script, "inspect", *dirs, str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fedgram: {tmp_path / 'nowhere'}: no such directory\n"


WITHOUT_TYPER = """
import sys
sys.modules["typer"] = None
from fedgram.bench.cli import main
main()
"""


def test_without_typer_the_line_that_installs_it_is_printed():
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT_TYPER], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.endswith("pip install 'fedgram[cli]'")


# ---------------------------------------------------------------------------------------------------------- bad input


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
        ("[1, 2, NaN]", "client 'c2': expected a number of at least 0, got nan"),
        ("[0, 0, 0]", "all are zero"),
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


def test_outputs_that_cannot_be_written_are_refused_before_the_work(clients, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "file: not a directory" in refused("aggregate", *clients, "-o", tmp_path / "file")
    assert "file" in refused("aggregate", *clients, "-o", tmp_path / "file" / "below")
    assert "holds 'notes.txt'" in refused("aggregate", *clients, "-o", tmp_path / "full")
    assert "is one of the clients' directories" in refused("aggregate", *clients, "-o", clients[0])
    out = tmp_path / "out"
    assert "one output lies in the other" in refused("aggregate", *clients, "-o", out, "--residual", out / "rest")
    assert "one output lies in the other" in refused("aggregate", *clients, "-o", out, "--residual", out)
    assert "No such file or directory" in refused("aggregate", *clients, "-o", "/proc/nowhere/out")
    assert not out.exists()


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


# ------------------------------------------------------------------------------------------- commands imported late


def late_group(module: str) -> typer.Typer:
    group = typer.Typer()
    group.callback()(lambda: None)
    _commands._add(group, "job", module, "command", "A job.", extra="demo")
    return group


def test_a_late_command_reads_its_own_options(monkeypatch):
    def command(rounds: Annotated[int, typer.Option(help="How many.")] = 3) -> None:
        typer.echo(f"{rounds} rounds")

    monkeypatch.setitem(sys.modules, "late_module", SimpleNamespace(command=command))
    group = late_group("late_module")
    assert CliRunner().invoke(group, ["job", "--rounds", "5"]).stdout == "5 rounds\n"
    assert CliRunner().invoke(group, ["job", "--rounds", "x"]).exit_code == 2
    assert "How many." in CliRunner().invoke(group, ["job", "--help"]).stdout


def test_a_late_command_without_its_packages_says_how_to_install_them():
    result = CliRunner().invoke(late_group("no_such_package_here"), ["job"])
    assert result.exit_code == 1
    assert result.stderr == "fedgram: No module named 'no_such_package_here'; pip install 'fedgram[demo]'\n"


def test_a_module_of_our_own_that_is_missing_is_a_fault_and_no_advice():
    result = CliRunner().invoke(late_group("fedgram.bench.nothing"), ["job"])
    assert isinstance(result.exception, ModuleNotFoundError)
