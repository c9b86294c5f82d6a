"""Objects that hold tensors, as one buffer of bytes that any backend can carry, and back."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Every tensor starts at a multiple of this, so that its bytes can be read in place as any dtype."""


def pack(value: Any, device: torch.device) -> Tensor:
    """``value`` as uint8 on ``device``: the length of a header, the header, then the bytes of its tensors.

    Tensors are detached and made contiguous; where they lie (CPU or accelerator) is kept, the device's number is not.
    """
    writer = _Pickler(header := io.BytesIO())
    writer.dump(value)
    text = header.getvalue()
    text += b"\0" * (-len(text) % ALIGNMENT)
    start = torch.frombuffer(bytearray(len(text).to_bytes(ALIGNMENT, "little") + text), dtype=torch.uint8)
    return torch.cat([start.to(device), *(_padded(tensor, device) for tensor in writer.tensors)])


def unpack(parcel: Tensor) -> Any:
    """What ``pack`` was given. Tensors are views of ``parcel``, or copies where they belong on another device.

    Parcels are pickles: they come from the ranks of one job, as those of torch's own object collectives do.
    """
    length = int.from_bytes(_bytes(parcel[:ALIGNMENT]), "little")
    stop = ALIGNMENT + length
    return _Unpickler(io.BytesIO(_bytes(parcel[ALIGNMENT:stop])), parcel[stop:]).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.offset = 0

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        place = (self.offset, value.dtype, tuple(value.shape), value.device.type)
        self.tensors.append(value)
        self.offset += _aligned(value.numel() * value.itemsize)
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, data: Tensor) -> None:
        super().__init__(file)
        self.data = data

    def persistent_load(self, place: Any) -> Tensor:
        offset, dtype, shape, kind = place
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.data[offset : offset + count].view(dtype).view(shape).to(here(kind))


def here(kind: str) -> torch.device:
    """The device of that kind that this process works on."""
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _padded(tensor: Tensor, device: torch.device) -> Tensor:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(device)
    return torch.nn.functional.pad(raw, (0, -raw.numel() % ALIGNMENT)) if raw.numel() % ALIGNMENT else raw


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
