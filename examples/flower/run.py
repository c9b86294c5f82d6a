"""Run the app in a SuperLink of its own and leave nothing running: ``python examples/flower/run.py --clients 4``.

``flwr run`` alone starts a SuperLink in the background and leaves it there for the next run. Here one is started on
free ports of the loopback interface, with a folder of its own, and ended with everything that it started. Flower's and
Ray's telemetry are off, and the app's packages are those of this environment. For Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

APP = Path(__file__).resolve().parent
SECONDS_TO_START, SECONDS_TO_STOP = 60, 20
SUBREAPER = 36  # prctl: a process whose parent has ended becomes this one's child, and is not lost from sight
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as on those systems: Ray stays on the loopback interface
    # Usage statistics or not, Ray asks fixed addresses of Azure, Google and Amazon which cloud it is in. These are its
    # only plain HTTP requests to other hosts: they end at a port where nobody listens.
    "http_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
}


def main() -> int:
    """Parse the command line, run, and return the exit code."""
    parser = argparse.ArgumentParser(description="Run the example in a SuperLink of its own.")
    parser.add_argument("--clients", type=int, default=2, help="how many clients are simulated")
    parser.add_argument("--run-config", default="", help="as of `flwr run`: \"method='svd' steps=20\"")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started ends, too
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="flower-") as home, superlink(Path(home)) as environment:
        return run_app(environment, options.clients, options.run_config)


def run_app(environment: Mapping[str, str], clients: int, run_config: str = "") -> int:
    """Run the app with its logs on the terminal; returns 0 if it completed."""
    federation = f"num-supernodes={clients} client-resources-num-cpus=1"
    command = ["run", str(APP), "own", "--stream", "--federation-config", federation]
    command += ["--run-config", run_config] if run_config else []
    if code := subprocess.run(_flwr(*command), env=environment, check=False).returncode:
        return code
    listed = subprocess.run(
        _flwr("list", "own", "--format", "json"), env=environment, check=True, capture_output=True, text=True
    )
    status = json.loads(listed.stdout)["runs"][0]["status"]
    print(f"the run is {status}", flush=True)
    return 0 if status == "finished:completed" else 1


@contextlib.contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink that simulates, known to ``flwr`` as ``own``; yields the environment in which ``flwr`` finds it.

    Args:
        home: folder for its files.

    Raises:
        RuntimeError: it does not start.
    """
    api, control = _free_port(), _free_port()
    environment = os.environ | SETTINGS | {"FLWR_HOME": str(home), "RAY_TMPDIR": str(home)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    connection = f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{api}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection, encoding="utf-8")
    log = home / "superlink.log"
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(api)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [_script(command[0]), *command[1:], "--control-api-address", f"127.0.0.1:{control}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # a Ctrl-C is for this process, which ends that one in order
        )
    try:
        _wait_until_healthy(process, api, log)
        yield environment
    finally:
        _stop(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"the SuperLink did not start:\n{log.read_text(encoding='utf-8', errors='replace')}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the SuperLink to end, which ends what it started; what is left after some seconds is ended by force.

    That is everything which this process has started: an actor of Ray may outlive all between itself and this one.
    """
    started = _descendants(os.getpid())
    process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    while process.poll() is None or any(map(_runs, started)):
        started |= _descendants(os.getpid())
        if time.monotonic() > deadline:
            _kill(started)
            process.kill()
        time.sleep(0.2)


def _descendants(root: int) -> set[tuple[int, int]]:
    """Everything that a process started: ids with start times, which tell an id that is used again."""
    table = {pid: _stat(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}
    found, grown = set(), {root}
    while grown:
        found |= grown
        grown = {pid for pid, stat in table.items() if stat and stat[1] in found} - found
    return {(pid, stat[2]) for pid in found - {root} if (stat := table.get(pid))}


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, parent and start time of a process, or None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[19])


def _runs(process: tuple[int, int]) -> bool:
    stat = _stat(process[0])
    return stat is not None and stat[0] != "Z" and stat[2] == process[1]


def _kill(processes: set[tuple[int, int]]) -> None:
    for process in processes:
        if _runs(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process[0], signal.SIGKILL)


def _flwr(*arguments: str) -> list[str]:
    return [_script("flwr"), *arguments]


def _script(name: str) -> str:
    """A console script of this environment, whatever ``PATH`` says."""
    return str(Path(sys.executable).parent / name)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
