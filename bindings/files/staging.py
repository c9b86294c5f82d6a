"""Directories that appear whole or not at all: written beside their place, synced, then swapped in by one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from .documents import named_error
from .output_folders import is_mount, made_parents, may_replace
from .output_lock import beside, locked, reserved

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
NOT_FOR_DIRECTORIES = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)
"""What file systems answer, FUSE's and network ones among them, where a directory cannot be synced by itself."""
_HEX = frozenset("0123456789abcdef")
Hold = Callable[[Path], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def staged_directory(path: str | os.PathLike[str], owned: frozenset[str]) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that takes the place of ``path`` when the block ends without an error.

    On Linux the swap is one atomic exchange: whenever the process dies, ``path`` holds the previous files or the new
    ones, never a mixture. What a killed run left behind is removed by the next run. Where the system cannot exchange,
    there is a moment between two renames; the next run puts the previous files back if a run died in it. A directory
    that is replaced keeps its mode: who could not read it still cannot.

    Args:
        path: the directory to make or to replace; missing parents are made, and go again where nothing comes into them.
        owned: names of the files that may be replaced, and with a slash behind them of the directories, which go with
            all that they hold. A directory that holds anything else is refused.

    Raises:
        ValueError: ``path`` is not a directory, is a mount point, or holds files of other names.
        OSError: the place cannot be written, this user may not replace what is there, or another run is writing it.
    """
    with _writing(path, owned) as target:
        _recover(target)
        stage = _make_stage(target)
        try:
            yield stage
            publish(stage, target, owned)
        except OSError as error:
            if str(error.filename).startswith(str(stage)):  # people know the output by its own name
                error.filename = str(target) + str(error.filename).removeprefix(str(stage))
            raise
        finally:
            shutil.rmtree(stage, ignore_errors=True)  # an attempt that failed, or the previous output


@contextlib.contextmanager
def reserved_output(path: str | os.PathLike[str], owned: frozenset[str]) -> Iterator[None]:
    """Keep other runs out of ``path`` until the block ends; in it, this thread may write ``path`` as often as it likes.

    Before long work it shows, too, that the output can be written.

    Raises:
        ValueError, OSError: as ``staged_directory``.
    """
    with _writing(path, owned, reserved) as target:
        _make_stage(target).rmdir()
        yield


def check_replaceable(path: str | os.PathLike[str], owned: frozenset[str]) -> Path:
    """The real path of an output directory.

    Raises:
        ValueError: it exists and is not a directory, is a mount point, or holds files that are not ``owned``.
        OSError: this user may not replace it.
    """
    target = Path(os.path.realpath(path))
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{path}: not a directory")
    if is_mount(target):
        raise ValueError(f"{path}: is a mount point, which cannot be replaced: choose a directory inside it")
    others = sorted(_others(target, owned))
    if others:
        raise ValueError(f"{path}: holds {others[0]!r}, which would be lost: choose another directory")
    if not may_replace(target):
        raise PermissionError(errno.EACCES, "may not be replaced by this user: choose another directory", str(path))
    return target


def check_writable(path: str | os.PathLike[str], owned: frozenset[str]) -> None:
    """Check that ``staged_directory`` could write ``path``, by making and removing a directory beside it.

    Raises:
        ValueError, OSError: as ``staged_directory``.
    """
    with _writing(path, owned) as target:
        _make_stage(target).rmdir()


def publish(stage: Path, target: Path, owned: frozenset[str]) -> None:
    """Put a finished directory in the place of ``target``, beside which it lies; the caller holds the lock of it.

    Afterwards ``stage`` holds the previous files, or is gone.

    Raises:
        ValueError: ``target`` has come to hold files that are not ``owned``.
        OSError: the swap failed; ``target`` is as it was.

    Warns:
        UserWarning: the new files are in place, and the disk would not confirm it.
    """
    _sync_directory(stage)
    check_replaceable(target, owned)  # again: it may be hours since
    _swap(stage, target)
    try:
        _sync_directory(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        warnings.warn(f"{target}: written, but a power cut may still undo it ({reason})", stacklevel=3)


@contextlib.contextmanager
def _writing(path: str | os.PathLike[str], owned: frozenset[str], hold: Hold = locked) -> Iterator[Path]:
    target = check_replaceable(path, owned)
    with contextlib.ExitStack() as stack:
        for last in (False, False, True):
            try:
                stack.enter_context(made_parents(target))
                stack.enter_context(hold(target))
                break
            except FileNotFoundError:  # another run has just removed the parents that it had made
                if last:
                    raise
        yield target


def _others(target: Path, owned: frozenset[str]) -> list[str]:
    with os.scandir(target) as entries:
        names = ((entry.name, "/" if entry.is_dir(follow_symlinks=False) else "") for entry in entries)
        return [name for name, slash in names if name + slash not in owned]


def _make_stage(target: Path) -> Path:
    stage = beside(target, f"{secrets.token_hex(8)}.partial")
    try:
        stage.mkdir()
    except OSError as error:
        error.filename = str(target)
        raise
    if target.exists():
        with contextlib.suppress(OSError):  # a file system without modes
            stage.chmod(stat.S_IMODE(target.stat().st_mode) | stat.S_IRWXU)
    return stage


def _recover(target: Path) -> None:
    """Clear up after runs that were killed: the lock that the caller holds says that none of them lives."""
    if not target.exists():
        for previous in _left_behind(target, "previous")[-1:]:
            os.rename(previous, target)
    for ending in ("partial", "previous"):
        for stage in _left_behind(target, ending):
            shutil.rmtree(stage, ignore_errors=True)


def _left_behind(target: Path, ending: str) -> list[Path]:
    """Stages of this output, the oldest first; of other names beside it (``.out.notes.partial``) none."""
    head = beside(target, "").name
    found = [path for path in target.parent.glob(f"{glob.escape(head)}*.{ending}") if path.is_dir()]
    stages = [path for path in found if set(path.name.removeprefix(head).removesuffix(f".{ending}")) <= _HEX]
    return sorted(stages, key=lambda path: path.stat().st_mtime_ns)


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
    """Have the names in a directory on the disk, where its file system has a way to do that."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_FOR_DIRECTORIES:
            raise named_error(error, directory) from None
    finally:
        os.close(descriptor)
