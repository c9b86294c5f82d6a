"""An adapter's tensors in one file, or in several with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..files.documents import read_json
from ..files.tensor_file import TensorFile, TensorSpec

MAX_SHARDS = 10_000


class TensorSource(Protocol):
    """What ``TensorFile`` and ``ShardedTensors`` offer."""

    @property
    def path(self) -> Path:
        """The file, or the index of several."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read, the index included."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype, shape and place of every tensor."""
        ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A fresh CPU tensor with the values of ``key``; with ``stop``, its numbers ``start:stop`` in a row."""
        ...

    def read_pair(self, first: str, second: str) -> tuple[Tensor, Tensor]:
        """Two tensors, as ``read`` returns them."""
        ...


class ShardedTensors:
    """The tensors of several safetensors files that an index lists (``adapter_model.safetensors.index.json``).

    The index must be right in every entry: each tensor that it names lies in the file it names, and no file holds
    one that it does not name there.

    Raises:
        ValueError: no such index, names that are not files beside it, or files that do not agree with it.
        OSError: a file cannot be opened.
    """

    def __init__(self, index: Path) -> None:
        self.path = index
        weight_map = _weight_map(index)
        self._files: dict[str, TensorFile] = {}
        for shard in sorted(set(weight_map.values())):
            file = self._files[shard] = TensorFile(index.parent / shard)
            listed = {key for key, name in weight_map.items() if name == shard}
            for key in sorted(listed ^ file.specs.keys()):
                fault = f"is not in {shard}" if key in listed else f"is in {shard}, where the index has it not"
                raise ValueError(f"{index}: {key}: {fault}")
        self.files = (index, *(file.path for file in self._files.values()))
        self._shard = weight_map
        self.specs = {key: self._files[shard].specs[key] for key, shard in weight_map.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A fresh CPU tensor with the values of ``key``; with ``stop``, its numbers ``start:stop`` in a row.

        Raises:
            ValueError: the file has changed since its header was read.
        """
        return self._files[self._shard[key]].read(key, start, stop)

    def read_pair(self, first: str, second: str) -> tuple[Tensor, Tensor]:
        """Two tensors, as ``read`` returns them."""
        if self._shard[first] != self._shard[second]:
            return self.read(first), self.read(second)
        return self._files[self._shard[first]].read_pair(first, second)


def _weight_map(index: Path) -> dict[str, str]:
    document = read_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected an object 'weight_map' from tensors to files")
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise ValueError(f"{index}: {key}: expected the name of a safetensors file beside the index, got {shard!r}")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise ValueError(f"{index}: names more than {MAX_SHARDS} files")
    return weight_map
