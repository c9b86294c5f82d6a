"""The streaming benchmark, tiny: what it writes is what it measures, a kill is real, and nothing is left behind."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from fedgram.bench import streaming, streaming_clients
from fedgram.bindings.peft import load_adapters

SHAPES = {"q": (640, 480), "up": (960, 480)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_have_the_promised_size_and_are_adapters(dtype, tmp_path):
    written = streaming_clients.Written.of_size(0.001, 3, 4, SHAPES, dtype)
    assert written.nbytes == pytest.approx(1e6, rel=0.1)
    adapters = load_adapters(dirs := streaming_clients.write_clients(tmp_path, written))
    assert [len(adapter.modules) for adapter in adapters] == [2 * written.layers] * 3
    assert {str(layer.A.dtype) for layer in adapters[0].modules.values()} == {f"torch.{dtype}"}
    stored = sum((folder / "adapter_model.safetensors").stat().st_size for folder in dirs)
    assert 0.9 < stored / 1e6 < 1.3  # with headers
    first, second = (adapter.modules["model.layers.0.q"].A for adapter in adapters[:2])
    assert not first.equal(second)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """One tiny run of the command."""
    folder = tmp_path_factory.mktemp("bench")
    app = typer.Typer()
    app.command()(streaming.streaming_command)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(streaming.MODELS, "tiny", SHAPES)
        options = ["--gigabytes", "0.003", "--clients", "2", "--rank", "8", "--methods", "svd", "--model", "tiny"]
        result = CliRunner().invoke(app, [*options, "--folder", str(folder / "x"), "--out", str(folder / "f.json")])
    assert result.exit_code == 0, result.output
    return folder, json.loads((folder / "f.json").read_text()), result.stdout


@pytest.mark.slow
def test_the_figures_are_consistent(figures):
    _, found, _ = figures
    svd, best = found["methods"]["svd"], min(read["seconds"] for read in found["reading"].values())
    assert svd["share_of_reading"] == pytest.approx(best / svd["seconds"])
    assert svd["share_met"] == (svd["share_of_reading"] >= 0.5)
    assert {t: r["seconds"] / svd["seconds"] for t, r in found["reading"].items()} == pytest.approx(svd["share_of"])
    assert svd["peak_met"] == (svd["peak_bytes"] <= found["peak_bound_bytes"])
    assert found["peak_bound_bytes"] == 1.5 * 2 * 4 * 8 * (960 + 480) + 300e6
    assert svd["modules"] == 2 * found["layers"]
    assert 0 < svd["rho"] < 1
    assert svd["peak_anonymous_bytes"] <= svd["peak_bytes"]


def test_a_kill_in_the_middle_is_resumed(figures):
    _, found, _ = figures
    resume = found["resume"]
    assert 0 < resume["killed_after"] < resume["of"]
    assert resume["resumed"] >= resume["killed_after"]


def test_the_table_says_what_is_met_and_the_adapters_are_gone(figures):
    folder, found, shown = figures
    assert ("peak met" in shown) == found["methods"]["svd"]["peak_met"]
    for task, share in found["methods"]["svd"]["share_of"].items():
        assert f"{task} {'met' if share >= 0.5 else 'MISSED'} ({share:.2f})" in shown
    assert list((folder / "x").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "known"),
    [(["--model", "1t"], "--model: expected one of 7b, 405b, got '1t'"),
     (["--dtype", "int8"], "--dtype: expected one of float32, bfloat16, got 'int8'"),
     (["--methods", "svd,qr"], "--methods: expected one of fedavg, flora-na, als, svd, stack, got 'qr'")],
)  # fmt: skip
def test_an_unknown_model_dtype_or_method_is_told(options, known):
    app = typer.Typer()
    app.command()(streaming.streaming_command)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1
    assert result.stderr == f"fedgram: {known}\n"


@pytest.mark.parametrize(("option", "name"), [("--out", "taken/x.json"), ("--out", "."), ("--folder", "taken/x")])
def test_a_place_that_cannot_be_written_is_found_first(option, name, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "run", lambda *_: pytest.fail("ran"))
    (tmp_path / "taken").write_text("")
    app = typer.Typer()
    app.command()(streaming.streaming_command)
    result = CliRunner().invoke(app, ["--folder", str(tmp_path), option, str(tmp_path / name)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"fedgram: {tmp_path}")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_missing_package_is_named_with_its_line():
    hidden = "import sys; sys.modules['typer'] = None; import fedgram.bench.streaming"
    done = subprocess.run([sys.executable, "-P", "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "pip install 'fedgram[cli]'" in done.stderr.splitlines()[-1]


def test_a_task_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="nothing : KeyError"):
        streaming.measure(tmp_path, "nothing")


def test_without_room_nothing_is_written(tmp_path):
    with pytest.raises(OSError, match="are free"):
        streaming.run(tmp_path, streaming_clients.Written.of_size(1e6, 2, 4, SHAPES, "float32"), ["svd"])
    assert list(tmp_path.iterdir()) == []
