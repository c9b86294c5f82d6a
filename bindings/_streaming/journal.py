"""The journal of a streamed aggregation: finished results beside the output, where a run that was killed goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files.buffers import bytes_of
from ..files.documents import filed_errors
from ..files.output_lock import beside
from ..files.tensor_file import DTYPE_CODES
from ..files.tensor_header import DTYPES
from ..files.write_behind import WriteBehind
from .records import Record, Records, StoredTensor

RUN, LINES, DATA = "run.json", "done.jsonl", "results.bin"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Journal:
    """Results by key, appended as they are finished: first the bytes of the tensors, then one line that counts them.

    Results of one line come back together or not at all. A line that was cut off, or whose bytes do not have their
    checksum (a power cut may write one file and not the other), ends what comes back, and is written over.

    Args:
        directory: where it lies.
        room: bytes in front of the data that stay free for the header of the file that may be made of it.

    Attributes:
        records: the results.
        data: the file of the tensors' bytes.
    """

    def __init__(self, directory: Path, room: int = 0) -> None:
        self.directory, self.room, self.data = directory, room, directory / DATA
        self.records = Records()
        self._lines = self._open(LINES, 0o600)
        _own(self.data)
        self._data = self._open(DATA, 0o666)  # the directory is closed to others
        self._flush = WriteBehind(self._data.fileno())
        self._restore()

    def _open(self, name: str, mode: int) -> BinaryIO:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        return open(os.open(self.directory / name, flags, mode), "r+b", buffering=0)

    def close(self) -> None:
        """Close the files; they stay."""
        self._flush.close()
        self._lines.close()
        self._data.close()

    def append(self, results: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]]) -> None:
        """Add results, key -> (facts, tensors), in one line.

        Raises:
            OSError: the journal cannot be written.
        """
        self._finish(
            {
                key: Record(dict(facts), {name: self._store(tensor) for name, tensor in tensors.items()})
                for key, (facts, tensors) in results.items()
            }
        )

    def append_pieces(
        self, key: str, facts: Mapping[str, Any], shape: tuple[int, ...], pieces: Iterable[Tensor]
    ) -> None:
        """Add a tensor that arrives piece by piece (in the order of its numbers) as the result ``key``.

        Raises:
            OSError: the journal cannot be written.
        """
        start, nbytes, crc, code = self._data.seek(0, os.SEEK_END), 0, 0, ""
        for piece in pieces:
            part, code = bytes_of(piece), DTYPE_CODES[piece.dtype]
            self._write(self._data, part)
            nbytes, crc = nbytes + len(part), zlib.crc32(part, crc)
        self._finish({key: Record(dict(facts), {key: StoredTensor(code, shape, start, nbytes, crc)})})

    def read(self, key: str, name: str | None = None) -> Tensor:
        """A tensor of the result ``key``, by its name (that of ``append_pieces`` is the key).

        Raises:
            OSError: the journal cannot be read, or lost bytes since it was opened.
        """
        stored = self.records[key].tensors[key if name is None else name]
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        self._data.seek(stored.start)
        if not _fill(self._data, bytes_of(tensor)):
            raise OSError(errno.EIO, "lost bytes while it was being read", str(self.directory / DATA))
        return tensor

    def _store(self, tensor: Tensor) -> StoredTensor:
        tensor = tensor.detach().cpu().contiguous()
        part, start = bytes_of(tensor), self._data.seek(0, os.SEEK_END)
        self._write(self._data, part)
        return StoredTensor(DTYPE_CODES[tensor.dtype], tuple(tensor.shape), start, len(part), zlib.crc32(part))

    def _finish(self, records: dict[str, Record]) -> None:
        texts = {key: record.text() for key, record in records.items()}
        line = b",".join(b"%b:%b" % (json.dumps(key).encode(), text) for key, text in texts.items())
        self._lines.seek(0, os.SEEK_END)
        self._write(self._lines, memoryview(b"{%b}\n" % line))
        self.records.add(texts)  # what could not be written is not kept
        with filed_errors(self.data):
            self._flush(self._data.seek(0, os.SEEK_END))

    def _write(self, file: BinaryIO, part: memoryview) -> None:
        try:
            while part:
                part = part[file.write(part) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.directory)) from error

    def _restore(self) -> None:
        """Take over every whole line whose bytes are there, and cut off the rest."""
        end_of_lines, end_of_data = 0, self.room
        for line in self._lines:
            found = _parse(line)
            if found is None or not all(self._is_whole(t) for r in found.values() for t in r.tensors.values()):
                break
            self.records.add({key: record.text() for key, record in found.items()})
            end_of_lines += len(line)
            ends = (t.start + t.nbytes for r in found.values() for t in r.tensors.values())
            end_of_data = max(end_of_data, *ends, 0)
        with filed_errors(self.directory):
            self._lines.truncate(end_of_lines)
            self._data.truncate(end_of_data)

    def _is_whole(self, stored: StoredTensor) -> bool:
        buffer, left, crc = memoryview(bytearray(min(stored.nbytes, 1 << 20))), stored.nbytes, 0
        self._data.seek(stored.start)
        while left:
            part = buffer[: min(left, len(buffer))]
            if not _fill(self._data, part):
                return False
            left, crc = left - len(part), zlib.crc32(part, crc)
        return crc == stored.crc


@contextlib.contextmanager
def open_journal(output: Path, identity: Mapping[str, Any], *, resume: bool = True, room: int = 0) -> Iterator[Journal]:
    """The journal of the run that writes ``output``, in a hidden directory beside it; the caller holds the output.

    What an interrupted run left is taken over if its ``identity`` was the same, else discarded. The journal is
    removed when the block ends, also by an error (bad input and a full disk would fail again), but stays after an
    interrupt, a kill, or another failure of the file system.

    Args:
        output: the directory that the run is to write.
        identity: all that decides the result, JSON-ready.
        resume: False discards what an interrupted run left.
        room: as of ``Journal``.

    Raises:
        OSError: the place cannot be written.
    """
    directory = beside(Path(os.path.realpath(output)), "journal")
    try:
        text = json.dumps(identity, sort_keys=True).encode()
        _make(directory)
        if not resume or _content(directory / RUN) != text:
            _clear(directory)
            with filed_errors(directory / RUN):
                (directory / RUN).write_bytes(text)
        with contextlib.closing(Journal(directory, room)) as journal:
            yield journal
    except OSError as error:
        if error.errno in FULL:
            _remove(directory)
        raise
    except Exception:
        _remove(directory)
        raise
    _remove(directory)


def _make(directory: Path) -> None:
    """A directory of our own: not a link, which may lead anywhere."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise OSError(errno.EEXIST, "is in the way of the journal: remove it", str(directory))
    directory.mkdir(0o700, exist_ok=True)


def _own(data: Path) -> None:
    """A copy in the place of data that is an output's too: a run that was killed before it removed its journal.

    What follows may cut the file, or write to it.
    """
    if not data.is_symlink() and data.exists() and data.stat().st_nlink > 1:
        copy = data.with_name(f"{DATA}.copy")
        with filed_errors(copy):
            shutil.copyfile(data, copy)
            os.replace(copy, data)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _clear(directory: Path) -> None:
    for name in (RUN, LINES, DATA, f"{DATA}.copy"):  # the identity first: what it names is then no longer valid
        (directory / name).unlink(missing_ok=True)


def _remove(directory: Path) -> None:
    with contextlib.suppress(OSError):
        _clear(directory)
        directory.rmdir()


def _parse(line: bytes) -> dict[str, Record] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return {key: Record.of(document) for key, document in json.loads(line).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _fill(file: BinaryIO, part: memoryview) -> bool:
    """Read until ``part`` is full; False where the file ends before."""
    while part:
        count = file.readinto(part)  # type: ignore[attr-defined]
        if not count:
            return False
        part = part[count:]
    return True
