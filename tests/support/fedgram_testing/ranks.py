"""Processes that meet over gloo on the loopback address, each running one function; their results in rank order.

As a program it is one such process: ``python -m fedgram_testing.ranks MODULE FUNCTION FOLDER``.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import distributed as dist

SUPPORT = Path(__file__).resolve().parents[1]
LIMIT = 120.0
"""Seconds after which a run is taken for stuck, on a machine that others use too."""


def free_port():
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**variables):
    """This process's environment, one thread per process, and what is given."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return kept | loopback | {"PYTHONPATH": str(SUPPORT)} | {name: str(value) for name, value in variables.items()}


def rank_environments(count, **variables):
    """What a launcher would tell each of ``count`` ranks on this machine, the first one holding the store."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count, **variables}
    return [environment(RANK=k, LOCAL_RANK=k, **meeting) for k in range(count)]


def start(command, env, **options):
    """A process whose output is kept."""
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(processes, limit=LIMIT):
    """Exit code, stdout and stderr of each; kills what is left over, so that nothing outlives a test."""
    deadline = time.monotonic() + limit
    try:
        outputs = [p.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for p in processes]
    finally:
        for p in processes:
            _kill(p)
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def _kill(process):
    """End a process, and all of its session if it leads one."""
    if process.poll() is None:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def run_ranks(count, module, function, folder):
    """Run ``function(rank, folder)`` of an importable module on every rank; what each returned, in rank order."""
    command = [sys.executable, "-P", "-m", "fedgram_testing.ranks", module, function, str(folder)]
    ended = finish([start(command, env) for env in rank_environments(count)])
    errors = [f"rank {k} ended with {code}:\n{err}" for k, (code, _, err) in enumerate(ended) if code]
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"{k}.pt", weights_only=False) for k in range(count)]


def main(module, function, folder):
    """One rank."""
    task = getattr(importlib.import_module(module), function)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(task(dist.get_rank(), Path(folder)), Path(folder) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
