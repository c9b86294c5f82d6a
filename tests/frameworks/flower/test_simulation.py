"""The example app as `flwr run` starts it: MiniLM on 20 Newsgroups, two clients, two rounds, on the loopback only."""

import ipaddress
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedgram import flora_na
from fedgram.bindings import peft as fpeft
from fedgram.bindings.plain import match_state_dicts
from fedgram_testing.processes import run_watched

RUN = Path(__file__).resolve().parents[3] / "examples" / "flower" / "run.py"
SIZES = "num-server-rounds=2 steps=3 train-messages=300 test-messages=64"
NAMES = ("flower-super", "flwr-simulation", "ray::", "/raylet", "/gcs_server", "/ray/")
EPS = torch.finfo(torch.float32).eps


def processes():
    """Ids of running processes of Flower and Ray; those of Ray overwrite their environment and command line."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if any(name in command for name in NAMES):
            found.add(f"{entry.name}: {command[:100]}")
    return found


def simulate(folder, config):
    """Run the app to its end; its figures. Nothing may have left the loopback interface or be left running."""
    before = processes()
    out = folder / "out"
    command = [sys.executable, "-P", str(RUN), "--clients", "2", "--run-config", f"{SIZES} {config} output='{out}'"]
    done = run_watched(command, timeout=200, log=folder / "log", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.output[-4000:]
    assert done.addresses
    assert all(_is_loopback(address) for address in done.addresses), done.addresses
    assert processes() <= before
    assert "Sampled 2 nodes (out of 2)" in done.output
    return out, json.loads((out / "figures.json").read_text())


def _is_loopback(address):
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def clients_of(folder):
    """Adapter directories and sample counts of a round's clients, in the order in which the strategy takes them."""
    counts = {c: json.loads((c / "figures.json").read_text())["num-examples"] for c in folder.glob("client-*")}
    assert len(counts) == len(set(counts.values())) == 2
    paths = sorted(counts, key=counts.get)
    return paths, [counts[path] for path in paths]


def state_of(adapter):
    factors = {f"{n}.{side}": getattr(layer, side) for n, layer in adapter.modules.items() for side in "AB"}
    return factors | dict(adapter.extras)


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].double() - tensor.double()).norm() <= tolerance * tensor.double().norm(), name


ASKED = """
import socket, sys
from ray._common.usage import usage_lib
told = {"socket.connect": lambda a: a[1][0], "socket.getaddrinfo": lambda a: a[0]}
sys.addaudithook(lambda event, a: print(told[event](a)) if event in told else None)
assert usage_lib.get_cloud_from_metadata_requests() == "unknown"
"""


def test_ray_does_not_ask_other_hosts_which_cloud_it_is_in():
    """It asks in every run and gives up at once: a look at the sockets now and then sees it only on a busy machine."""
    settings = runpy.run_path(str(RUN))["SETTINGS"]
    command = [sys.executable, "-P", "-c", ASKED]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # numpy and torch versions of the environment may warn in peft's files
def test_the_global_adapter_is_the_librarys_aggregate_of_the_clients_adapters(tmp_path):
    out, figures = simulate(tmp_path, "strategy='flora-na' method='als'")
    for round_ in (1, 2):
        paths, counts = clients_of(out / f"round-{round_}")
        expected = flora_na.aggregate([fpeft.load_adapter(path) for path in paths], counts, method="als")
        got = fpeft.load_adapter(out / f"round-{round_}" / "global")
        # The same inputs in the same order: only the threads of the two processes' products may differ.
        assert_close(state_of(got), state_of(expected.adapter), 100 * EPS)
        metrics = figures["train"][str(round_)]
        assert metrics["fedgram-rho"] == pytest.approx(expected.report.rho, rel=1e-4)
        assert metrics["fedgram-rho-fedavg"] == pytest.approx(expected.report.rho_fedavg, rel=1e-4)
        assert 0 < metrics["fedgram-rho"] < metrics["fedgram-rho-fedavg"]
        assert metrics["fedgram-clients"] == 2
        assert len(figures["reports"][str(round_)]["modules"]) == len(got.modules) == 6
    # The second round started from the first one's result: its clients differ from their start, and learnt.
    losses = [figures["train"][r]["train-loss"] for r in ("1", "2")]
    assert losses[1] < losses[0]
    assert figures["own"].keys() == {"1", "2"}
    assert figures["global"].keys() == {"0", "1", "2"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stamp_moves_the_global_adapter_by_the_bfloat16_clients_it_heard(tmp_path):
    out, figures = simulate(tmp_path, "strategy='stamp' c=0.5 bfloat16=true")
    for round_ in (1, 2):
        paths, counts = clients_of(out / f"round-{round_}")
        states = [state_of(fpeft.load_adapter(path)) for path in paths]
        for state in states:
            for tensor in state.values():  # float32 files of bfloat16 values: what travelled was packed
                assert torch.equal(tensor, tensor.to(torch.bfloat16).float())
        start = state_of(fpeft.load_adapter(out / f"round-{round_ - 1}" / "global"))
        expected = match_state_dicts(start, states, counts, c=0.5)
        got = state_of(fpeft.load_adapter(out / f"round-{round_}" / "global"))
        assert_close(got, expected.state_dict, 100 * EPS)
        metrics = figures["train"][str(round_)]
        assert metrics["fedgram-gap"] <= 1e-9
        assert metrics["fedgram-objective"] == pytest.approx(expected.dual.objective, rel=1e-4)
        assert metrics["fedgram-bytes-received"] < 0.55 * metrics["fedgram-bytes-sent"]  # two bytes a value, and names


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing_running(tmp_path):
    before, log = processes(), tmp_path / "log"
    command = [sys.executable, "-P", str(RUN), "--run-config", "steps=1000 train-messages=300 test-messages=64"]
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 150
    while "Sampled 2 nodes" not in log.read_text() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    assert process.poll() is None, log.read_text()[-4000:]
    assert any("ray::" in line for line in processes() - before)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert processes() <= before
