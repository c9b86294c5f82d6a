"""Run a command and watch what it does to the machine: addresses it listens on or talks to, processes it leaves."""

import ipaddress
import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

LISTENING = "0A"


@dataclass
class Watched:
    """A finished command."""

    returncode: int
    output: str
    addresses: set[str] = field(default_factory=set)  # IP addresses listened on or connected to
    left: list[str] = field(default_factory=list)  # command lines of processes that outlived it


def run_watched(command: list[str], *, timeout: float, log: Path, marker: str = "", **options) -> Watched:
    """Run a command to its end and look at its process tree's sockets several times a second (Linux).

    ``marker``: text in the command line of processes that belong to the run, by which those left behind are found.
    """
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, **options)
    watched, end = Watched(-1, ""), time.monotonic() + timeout
    try:
        while process.poll() is None and time.monotonic() < end:
            watched.addresses |= _addresses(_tree(process.pid))
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
    watched.returncode, watched.output = process.returncode, log.read_text(errors="replace")
    time.sleep(0.5)  # a child that ends together with its parent may need a moment
    watched.left = [line for pid, line in _command_lines() if marker and marker in line and pid != os.getpid()]
    return watched


def _tree(root: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    found = {root}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return found


def _addresses(pids: set[int]) -> set[str]:
    """Local addresses of listening sockets and remote ones of all others, of these processes."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {found[1] for link in links if (found := re.match(r"socket:\[(\d+)\]", link))}
    addresses = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            local, remote, state, inode = fields[1], fields[2], fields[3], fields[9]
            if inode in inodes and state == LISTENING:
                addresses.add(_address(local))
            elif inode in inodes and _address(remote) not in ("0.0.0.0", "::"):  # those are not connected
                addresses.add(_address(remote))
    return addresses


def _address(text: str) -> str:
    """The kernel's hexadecimal address (32-bit words in host order) as usual."""
    packed = bytes.fromhex(text.partition(":")[0])
    words = [packed[i : i + 4][::-1] for i in range(0, len(packed), 4)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def _command_lines() -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
        except (OSError, UnicodeDecodeError):
            continue
    return found
