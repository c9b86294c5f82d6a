"""The command line on directories that PEFT wrote: results, tables, JSON, the installed script."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace
from typing import Annotated

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedgram import flora_na
from fedgram.bench import _commands
from fedgram.bindings.peft import load_adapter, load_adapters
from fedgram_testing.cli_clients import CONFIG, WEIGHTS, clients, deltas, refused, run
from fedgram_testing.peft_adapters import bert, load_with_peft, peft_deltas, write_client

__all__ = ["clients", "deltas"]  # fixtures


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


def test_a_terminal_of_few_characters_gets_them_all_the_same(deltas, tmp_path):
    root, _ = deltas
    dirs = sorted(root.iterdir())
    out = tmp_path / "größer"
    for command in (("aggregate", *dirs, "-o", out), ("inspect", *dirs), ("aggregate", "--help")):
        result = CliRunner(charset="ascii").invoke(_commands.app, [str(argument) for argument in command])
        assert result.exit_code == 0, result.exception
    assert "?dW?" in result.stdout
    assert load_adapter(out).modules


@pytest.mark.slow
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


COLLECTOR = """
import atexit, gc, sys
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 100_000))
from fedgram.bench.cli import main
sys.argv[1:] = ["--version"]
main()
"""


def test_the_version_and_what_the_imports_made_is_not_collected():
    done = subprocess.run([sys.executable, "-P", "-c", COLLECTOR], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"fedgram {version('fedgram')}", "True True"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["aggregate", "--help"], ["bench", "--help"]])
def test_what_cannot_be_written_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-P", "-m", "fedgram.bench.cli", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "fedgram: No space left on device\n")


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
