"""The header of a safetensors file, read without trust: what it says must fit the file to the byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from weakref import WeakValueDictionary

import torch

from .documents import unambiguous

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
MAX_HEADER = 24 << 20
MAX_NAME = 2000
MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor, and for one in a file the bytes where it lies."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class _Entry(NamedTuple):
    dtype: Any
    shape: Any
    data_offsets: Any


class Header(dict[str, TensorSpec]):
    """The tensors of a file by name; one for all files of the same header and size, hence not to be changed."""

    digest = b""
    """Of the header and the size."""


_alike: WeakValueDictionary[bytes, Header] = WeakValueDictionary()


def read_header(file: BinaryIO, size: int, path: Path) -> Header:
    """The tensors of a file of ``size`` bytes, in the order of its header.

    Clients' files are mostly laid out alike: a header that another open file has is not parsed again.

    Raises:
        ValueError: the file is not a whole safetensors file, or holds a dtype that is not read.
        OSError: it cannot be read.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise _broken(path, f"{size} bytes cannot hold the header" if len(prefix) == 8 else "no header")
    if length > MAX_HEADER:
        raise _broken(path, f"a header of more than {MAX_HEADER >> 20} MiB")
    text = file.read(length)
    digest = hashlib.sha256(size.to_bytes(8, "little") + text).digest()
    if (known := _alike.get(digest)) is not None:
        return known
    specs = Header()
    for key, entry in _entries(text, path).items():
        if key != "__metadata__":
            specs[key] = _spec(path, key, entry, 8 + length)
        elif not _is_metadata(entry):
            raise _broken(path, "__metadata__ is not an object of strings")
    _check_layout(specs, 8 + length, size, path)
    specs.digest = digest
    _alike[digest] = specs
    return specs


def _entries(text: bytes, path: Path) -> Mapping[str, Any]:
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with an object")
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    found = unambiguous(pairs)
    return _Entry(**found) if found.keys() == set(_Entry._fields) else found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _spec(path: Path, key: str, entry: Any, base: int) -> TensorSpec:
    if len(key) > MAX_NAME or not key.isascii():
        _check_name(path, key)
    if not isinstance(entry, _Entry):
        raise _broken(path, f"{key}: expected dtype, shape, data_offsets and nothing else")
    if not isinstance(entry.dtype, str):
        raise _broken(path, f"{key}: dtype is not a name")
    if not _sizes(entry.shape) or not _sizes(entry.data_offsets) or len(entry.data_offsets) != 2:
        raise _broken(path, f"{key}: shape or data_offsets are not lists of sizes")
    if len(entry.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{path}: {key}: {len(entry.shape)} dimensions, more than {MAX_DIMENSIONS}, are not supported")
    if entry.dtype not in DTYPES:
        raise ValueError(f"{path}: {key}: dtype {entry.dtype} is not supported")
    start, stop = entry.data_offsets
    spec = TensorSpec(entry.dtype, tuple(entry.shape), base + start)
    if spec.nbytes != stop - start:
        raise _broken(path, f"{key}: offsets do not fit shape and dtype")
    # Without the zeros: strides are computed from this product.
    if prod(n or 1 for n in spec.shape) >= 1 << 60:
        raise ValueError(f"{path}: {key}: shape {spec.shape} is not supported")
    return spec


def _is_metadata(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return entry is None
    return all(isinstance(value, str) and _is_unicode(key) and _is_unicode(value) for key, value in entry.items())


def _is_unicode(text: str) -> bool:
    """Whether it holds no lone surrogates, which JSON can escape and UTF-8 cannot encode."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _check_name(path: Path, key: str) -> None:
    if len(key) > MAX_NAME:
        raise _broken(path, f"{key[:100]}...: a name of {len(key)} characters")
    if not _is_unicode(key):
        raise _broken(path, f"{key}: a name that is not Unicode")


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_layout(specs: Mapping[str, TensorSpec], base: int, size: int, path: Path) -> None:
    """Tensors follow each other without gap and overlap to the end of the file."""
    end = base
    for key, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if spec.start != end:
            raise _broken(path, f"{key}: its bytes do not follow those of the tensor before")
        end += spec.nbytes
    if end != size:
        raise _broken(path, f"its tensors end at byte {end} of {size}")


def _broken(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: not a whole safetensors file ({reason})")
