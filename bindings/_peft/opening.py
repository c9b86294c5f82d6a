"""Adapter directories found and opened: headers and configuration are checked, tensors read when they are asked for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fedgram.flora_na import Adapter, LoraLayer

from ..files.tensor_file import TensorFile
from .config import IN_FILES, read_config, refuse_other_kinds
from .contents import contents_of
from .layers import LastPair, read_update
from .lazy_tensors import LazyMapping, LazyTensors
from .merging import AdapterConfig
from .shards import ShardedTensors, TensorSource

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"


def open_adapter(path: Path, adapter_name: str | None, *, allow_dora: bool = False, initial: bool = False) -> Adapter:
    """``load_adapter`` without its warning; ``initial``: the initial factors are the caller's to subtract.

    Raises:
        ValueError, OSError: as ``load_adapter``.
    """
    folder = _adapter_folder(path, adapter_name)
    config = read_config(folder / CONFIG_NAME)
    handled = IN_FILES | {"use_dora"} if allow_dora else IN_FILES
    refuse_other_kinds(config, folder / CONFIG_NAME, handled=handled, initial=initial)
    file = _open_tensors(folder)
    contents = contents_of(file, config, folder / CONFIG_NAME)
    kept = LastPair(file)

    def layer(name: str) -> LoraLayer:
        stored = contents.layers[name]  # held by the adapter for as long as others may share it
        return kept.layer(stored) if stored.name.experts > 1 else stored.read(file)

    def sizes(name: str) -> tuple[int, int, int]:
        return contents.layers[name].sizes(file)

    def extra(key: str) -> Tensor:
        scaling = contents.scalings.get(key)
        return file.read(key) if scaling is None else read_update(file, key, scaling)

    special = {key: role for key, role in contents.roles.items() if role != "mean"}
    extras = LazyTensors(sorted(contents.roles), extra, file, contents.scalings)
    files = (folder / CONFIG_NAME, *file.files)
    return Adapter(LazyMapping(contents.layers, layer, files, sizes), extras, AdapterConfig(config), special)


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


def _open_tensors(folder: Path) -> TensorSource:
    if (folder / WEIGHTS_NAME).exists():
        return TensorFile(folder / WEIGHTS_NAME)
    if (folder / INDEX_NAME).exists():
        return ShardedTensors(folder / INDEX_NAME)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickled:
        raise ValueError(f"{folder / pickled[0]}: a pickle, which is never opened: save it as {WEIGHTS_NAME}")
    raise ValueError(f"{folder}: no {WEIGHTS_NAME}")
