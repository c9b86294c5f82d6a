"""Directories that appear whole or not at all: written beside their place, synced, then swapped in by one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows; runs into one output are then not told apart
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def staged_directory(path: str | os.PathLike[str], owned: frozenset[str]) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that takes the place of ``path`` when the block ends without an error.

    On Linux the swap is one atomic exchange: whenever the process dies, ``path`` holds the previous files or the new
    ones, never a mixture. What a killed run left behind is removed by the next run.

    Args:
        path: the directory to make or to replace; missing parents are made.
        owned: names of the files that may be replaced. A directory that holds anything else is refused.

    Raises:
        ValueError: ``path`` is not a directory, or holds files of other names.
        OSError: the place cannot be written, or another run is writing it.
    """
    target = check_replaceable(path, owned)
    stage = _make_stage(target)
    try:
        with _locked(stage):
            _remove_abandoned(target, stage)
            yield stage
            _sync_directory(stage)
            _swap(stage, target)
            _sync_directory(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # an attempt that failed, or the previous output


def check_replaceable(path: str | os.PathLike[str], owned: frozenset[str]) -> Path:
    """The real path of an output directory.

    Raises:
        ValueError: it exists and is not a directory, or holds files that are not ``owned``.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"{path}: not a directory")
    others = sorted({entry.name for entry in target.iterdir()} - owned) if target.exists() else []
    if others:
        raise ValueError(f"{path}: holds {others[0]!r}, which would be lost: choose another directory")
    return target


def check_writable(path: str | os.PathLike[str], owned: frozenset[str]) -> None:
    """Check that ``staged_directory`` could write ``path``, by making and removing a directory beside it.

    Raises:
        ValueError, OSError: as ``staged_directory``.
    """
    _make_stage(check_replaceable(path, owned)).rmdir()


def _make_stage(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.parent / f"{_stage_prefix(target)}{secrets.token_hex(8)}.partial"
    stage.mkdir()
    return stage


def _stage_prefix(target: Path) -> str:
    return f".{target.name[:100]}."


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, so that others see that its writer lives."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path, own: Path) -> None:
    """Remove the stages of killed runs.

    Raises:
        OSError: a stage's lock is held: another run is writing the same output.
    """
    for stage in target.parent.glob(f"{glob.escape(_stage_prefix(target))}*.partial"):
        if stage == own:
            continue
        try:
            with _locked(stage):
                shutil.rmtree(stage, ignore_errors=True)
        except BlockingIOError as error:
            raise OSError(errno.EBUSY, "another run is writing this output", str(target)) from error
        except FileNotFoundError:
            continue


def _swap(stage: Path, target: Path) -> None:
    if not target.exists():
        os.rename(stage, target)
    elif not _exchange(stage, target):
        _swap_in_two_steps(stage, target)


def _exchange(stage: Path, target: Path) -> bool:
    """Exchange two directories in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(stage), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0


def _swap_in_two_steps(stage: Path, target: Path) -> None:
    """For systems without an exchange: between the two renames the previous output lies at the name ``.previous``."""
    previous = stage.with_suffix(".previous")
    os.rename(target, previous)
    try:
        os.rename(stage, target)
    except OSError:
        os.rename(previous, target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
