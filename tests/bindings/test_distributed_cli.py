"""The command line on the ranks of torchrun: one result, or one line from one rank and the output as it was."""

import json
import os
import signal
import socket
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed as dist
from typer.testing import CliRunner

from fedgram.bench._commands import app
from fedgram.bindings._cli import aggregations
from fedgram.bindings.files.staging import check_writable
from fedgram.bindings.peft import OUTPUT_FILES, load_adapter, load_adapters
from fedgram.flora_na import Adapter, LoraLayer, aggregate
from fedgram_testing.ranks import environment, finish, free_port, rank_environments, start

TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run"]
CLI = ["-m", "fedgram.bench.cli"]
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
MARK = f"mark-{uuid.uuid4().hex}"
"""In the environment of everything that these tests start."""
HOOK = """
import os, signal, sys, time
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("adapter_model.safetensors"):
        with open(os.environ["HIT_FILE"], "w") as file:
            file.write(f"{os.getpid()} {time.time()}")
        os.kill(os.getpid(), int(os.environ["HIT_SIGNAL"]))
if os.environ.get("RANK") == os.environ.get("HIT_RANK"):
    sys.addaudithook(hook)
"""
"""Loaded by Python as it starts: sends the rank a signal when it first reads a client's weights."""


@pytest.fixture
def clients(tmp_path):
    """Three clients of five modules of different sizes, and an output of an earlier round."""
    g = torch.Generator().manual_seed(0)
    for u in range(3):
        tensors = {}
        for i in range(5):
            tensors[f"base_model.model.layers.{i}.proj.lora_A.weight"] = torch.randn(2 + u, 24, generator=g)
            tensors[f"base_model.model.layers.{i}.proj.lora_B.weight"] = torch.randn(16 + 8 * i, 2 + u, generator=g)
        write(tmp_path / f"c{u}", tensors, 2 + u)
    write(tmp_path / "global", {}, 2)
    return [tmp_path / f"c{u}" for u in range(3)]


def write(folder, tensors, r):
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": ["proj"]}
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def output_of(clients):
    return clients[0].parent / "global"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arguments(clients, *more):
    return ["aggregate", *map(str, clients), "-o", str(output_of(clients)), *map(str, more)]


def spoken(ended):
    """What the ranks said themselves; the launcher and torch add reports of their own."""
    return [line for _, _, err in ended for line in err.splitlines() if line.startswith("fedgram:")]


def left_over():
    """Processes that these tests started and that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if MARK.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def nothing_is_left():
    deadline = time.monotonic() + 10
    while left_over() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left_over()


@pytest.fixture
def hit(tmp_path):
    """Variables that have one rank hit by a signal, and where it says when."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)

    def variables(rank, number):
        path = f"{folder}{os.pathsep}{environment()['PYTHONPATH']}"
        return {"PYTHONPATH": path, "HIT_RANK": rank, "HIT_SIGNAL": int(number), "HIT_FILE": folder / "when"}

    return variables


def torchrun(*options, **variables):
    env = environment(MARK=MARK) | {name: str(value) for name, value in variables.items()}
    return start([*TORCHRUN, *map(str, options)], env, start_new_session=True)


@pytest.mark.slow
def test_two_agents_of_two_ranks_write_what_one_process_makes_of_every_module(clients):
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "round"]
    agent = ["--nnodes", 2, "--nproc-per-node", 2, *meeting, "--local-addr", "127.0.0.1", *CLI]
    ended = finish([torchrun(*agent, *arguments(clients, "--method", "svd", "--json")) for _ in range(2)])
    assert [code for code, _, _ in ended] == [0, 0], ended
    report = json.loads("".join(out for _, out, _ in ended))  # printed once
    whole = load_adapter(output_of(clients))
    adapters = load_adapters(clients)
    names = [str(path) for path in clients]
    for name in adapters[0].modules:
        cut = [Adapter({name: a.modules[name]}, {}, a.config) for a in adapters]
        part = aggregate(cut, method="svd", names=names)
        layer = whole.modules[name]
        assert torch.equal(layer.A, part.adapter.modules[name].A)
        assert torch.equal(layer.B, part.adapter.modules[name].B)
        assert report["modules"][name] == part.report.to_dict()["modules"][name]
    assert len(report["modules"]) == len(whole.modules) == 5
    assert nothing_is_left()


@pytest.mark.slow
def test_a_bad_file_is_one_line_of_one_rank(clients):
    path = clients[1] / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-40])
    before = contents(output_of(clients))
    ended = finish([torchrun("--nproc-per-node", 2, *CLI, *arguments(clients))])
    [line] = spoken(ended)
    assert ended[0][0] == 1
    assert ended[0][1] == ""
    assert str(path) in line
    assert line.startswith("fedgram: rank ")
    assert contents(output_of(clients)) == before
    assert nothing_is_left()


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_leaves_the_output(clients, hit):
    before = contents(output_of(clients))
    variables = hit(1, signal.SIGKILL)
    ended = finish([torchrun("--nproc-per-node", 2, *CLI, *arguments(clients), **variables)])
    waited = time.time() - float(variables["HIT_FILE"].read_text().split()[1])
    [line] = spoken(ended)
    assert ended[0][0] == 1
    assert "another rank" in line
    assert waited < 30
    assert contents(output_of(clients)) == before
    assert nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("holds_the_store", [False, True])
def test_a_rank_that_stops_answering_is_given_up_in_the_stated_time(clients, hit, holds_the_store):
    before = contents(output_of(clients))
    variables = hit(0, signal.SIGSTOP)
    if holds_the_store:
        variables |= {"MASTER_PORT": free_port(), "TORCHELASTIC_USE_AGENT_STORE": False}
    else:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    command = [sys.executable, "-P", *CLI, *arguments(clients, "--rank-timeout", 3)]
    environments = rank_environments(2, MARK=MARK, **variables)
    environments[1]["LOCAL_RANK"] = "0"  # on a host of its own, as far as it knows
    stopped, other = [start(command, env) for env in environments]
    try:
        ended = finish([other])
        waited = time.time() - float(variables["HIT_FILE"].read_text().split()[1])
    finally:
        stopped.kill()
        stopped.communicate()
    assert ended[0][0] == 1
    who = "the store of the job has not answered" if holds_the_store else "rank 0 of 2 has not been heard of"
    assert spoken(ended) == [f"fedgram: {who} for 3 s"]
    assert waited < 3 + 10 + 15  # the patience, the grace for a rank deep in a computation, and a busy machine
    assert contents(output_of(clients)) == before
    assert nothing_is_left()


@pytest.mark.parametrize("first", [True, False])
def test_a_store_that_never_answers_is_given_up_while_joining(first):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        meeting = {"MASTER_PORT": silent.getsockname()[1], "TORCHELASTIC_USE_AGENT_STORE": True, "MARK": MARK}
        env = rank_environments(2, **meeting)[1] | {"LOCAL_RANK": "0" if first else "1"}
        setting = "from fedgram.bindings._distributed import launch; launch.JOINING = 2 - 30"
        ended = finish([start([sys.executable, "-P", "-c", f"{setting}; launch.launched_ranks(1).__enter__()"], env)])
    port = meeting["MASTER_PORT"]
    line = f"fedgram: the 2 ranks did not meet at 127.0.0.1:{port}: no answer for 2 s"
    assert ended[0][0] == 1
    assert spoken(ended) == ([line] if first else [])


@pytest.mark.parametrize("missing", [0, 2])
def test_any_rank_may_be_the_one_that_the_others_miss_while_joining(missing):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher's
    meeting = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "MARK": MARK}
    join = "import datetime, os; from fedgram.bindings._distributed.launch import _join"
    command = [sys.executable, "-P", "-c", f"{join}; _join(int(os.environ['RANK']), 3, datetime.timedelta(seconds=4))"]
    ended = finish([start(command, env) for k, env in enumerate(rank_environments(3, **meeting)) if k != missing])
    assert [code for code, *_ in ended] == [1, 1]
    [line] = spoken(ended)
    assert line.startswith(f"fedgram: the 3 ranks did not meet at 127.0.0.1:{store.port}: ")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("inspect", lambda clients: ["inspect", *map(str, clients)]),
        ("aggregate --resume", lambda clients: arguments(clients, "--resume")),
        ("aggregate --rank-per-client", lambda clients: arguments(clients, "--rank-per-client")),
    ],
)
def test_what_runs_in_one_process_does_not_run_on_ranks(clients, monkeypatch, name, command):
    told = []
    for env in rank_environments(2):
        for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(variable, env[variable])
        result = CliRunner().invoke(app, command(clients))
        told.append((result.exit_code, result.stdout, result.stderr))
    reason = "for one process; under torchrun there is aggregate, which starts anew if it was interrupted"
    line = f"fedgram: {name}: {reason}\n"
    assert told == [(1, "", line), (0, "", "")]


def test_the_first_rank_holds_the_output_while_all_work(tmp_path, monkeypatch):
    output = tmp_path / "global"

    def work(*_, **__):
        with ThreadPoolExecutor(1) as another_run:
            another_run.submit(check_writable, output, OUTPUT_FILES).result()
        return aggregate([{"q": LoraLayer(A=torch.ones(1, 2), B=torch.ones(2, 1))}])

    monkeypatch.setattr(aggregations, "aggregate_sharded", work)
    first, second = (partial(aggregations.aggregate_on_ranks, watch=SimpleNamespace(rank=k)) for k in (0, 1))
    with pytest.raises(OSError, match="another run is writing this output"):
        first([], None, output, None, progress=None)
    assert second([], None, output, None, progress=None).parts == []  # and only the first
    assert not list(tmp_path.iterdir())
