"""What an adapter directory holds; worked out once for all clients whose files are laid out alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ..files.tensor_header import Header
from .config import LoraSettings
from .extras import extra_roles
from .keys import sort_keys
from .layers import StoredLayer, bias_scalings, stored_layers
from .shards import TensorSource


@dataclass(frozen=True, eq=False)
class Contents:
    """The layers and other tensors of an adapter; shared between clients, hence not to be changed.

    Attributes:
        layers: by name.
        roles: of every tensor beside the factors (``mean`` included), by its name in the file.
        scalings: of the tensors that are LoRA biases.
    """

    layers: Mapping[str, StoredLayer]
    roles: Mapping[str, str]
    scalings: Mapping[str, float]


_alike: WeakValueDictionary[bytes, Contents] = WeakValueDictionary()


def contents_of(file: TensorSource, config: Mapping[str, Any], path: Path) -> Contents:
    """The contents of a file under a configuration; what other clients hold of the same is not worked out again.

    Args:
        file: the adapter's tensors.
        config: its configuration.
        path: where the configuration lies, for messages.

    Raises:
        ValueError: names file, module and what does not fit.
    """
    if not isinstance(file.specs, Header) or config.get("ensure_weight_tying"):  # tied tensors are compared by value
        return _contents(file, config, path)
    text = json.dumps(config, sort_keys=True).encode()
    key = file.specs.digest + hashlib.sha256(text).digest()
    found = _alike.get(key)
    if found is None:
        found = _alike[key] = _contents(file, config, path)
    return found


def _contents(file: TensorSource, config: Mapping[str, Any], path: Path) -> Contents:
    keys = sort_keys(file.path, file.specs)
    settings = LoraSettings.parse(config, path)
    layers = stored_layers(file, keys, settings)
    return Contents(layers, extra_roles(file, keys, settings), bias_scalings(keys, layers))
