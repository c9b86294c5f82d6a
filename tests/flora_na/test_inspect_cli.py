"""``fedgram inspect`` and the options that it shares with ``aggregate``: files in, tables, JSON and a picture out."""

import io
import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedgram import flora_na
from fedgram.bindings._cli import inspect_plot as picture
from fedgram.bindings.peft import load_adapter, load_adapters
from fedgram.flora_na import LoraLayer
from fedgram_testing.cli_clients import WEIGHTS, refused, run
from fedgram_testing.peft_adapters import bert, write_client


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Five classifiers; the last one's update points the other way, nine times as long."""
    root = tmp_path_factory.mktemp("cohort")
    dirs = [root / f"c{u}" for u in range(5)]
    for u, path in enumerate(dirs):
        write_client(path, bert(), seed=u, r=[4, 4, 4, 8, 4][u], lora_alpha=8, target_modules=["query", "value"])
    tensors = load_file(dirs[0] / WEIGHTS)
    save_file({k: -9 * t if "lora_B" in k else t for k, t in tensors.items()}, dirs[4] / WEIGHTS)
    return dirs


def test_json_is_the_documented_one(cohort):
    result = run("inspect", *cohort, "--json", "--rank", "auto:0.9")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    library = flora_na.inspect(load_adapters(cohort), rank="auto:0.9", names=[str(path) for path in cohort])
    assert document == json.loads(json.dumps(library.to_dict()))
    assert document["schema_version"] == 1
    scores = {name: client["outlier_score"] for name, client in document["clients"].items()}
    assert max(scores, key=scores.get) == str(cohort[4])


def test_warnings_end_the_report(cohort):
    lines = run("inspect", *cohort).stdout.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert lines[-len(warnings) :] == warnings
    assert any(
        line.startswith(f"warning: {cohort[4]}: far from the other clients (outlier score ") for line in warnings
    )


def test_screening_is_the_same_in_inspect_and_aggregate(cohort, tmp_path):
    options = ("--clip", "2x", "--min-cosine", "0.05", "--json")
    inspected = json.loads(run("inspect", *cohort, *options).stdout)
    result = run("aggregate", *cohort, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    aggregated = json.loads(result.stdout)
    assert aggregated["screening"] == inspected["screening"]
    assert str(cohort[4]) in aggregated["screening"]["clipped"]
    kept = [path for path in cohort if str(path) not in aggregated["screening"]["dropped"]]
    assert list(aggregated["clients"]) == [str(path) for path in kept]
    expected = flora_na.aggregate(load_adapters(cohort), clip="2x", min_cosine=0.05).adapter
    found = load_adapter(tmp_path / "out").modules
    for name, layer in expected.modules.items():
        assert torch.allclose(found[name].delta(), layer.delta(), atol=1e-5)


def test_screening_is_told_in_the_tables(cohort, tmp_path):
    aggregate = ("aggregate", *cohort, "-o", tmp_path / "out")
    for command in (("inspect", *cohort), aggregate, (*aggregate, "--rank-per-client")):
        text = run(*command, "--clip", "2x", "--min-cosine", "-0.9").stdout
        assert (
            f"clipped to norm {flora_na.aggregate(load_adapters(cohort), clip='2x').report.screening.bound:.4g}" in text
        )
        assert f": {cohort[4]}; dropped for a cosine below -0.9: none" in text
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        text = run(*command, "--min-cosine", "0.99").stdout
        assert re.search(r"dropped for a cosine below 0.99: .*; warning: that is \d+% of the weight", text)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_auto_rank_is_written_module_by_module(cohort, tmp_path):
    result = run("aggregate", *cohort, "-o", tmp_path / "out", "--rank", "auto:0.95", "--method", "svd", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["modules"]
    chosen = {name: m.rank for name, m in flora_na.inspect(load_adapters(cohort), rank="auto:0.95").modules.items()}
    assert {name: layer.rank for name, layer in load_adapter(tmp_path / "out").modules.items()} == chosen
    assert {name: module["rank"] for name, module in report.items()} == chosen
    assert all(module["rho"] ** 2 <= 0.05 + 1e-6 for module in report.values())


def test_a_picture_is_drawn(cohort, tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    result = run("inspect", *cohort, "--plot", tmp_path / "found.png", "--clip", "2x", "--min-cosine", "0", "-q")
    assert (result.exit_code, result.output) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["found.png"]
    image = matplotlib_image.imread(tmp_path / "found.png")
    assert image.shape[:2] == (1080, 1500)
    assert all(image[y : y + 540, x : x + 750, :3].std() > 0.05 for y in (0, 540) for x in (0, 750))  # four panels


@pytest.mark.parametrize("kind", ["zero", "names", "many"])
def test_odd_cohorts_can_be_drawn(kind, tmp_path):
    """A zero round, names that are no labels, and more clients and modules than fit."""
    pytest.importorskip("matplotlib")
    g = torch.Generator().manual_seed(0)
    clients, modules = (50, 40) if kind == "many" else (3, 2)

    def layer():
        B = torch.zeros(5, 2) if kind == "zero" else torch.randn(5, 2, generator=g)
        return LoraLayer(A=torch.randn(2, 6, generator=g), B=B)

    names = [r"$\frac{a}$" + "\x1b[31m\n" * 3 + f"{u}" for u in range(clients)] if kind == "names" else None
    found = flora_na.inspect([{f"m{i}$_": layer() for i in range(modules)} for _ in range(clients)], names=names)
    assert all(math.isnan(rho) for rho in found.ladder.values()) == (kind == "zero")
    picture.draw(found, tmp_path / "found.svg")
    assert b"<svg" in (tmp_path / "found.svg").read_bytes()


def test_every_format_is_written_without_other_programs(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(1, 1))
    monkeypatch.setenv("PATH", str(tmp_path))
    for ending in picture.FORMATS:
        picture.check(tmp_path / f"found.{ending}")
        figure.savefig(content := io.BytesIO(), format=ending)
        assert content.getvalue()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_refused_before_the_work(cohort, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(flora_na, "inspect", None)
    (tmp_path / "found.png").mkdir()
    assert "found.pgf: --plot takes" in refused("inspect", *cohort, "--plot", tmp_path / "found.pgf")
    assert "found.png: is a directory" in refused("inspect", *cohort, "--plot", tmp_path / "found.png")
    line = refused("inspect", *cohort, "--plot", "/proc/found.png")
    assert line == "fedgram: /proc/found.png: No such file or directory"
    assert "ending in .png" in refused("inspect", *cohort, "--plot", tmp_path / "adapter_model.safetensors")
    assert "no such directory" in refused("inspect", *cohort, "--plot", tmp_path / "nowhere" / "found.png")


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "auto"),
        ("--rank", "auto:1"),
        ("--rank", "-3"),
        ("--clip", "0"),
        ("--clip", "two"),
        ("--min-cosine", "1.5"),
    ],
)
def test_bad_options_are_usage_errors(options, tmp_path):
    for command in (("inspect", tmp_path), ("aggregate", tmp_path, "-o", tmp_path / "out")):
        assert run(*command, *options).exit_code == 2


def test_nobody_left_is_one_line(cohort, tmp_path):
    shutil.copytree(cohort[0], tmp_path / "opposed")
    tensors = load_file(cohort[0] / WEIGHTS)
    save_file({k: -t if "lora_B" in k else t for k, t in tensors.items()}, tmp_path / "opposed" / WEIGHTS)
    line = refused("inspect", cohort[0], tmp_path / "opposed", "--min-cosine", "0.5")
    assert line == "fedgram: min_cosine: no client's update reaches a cosine of 0.5 to the mean of the rest"
