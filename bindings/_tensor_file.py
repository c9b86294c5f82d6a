"""Safetensors files read tensor by tensor and written in one pass; nothing is mapped, nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor, and for one in a file the bytes where it lies."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorFile:
    """The header of a safetensors file, and its tensors when asked for.

    Every read opens the file anew and copies: no mapping grows with the file, and a file cut short by someone else
    is an error here instead of a bus error.

    Raises:
        ValueError: the file is not a whole safetensors file, or holds a dtype that is not read.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        self._identity = _identity(path.stat())
        _validate(path)
        self.specs = self._read_header()

    def _read_header(self) -> dict[str, TensorSpec]:
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        header.pop("__metadata__", None)
        return {key: self._spec(key, entry, 8 + length, size) for key, entry in header.items()}

    def _spec(self, key: str, entry: dict, base: int, size: int) -> TensorSpec:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{self.path}: {key}: dtype {entry['dtype']} is not supported")
        start, stop = entry["data_offsets"]
        spec = TensorSpec(entry["dtype"], tuple(entry["shape"]), base + start)
        # safe_open has checked all this; the check is repeated because the offsets come from a second parser.
        if min(spec.shape, default=0) < 0 or not 0 <= start <= stop <= size - base or spec.nbytes != stop - start:
            raise ValueError(f"{self.path}: {key}: offsets do not fit shape and dtype")
        return spec

    def read(self, key: str) -> Tensor:
        """A fresh CPU tensor with the values of ``key``.

        Raises:
            ValueError: the file has changed since its header was read.
        """
        spec = self.specs[key]
        with open(self.path, "rb") as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                raise ValueError(f"{self.path}: changed while it was being read")
            file.seek(spec.start)
            tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
            if file.readinto(_bytes_of(tensor)) != spec.nbytes:
                raise ValueError(f"{self.path}: {key}: truncated while it was being read")
        return tensor


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, asking ``read`` for one tensor at a time.

    Raises:
        ValueError: a tensor does not have the shape and dtype of its spec.
        OSError: the file cannot be written.
    """
    # Widest dtypes first, as the format's own writer does: every tensor then starts at a multiple of its item size.
    order = sorted(specs, key=lambda key: (-DTYPES[specs[key].dtype].itemsize, key))
    with open(path, "wb") as file:
        file.write(_header(specs, order))
        for key in order:
            tensor = read(key).detach().cpu().contiguous()
            if spec_of(tensor, key) != TensorSpec(specs[key].dtype, specs[key].shape):
                raise ValueError(f"{key}: {tuple(tensor.shape)} {tensor.dtype} is not what was announced: {specs[key]}")
            file.write(_bytes_of(tensor))
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


def _header(specs: Mapping[str, TensorSpec], order: list[str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in order:
        spec = specs[key]
        offsets = [offset, offset := offset + spec.nbytes]
        header[key] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _validate(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
