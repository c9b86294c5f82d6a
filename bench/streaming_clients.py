"""Adapters written to be aggregated from disk: of a language model's shapes, and in no cache."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedgram.bindings.files.tensor_file import write_tensors
from fedgram.bindings.files.tensor_header import TensorSpec

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""How a file calls the dtypes that the factors may have; PEFT keeps them in float32 unless told otherwise."""


@dataclass(frozen=True)
class Written:
    """The adapters to be written.

    Attributes:
        clients, layers, rank: how many adapters, of how many layers, of which rank.
        shapes: (m, n) of the modules of a layer, by name.
        dtype: of the factors, one of ``DTYPES``.
    """

    clients: int
    layers: int
    rank: int
    shapes: Mapping[str, tuple[int, int]]
    dtype: str = "float32"

    @staticmethod
    def of_size(
        gigabytes: float, clients: int, rank: int, shapes: Mapping[str, tuple[int, int]], dtype: str
    ) -> Written:
        """With as many layers as make up the given size (10^9 bytes)."""
        one = Written(clients, 1, rank, shapes, dtype)
        return replace(one, layers=max(1, round(gigabytes * 1e9 / one.nbytes)))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as torch has it."""
        return getattr(torch, self.dtype)

    def module_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a module of that shape (m, n) in all adapters."""
        return self.clients * self.rank * sum(shape) * self.torch_dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all factors together."""
        return self.layers * sum(map(self.module_bytes, self.shapes.values()))


def write_clients(root: Path, written: Written) -> list[Path]:
    """Adapter directories of random factors around a part that all clients share; no file is held whole."""
    common = torch.Generator().manual_seed(0)
    shared = {s: torch.randn(2, written.rank, max(s), generator=common) for s in sorted(set(written.shapes.values()))}
    dirs = []
    for client in range(written.clients):
        directory = root / f"client-{client:04d}"
        directory.mkdir(parents=True)
        _write_client(directory, client, written, shared)
        dirs.append(directory)
    return dirs


def _write_client(
    directory: Path, client: int, written: Written, shared: Mapping[tuple[int, int], torch.Tensor]
) -> None:
    generator, rank = torch.Generator().manual_seed(1 + client), written.rank
    made: dict[str, tuple[tuple[int, int], int]] = {}
    for layer in range(written.layers):
        for name, shape in written.shapes.items():
            for side in range(2):
                made[f"base_model.model.model.layers.{layer}.{name}.lora_{'AB'[side]}.weight"] = (shape, side)
    specs = {
        key: TensorSpec(DTYPES[written.dtype], (rank, shape[1]) if side == 0 else (shape[0], rank))
        for key, (shape, side) in made.items()
    }

    def tensor(key: str) -> torch.Tensor:
        (shape, side), size = made[key], specs[key].shape
        part = shared[shape][side, :, : max(size)].reshape(rank, -1)
        values = part + torch.randn(part.shape, generator=generator)
        return (0.02 * (values if side == 0 else values.T)).to(written.torch_dtype)

    path = directory / "adapter_model.safetensors"
    write_tensors(path, specs, tensor)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(written.shapes)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    drop_cached(path)


def drop_cached(path: Path) -> None:
    """Ask the system to forget a file that is on disk, so that it must be read again."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
