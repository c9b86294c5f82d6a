"""State dicts to Flower's records and back, at the edge: bfloat16 and LoRA settings included.

Flower stores arrays through numpy, which has no bfloat16: ``ArrayRecord(state_dict)`` raises TypeError on it.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files.documents import parse_json
from .arrays import from_numpy, to_numpy
from .flower_compat import Array, ArrayRecord, ConfigRecord, RecordDict
from .options import plain_config

PACKED = "fedgram.bfloat16"
"""``stype`` of packed arrays. Flower's own ``Array.numpy()`` refuses it: nothing takes the bits for numbers."""
NUMPY = "numpy.ndarray"
CONFIG_KEY = "lora-config"


def to_arrays(state_dict: Mapping[str, Tensor], *, pack_bf16: bool = False) -> ArrayRecord:
    """A state dict as an ``ArrayRecord``, for ``get_peft_model_state_dict(model)`` or ``model.state_dict()``.

    Args:
        state_dict: name -> tensor, on any device.
        pack_bf16: bfloat16 tensors travel as float32 by default: exact, twice the bytes, and readable by every
            strategy and client. ``True`` sends their two bytes a value, which only ``to_state_dict`` can read
            (Flower's own ``numpy()`` raises TypeError on them).

    Raises:
        ValueError: names the entry that is no tensor, or of a kind that records do not carry (float8, sparse, on
            meta, ...).
    """
    record = ArrayRecord()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state_dict: {name}: expected a tensor, got {type(tensor).__name__}")
        try:
            record[name] = _packed(tensor) if pack_bf16 and tensor.dtype == torch.bfloat16 else Array(to_numpy(tensor))
        except (TypeError, RuntimeError) as error:
            kind = f"{tensor.dtype}, {'meta' if tensor.is_meta else tensor.layout}"
            raise ValueError(f"state_dict: {name}: {kind}: cannot be sent in a record ({error})") from error
    return record


def to_state_dict(arrays: ArrayRecord, *, label: str = "arrays") -> dict[str, Tensor]:
    """An ``ArrayRecord`` as a state dict on the CPU; packed arrays come back as bfloat16.

    Load it with ``set_peft_model_state_dict`` or ``load_state_dict``: both round to the model's own dtype.

    Args:
        arrays: from ``to_arrays``, or any record of numpy arrays.
        label: who sent it, for messages.

    Raises:
        ValueError: names the array that cannot be read.
    """
    return {name: _tensor(array, f"{label}: {name}") for name, array in arrays.items()}


def lora_record(config: Any) -> ConfigRecord:
    """A client's LoRA settings for its reply, so that the server knows its scalings: alpha, rank, rsLoRA, patterns.

    Put it beside arrays and metrics, under any name: ``RecordDict({"arrays": .., "metrics": .., "lora":
    lora_record(config)})``.

    Args:
        config: a ``peft.LoraConfig``, or the mapping in ``adapter_config.json``.

    Raises:
        ValueError: it is neither.
    """
    return ConfigRecord({CONFIG_KEY: json.dumps(plain_config(config))})


def sent_lora_config(content: RecordDict, label: str) -> dict[str, Any] | None:
    """The settings that a reply brings by ``lora_record``, or None.

    Raises:
        ValueError: they are not the JSON of an object.
    """
    texts = [record[CONFIG_KEY] for record in content.config_records.values() if CONFIG_KEY in record]
    if not texts:
        return None
    config = parse_json(str(texts[0]).encode("utf-8", "surrogatepass"), f"{label}: {CONFIG_KEY}")
    if not isinstance(config, dict):
        raise ValueError(f"{label}: {CONFIG_KEY}: expected a JSON object, got {type(config).__name__}")
    return config


def _packed(tensor: Tensor) -> Array:
    bits = tensor.detach().cpu().view(torch.int16).numpy().astype("<i2", copy=False)
    return Array(dtype="bfloat16", shape=tuple(tensor.shape), stype=PACKED, data=bits.tobytes())


def _tensor(array: Array, label: str) -> Tensor:
    try:
        if array.stype == PACKED:
            return _unpacked(array)
        if array.stype == NUMPY:  # any other is refused by Flower's own ``numpy()``
            _check_size(array.data)
        return from_numpy(array.numpy())
    except Exception as error:  # numpy's parser of headers raises whatever Python's tokenizer and memory do
        raise ValueError(f"{label}: not an array that can be read ({str(error) or type(error).__name__})") from error


def _unpacked(array: Array) -> Tensor:
    bits = np.frombuffer(array.data, dtype="<i2").astype(np.int16)
    if any(size < 0 for size in array.shape):  # numpy would take it for a size to be found out
        raise ValueError(f"shape {tuple(array.shape)}")
    return torch.from_numpy(bits.reshape(array.shape)).view(torch.bfloat16)


def _check_size(data: bytes) -> None:
    """See that it is one array of the size that its header states: numpy would open archives, and make room first.

    Raises:
        ValueError: it is not.
    """
    file = io.BytesIO(data)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of numpy's format")
    shape, _, dtype = readers[version](file)
    stated, held = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if stated != held:
        raise ValueError(f"its header states {stated} bytes of numbers, and it has {held}")
