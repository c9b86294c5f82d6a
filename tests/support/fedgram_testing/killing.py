"""The command line in a forked process that kills itself, or waits, at its n-th change of the file system."""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import typer

from fedgram.bench._commands import app

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FINISHED = 77
COMMAND = typer.main.get_command(app)


def contents(folder: Path) -> dict[str, bytes] | None:
    """The files of an output by name; None if it is not there."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


def start(arguments: list[str], errors: Path, before: Callable[[], object] = lambda: None) -> int:
    """Run the command line in a forked process, ``before`` first; returns its number. stderr goes to a file."""
    with warnings.catch_warnings():  # of threads, from Python 3.12 on: there is one that computes, and it is here
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        sys.stderr = open(errors, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - it ends with the process
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        before()
        COMMAND.main(args=arguments, prog_name="fedgram")
        os._exit(FINISHED)
    except SystemExit as end:
        os._exit(FINISHED if not end.code else int(end.code))
    finally:
        os._exit(99)  # a traceback


def finish(pid: int) -> int:
    """Wait; the exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_change(number: int, act: Callable[[], object]) -> Callable[[], None]:
    """To be called first in the process: ``act`` comes right before the n-th change of the file system.

    A change is what Python's audit events tell: files opened for writing, made, renamed, removed; also the call of
    the function that exchanges two directories.
    """
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if opened or event in CHANGES or (event == "ctypes.dlsym" and arguments[1] == "renameat2"):
            left -= 1
            if left == 0:
                act()

    return lambda: sys.addaudithook(hook)


def die() -> None:
    """End as by ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)
