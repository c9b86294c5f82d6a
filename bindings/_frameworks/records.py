"""State dicts to Flower's records and back, at the edge: bfloat16 and LoRA settings included.

Flower stores arrays through numpy, which has no bfloat16: ``ArrayRecord(state_dict)`` raises TypeError on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .flower_compat import Array, ArrayRecord, ConfigRecord, RecordDict

PACKED = "fedgram.bfloat16"
"""``stype`` of packed arrays. Flower's own ``Array.numpy()`` refuses it: nothing takes the bits for numbers."""
CONFIG_KEY = "lora-config"


def to_arrays(state_dict: Mapping[str, Tensor], *, pack_bf16: bool = False) -> ArrayRecord:
    """A state dict as an ``ArrayRecord``, for ``get_peft_model_state_dict(model)`` or ``model.state_dict()``.

    Args:
        state_dict: name -> tensor, on any device.
        pack_bf16: bfloat16 tensors travel as float32 by default: exact, twice the bytes, and readable by every
            strategy and client. ``True`` sends their two bytes a value, which only ``to_state_dict`` can read
            (Flower's own ``numpy()`` raises TypeError on them).

    Raises:
        ValueError: names the entry that is no tensor, or of a type that records do not carry (float8, sparse, ...).
    """
    record = ArrayRecord()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state_dict: {name}: expected a tensor, got {type(tensor).__name__}")
        record[name] = _packed(tensor) if pack_bf16 and tensor.dtype == torch.bfloat16 else _array(name, tensor)
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
    fields = config if isinstance(config, Mapping) else getattr(config, "to_dict", lambda: None)()
    if not isinstance(fields, Mapping):
        raise ValueError(f"config: expected a peft.LoraConfig or a mapping, got {type(config).__name__}")
    return ConfigRecord({CONFIG_KEY: json.dumps(dict(fields), default=_plain)})


def sent_lora_config(content: RecordDict, label: str) -> dict[str, Any] | None:
    """The settings that a reply brings by ``lora_record``, or None.

    Raises:
        ValueError: they are not the JSON of an object.
    """
    texts = [record[CONFIG_KEY] for record in content.config_records.values() if CONFIG_KEY in record]
    if not texts:
        return None
    try:
        config = json.loads(str(texts[0]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label}: {CONFIG_KEY}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{label}: {CONFIG_KEY}: expected a JSON object, got {type(config).__name__}")
    return config


def _plain(value: Any) -> Any:
    """What JSON has no form for: sets of names in order, everything else as its text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _array(name: str, tensor: Tensor) -> Array:
    values = tensor.detach().cpu()
    try:
        return Array((values.float() if values.dtype == torch.bfloat16 else values).numpy())
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"state_dict: {name}: {tensor.dtype} cannot be sent in a record ({error})") from error


def _packed(tensor: Tensor) -> Array:
    bits = tensor.detach().cpu().view(torch.int16).numpy().astype("<i2", copy=False)
    return Array(dtype="bfloat16", shape=tuple(tensor.shape), stype=PACKED, data=bits.tobytes())


def _tensor(array: Array, label: str) -> Tensor:
    try:
        if array.stype == PACKED:
            bits = np.frombuffer(array.data, dtype="<i2").astype(np.int16)
            return torch.from_numpy(bits.reshape(array.shape)).view(torch.bfloat16)
        values = array.numpy()
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{label}: not an array that can be read ({error})") from error
