"""Adapter directories of PEFT, read and written without PEFT and without the base model.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``. Linear LoRA layers are read, with
alpha / r, rsLoRA, ``rank_pattern`` and ``alpha_pattern``, and the full tensors of ``modules_to_save`` and ``bias``.
Every other kind of adapter is refused by name. Pickled files are never opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedgram.flora_na import Adapter, LoraLayer

from ._peft_config import PREFIX, LoraSettings, read_config, refuse_other_kinds
from ._peft_keys import check_factors, check_others, sort_keys
from ._peft_output import check_shared, merge_configs, output_config
from ._staging import check_writable, staged_directory
from ._tensor_file import TensorFile, TensorSpec, spec_of, write_tensors

__all__ = ["check_compatible", "check_output", "load_adapter", "load_adapters", "merge_configs", "save_adapter"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OUTPUT_FILES = frozenset({CONFIG_NAME, WEIGHTS_NAME})

T = TypeVar("T")
PathLike = str | os.PathLike[str]


class LazyMapping(Mapping[str, T]):
    """A mapping that makes its values when they are asked for and keeps none."""

    def __init__(self, names: Sequence[str], make: Callable[[str], T]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_adapter(path: PathLike, adapter_name: str | None = None) -> Adapter:
    """Open an adapter directory of PEFT.

    Headers and configuration are read and checked now; a layer's tensors are read from the file each time the layer
    is asked for, and not kept.

    Args:
        path: the directory.
        adapter_name: for a directory of several adapters, the one to read (PEFT keeps ``default`` in the directory
            itself and every other one in a subdirectory of its name).

    Returns:
        An Adapter: ``modules`` by the module's name in the base model, each with its own scaling; ``extras`` by the
        tensor's name in the file; ``config`` as the file states it.

    Raises:
        ValueError: names file, module and reason: no such adapter, broken file, ranks that do not fit the
            configuration, or a kind of adapter that is not supported (DoRA, embeddings, convolutions, ...).
        OSError: a file cannot be read.
    """
    folder = _adapter_folder(Path(path), adapter_name)
    config = read_config(folder / CONFIG_NAME)
    file = TensorFile(_weights_path(folder))
    keys = sort_keys(file)
    refuse_other_kinds(config, folder / CONFIG_NAME)
    settings = LoraSettings.parse(config, folder / CONFIG_NAME)
    check_factors(file, keys, settings)
    check_others(file, keys, settings)

    def layer(module: str) -> LoraLayer:
        A, B = (file.read(keys.factors[module][side]) for side in "AB")
        return LoraLayer(A=A, B=B, scaling=settings.scaling(module, A.shape[0]))

    return Adapter(LazyMapping(list(keys.factors), layer), LazyMapping(keys.others, file.read), config)


def load_adapters(paths: Sequence[PathLike]) -> list[Adapter]:
    """Open the clients' directories and check that they belong together.

    Raises:
        ValueError: as ``load_adapter`` and ``check_compatible``; or no directory, or one given twice.
    """
    if not paths:
        raise ValueError("no adapter directories given")
    seen: dict[str, PathLike] = {}
    for path in paths:
        if (first := seen.setdefault(os.path.realpath(path), path)) is not path:
            raise ValueError(f"{path}: given twice ({first} is the same directory)")
    adapters = [load_adapter(path) for path in paths]
    check_compatible(adapters, [str(path) for path in paths])
    return adapters


def check_compatible(adapters: Sequence[Adapter], names: Sequence[str] | None = None) -> None:
    """Refuse adapters of different base models, task types or peft types (those without configuration pass).

    Raises:
        ValueError: names the two clients and the field.
    """
    labels = [f"client {i}" for i in range(len(adapters))] if names is None else names
    check_shared([adapter.config for adapter in adapters], labels)


def check_output(path: PathLike) -> None:
    """Check, before long work, that an adapter can be written to ``path``: makes and removes one beside it.

    Raises:
        ValueError: ``path`` is a file, or a directory that holds other files than an adapter's two.
        OSError: the place cannot be written.
    """
    check_writable(path, OUTPUT_FILES)


def save_adapter(adapter: Adapter, path: PathLike, *, config: Mapping[str, Any] | None = None) -> None:
    """Write an adapter directory that ``PeftModel.from_pretrained`` loads.

    Every layer is written with scaling 1: its own scaling is multiplied into lora_B (one rounding), ``lora_alpha``
    is the rank, and ``rank_pattern`` with an equal ``alpha_pattern`` names the modules of other ranks. The directory
    appears by one rename: an interrupted run leaves the previous output whole.

    Args:
        adapter: the layers are asked for one at a time, twice if the mapping is lazy. Layers of rank 0 are written
            as one row of zeros, since PEFT has no rank 0.
        path: a new directory, or one that holds nothing but an earlier output.
        config: configuration to write in place of ``adapter.config``; ranks, scalings and initialisation in it are
            overruled, ``target_modules`` kept where it matches the layers.

    Raises:
        ValueError: no layers, extras that the configuration does not declare, a layer that is not finite after
            scaling, or an output directory that holds other files.
        OSError: the output cannot be written.
    """
    if not adapter.modules:
        raise ValueError("adapter: holds no layers")
    ranks, specs = _layer_specs(adapter)
    extras = _extra_specs(adapter)
    document = output_config(config or adapter.config, ranks, [key.removeprefix(PREFIX) for key in extras])

    def tensor(key: str) -> Tensor:
        return adapter.extras[key] if key in extras else _unit_factor(adapter, key)

    with staged_directory(path, OUTPUT_FILES) as stage:
        write_tensors(stage / WEIGHTS_NAME, specs | extras, tensor)
        _write_json(stage / CONFIG_NAME, document)


def _layer_specs(adapter: Adapter) -> tuple[dict[str, int], dict[str, TensorSpec]]:
    ranks, specs = {}, {}
    for module, layer in adapter.modules.items():
        ranks[module] = max(layer.rank, 1)
        dtype, (m, n) = spec_of(layer.A, module).dtype, layer.shape
        specs[f"{PREFIX}{module}.lora_A.weight"] = TensorSpec(dtype, (ranks[module], n))
        specs[f"{PREFIX}{module}.lora_B.weight"] = TensorSpec(dtype, (m, ranks[module]))
    return ranks, specs


def _extra_specs(adapter: Adapter) -> dict[str, TensorSpec]:
    for key in adapter.extras:
        if not key.startswith(PREFIX):
            raise ValueError(f"extras: {key!r}: names of PEFT start with {PREFIX!r}")
    return {key: spec_of(tensor, key) for key, tensor in adapter.extras.items()}


def _unit_factor(adapter: Adapter, key: str) -> Tensor:
    """One factor of a layer of scaling 1."""
    module, side = key.removeprefix(PREFIX).removesuffix(".weight").rsplit(".lora_", 1)
    layer = adapter.modules[module]
    factor = (layer.A if side == "A" else layer.B).detach().cpu()
    if layer.rank == 0:
        m, n = layer.shape
        return torch.zeros((1, n) if side == "A" else (m, 1), dtype=factor.dtype)
    if side == "B" and layer.scaling != 1:
        # In float64, then one rounding: a float16 product with a large scaling must not pass through float16 twice.
        factor = (factor.double() * layer.scaling).to(factor.dtype)
    if not bool(torch.isfinite(factor).all()):
        raise ValueError(f"{module}: lora_{side} holds NaN or Inf (scaling {layer.scaling:g} in {factor.dtype})")
    return factor


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _adapter_folder(path: Path, adapter_name: str | None) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
    if adapter_name in (None, "default"):
        if not (path / CONFIG_NAME).exists():
            inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_NAME}"))
            hint = f"; it holds the adapters {', '.join(inside)}: name one" if inside else ""
            raise ValueError(f"{path}: not an adapter of PEFT: no {CONFIG_NAME}{hint}")
        return path
    if not adapter_name or Path(adapter_name).name != adapter_name or adapter_name == "..":
        raise ValueError(f"adapter_name: expected the name of a subdirectory, got {adapter_name!r}")
    if not (path / adapter_name / CONFIG_NAME).exists():
        raise ValueError(f"{path}: no adapter {adapter_name!r}")
    return path / adapter_name


def _weights_path(folder: Path) -> Path:
    if (folder / WEIGHTS_NAME).exists():
        return folder / WEIGHTS_NAME
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickled:
        raise ValueError(f"{folder / pickled[0]}: a pickle, which is never opened: save it as {WEIGHTS_NAME}")
    if (folder / f"{WEIGHTS_NAME}.index.json").exists():
        raise ValueError(f"{folder}: sharded safetensors files are not supported")
    raise ValueError(f"{folder}: no {WEIGHTS_NAME}")
