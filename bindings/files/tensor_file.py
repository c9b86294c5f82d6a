"""Safetensors files read tensor by tensor and written in one pass; nothing is mapped, nothing is unpickled."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .buffers import Buffer, bytes_of, empty_buffer, tensor_in
from .documents import filed_errors, named_error, open_regular
from .kept_file import KeptFile
from .tensor_header import DTYPES, TensorSpec, read_header

DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorFile:
    """The header of a safetensors file, and its tensors when asked for.

    Every read copies: no mapping grows with the file, and a file cut short by someone else is an error here instead of
    a bus error. The file stays open as long as it is among those read last (``KeptFile``). The header is checked as
    strictly as the format's own reader does it, and further: no tensor twice, no name longer than 2,000 characters,
    nothing between tensors, and at most 24 MiB.

    Raises:
        ValueError: the file is not a whole safetensors file, or holds a dtype that is not read.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, (path,)
        self._file = KeptFile(path)
        with open_regular(path) as file, filed_errors(path):
            status = os.fstat(file.fileno())
            self._identity = _identity(status)
            self.specs = read_header(file, status.st_size, path)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A fresh CPU tensor with the values of ``key``; with ``stop``, its numbers ``start:stop`` in a row.

        Raises:
            ValueError: the file has changed since its header was read.
        """
        spec = self.specs[key]
        if stop is not None:
            spec = TensorSpec(spec.dtype, (stop - start,), spec.start + start * DTYPES[spec.dtype].itemsize)
        return tensor_in(self._bytes(spec.start, spec.nbytes, key), DTYPES[spec.dtype], spec.shape)

    def read_pair(self, first: str, second: str) -> tuple[Tensor, Tensor]:
        """Two tensors, as ``read`` returns them; where they are neighbours of one type, in one go and memory."""
        a, b = self.specs[first], self.specs[second]
        size = a.nbytes
        if a.dtype != b.dtype or b.start != a.start + size:
            return self.read(first), self.read(second)
        buffer, dtype = self._bytes(a.start, size + b.nbytes, first), DTYPES[a.dtype]
        return tensor_in(buffer, dtype, a.shape), tensor_in(buffer, dtype, b.shape, size)

    def _bytes(self, start: int, nbytes: int, key: str) -> Buffer:
        """Bytes of the file, ``key``'s first."""
        try:
            buffer = empty_buffer(nbytes)
        except (OSError, MemoryError, ValueError, OverflowError) as error:
            raise OSError(errno.ENOMEM, f"no memory for {nbytes} bytes", f"{self.path}: {key}") from error
        descriptor = self._file.acquire()
        try:
            if _identity(os.fstat(descriptor)) != self._identity:
                raise ValueError(f"{self.path}: changed while it was being read")
            if not self._file.read_into(buffer, start):
                raise ValueError(f"{self.path}: {key}: truncated while it was being read")
        except OSError as error:
            raise named_error(error, self.path) from None
        finally:
            self._file.release()
        return buffer


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, asking ``read`` for one tensor at a time.

    Raises:
        ValueError: a tensor does not have the shape and dtype of its spec.
        OSError: the file cannot be written.
    """
    # Widest dtypes first, as the format's own writer does: every tensor then starts at a multiple of its item size.
    order = sorted(specs, key=lambda key: (-DTYPES[specs[key].dtype].itemsize, key))
    with open(path, "wb") as file:
        header = header_of(specs, order)
        assert header is not None
        with filed_errors(path):
            file.write(header)
        for key in order:
            tensor = read(key).detach().cpu().contiguous()
            if spec_of(tensor, key) != TensorSpec(specs[key].dtype, specs[key].shape):
                raise ValueError(f"{key}: {tuple(tensor.shape)} {tensor.dtype} is not what was announced: {specs[key]}")
            with filed_errors(path):
                file.write(bytes_of(tensor))
        with filed_errors(path):
            file.flush()
            os.fsync(file.fileno())


def spec_of(tensor: Tensor, key: str) -> TensorSpec:
    """The spec of a tensor in memory.

    Raises:
        ValueError: its dtype cannot be stored.
    """
    if tensor.dtype not in DTYPE_CODES:
        raise ValueError(f"{key}: dtype {tensor.dtype} is not supported in an adapter file")
    return TensorSpec(DTYPE_CODES[tensor.dtype], tuple(tensor.shape))


def header_of(specs: Mapping[str, TensorSpec], order: Sequence[str], room: int | None = None) -> bytes | None:
    """The header of a file that holds these tensors in this order; of ``room`` bytes, or None where that is too few."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    entries = ['"__metadata__":{"format":"pt"}']  # as text: objects of ten thousands of tensors take megabytes
    offset = 0
    for key in order:
        spec = specs[key]
        offsets = [offset, offset := offset + spec.nbytes]
        entry = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
        entries.append(f"{encode(key)}:{encode(entry)}")
    text = f"{{{','.join(entries)}}}".encode()
    length = len(text) + -len(text) % 8 if room is None else room - 8
    return length.to_bytes(8, "little") + text.ljust(length) if len(text) <= length else None


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
