"""FLARE's simulator with two clients and two rounds, for real: the global model is the library's own aggregate."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvflare", reason="runs in the venv of the extra 'nvflare'")

from safetensors.torch import load_file

from fedgram import flora_na, stamp
from fedgram.bindings import peft as fpeft
from fedgram_testing.digits import Digits
from fedgram_testing.processes import run_watched

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LOOPBACK = {"127.0.0.1", "::1"}
SITES = ("site-1", "site-2")


def simulate(command, tmp_path):
    """Run a job to its end, ``command`` of a folder for it; its output and that folder.

    Where FLARE's simulator gave both clients the same name (its threads share what they tell a client), it runs again.
    """
    for attempt in range(3):
        folder = tmp_path / f"attempt-{attempt}"
        folder.mkdir()
        output = run_job(command(folder), folder)
        if set(re.findall(r"ClientRunner for client: (\S+)", output)) == set(SITES):
            return output, folder
    pytest.fail(f"FLARE has not started both clients by their names: {output[-4000:]}")


def run_job(command, folder):
    """It must not reach beyond this machine, nor leave anything running."""
    support = [str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = run_watched(
        [sys.executable, "-P", *map(str, command)],
        timeout=280,
        log=folder / "log.txt",
        marker=str(folder),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(support), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.output[-4000:]
    assert done.addresses <= LOOPBACK
    assert done.addresses, "no socket was seen: the watch does not work"
    assert not done.left
    return done.output


def test_the_example_job_aggregates_adapters(tmp_path):
    job = ROOT / "examples" / "nvflare" / "job.py"
    output, folder = simulate(lambda folder: [job, "--out", folder / "out", "--steps", 3, "--test", 50], tmp_path)
    server = folder / "out" / "flare" / "newsgroups" / "server" / "simulate_job" / "app_server"
    sent = folder / "out" / "sent"
    reports = [json.loads((server / f"fedgram_round_{i}.json").read_text()) for i in range(2)]
    counts = reports[0]["clients"]
    assert list(counts) == list(SITES)
    assert counts["site-1"] != counts["site-2"]  # the clients have unequal shares, and these are the weights
    for number, report in enumerate(reports):
        adapters = [fpeft.load_adapter(sent / f"round-{number}" / site) for site in SITES]
        expected = flora_na.aggregate(adapters, [counts[site] for site in SITES], method="als")
        assert report["rho"] == pytest.approx(expected.report.rho, rel=1e-6)
        assert report["rho"] < report["rho_fedavg"]
    state = torch.load(server / "FL_global_model.pt", weights_only=True)["model"]
    found = fpeft.load_adapter(folder / "out" / "global")
    assert found.modules.keys() == expected.adapter.modules.keys()
    for name, layer in expected.adapter.modules.items():
        # The weights came from the report (rounded nowhere) and the tensors travelled as they were: the same bits.
        assert torch.equal(found.modules[name].A, layer.A)
        assert torch.equal(found.modules[name].B, layer.B)
        assert torch.equal(state[f"base_model.model.{name}.lora_A.weight"], layer.A)
    for name, tensor in expected.adapter.extras.items():
        assert torch.equal(found.extras[name], tensor)
        assert torch.equal(state[name], tensor)
    assert "accuracy of" in output


JOB = """
import sys
from fedgram.bindings.nvflare import StampAggregator, StampRecipe
from fedgram_testing.digits import Digits
from nvflare.recipe import SimEnv
out, script = sys.argv[1:]
recipe = StampRecipe(name="digits", model=Digits(), aggregator=StampAggregator(c=0.4), min_clients=2, num_rounds=2,
                     train_script=script, train_args=f"--keep {out}")
recipe.execute(SimEnv(num_clients=2, workspace_root=f"{out}/flare"))
"""


def test_stamp_moves_a_bfloat16_model(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    _, folder = simulate(lambda folder: [tmp_path / "job.py", folder, HERE / "digits_client.py"], tmp_path)
    server = folder / "flare" / "digits" / "server" / "simulate_job" / "app_server"
    matcher = stamp.SpatialMatcher(Digits().state_dict(), c=0.4)
    for number in range(2):
        for site in SITES:  # what the server sent out is where the library's own matcher stands
            start = load_file(folder / f"start-{number}-{site}.safetensors")
            assert all(torch.equal(start[name], tensor) for name, tensor in matcher.state.items())
        states = [load_file(folder / f"sent-{number}-{site}.safetensors") for site in SITES]
        step = matcher.step(states, [906, 891])  # odd and even digits among scikit-learn's 1,797
        report = json.loads((server / f"fedgram_round_{number}.json").read_text())
        assert report["coefficients"] == step.dual.coefficients.tolist()
        assert report["relative_gap"] < 1e-9
        assert abs(step.dual.coefficients[0] - step.dual.coefficients[1]) > 1e-3  # not the mean
    state = torch.load(server / "FL_global_model.pt", weights_only=True)["model"]
    assert state.keys() == matcher.state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in matcher.state.items())
    assert state["hidden.weight"].dtype == torch.bfloat16
