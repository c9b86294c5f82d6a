"""Adapter directories of PEFT, read and written without PEFT and without the base model.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or several such files and an index). Read
exactly are LoRA of linear maps, embeddings, convolutions and the parameters of ``target_parameters`` (experts one by
one), with alpha / r, rsLoRA and patterns; and beside them ``lora_bias``, ``modules_to_save``, ``bias``, trainable
tokens and tied weights. DoRA, and initialisations that change the base weights, are read on demand; every other kind
is refused by name. Pickled files are never opened. ``_peft.names`` says how layers are named.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fedgram.flora_na import Adapter, AdapterLike, LoraLayer
from fedgram.flora_na.layer import as_adapter

from ._peft.config import IN_FILES, PREFIX, read_config, refuse_other_kinds
from ._peft.contents import contents_of
from ._peft.initial import check_same_start, since
from ._peft.layers import LastPair, read_update
from ._peft.layout import FileLayout, LayerShape
from ._peft.lazy_tensors import LazyMapping, LazyTensors
from ._peft.merging import BASE, AdapterConfig, check_residual, check_shared, merge_configs
from ._peft.output import output_config
from ._peft.shards import ShardedTensors, TensorSource
from ._peft.stored_layers import StoredLayers
from .files.documents import filed_errors
from .files.staging import check_writable, staged_directory
from .files.tensor_file import TensorFile, TensorSpec, spec_of, write_tensors

__all__ = [
    "check_compatible",
    "check_output",
    "load_adapter",
    "load_adapters",
    "load_global",
    "merge_configs",
    "save_adapter",
    "save_residual",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
OUTPUT_FILES = frozenset({CONFIG_NAME, WEIGHTS_NAME})

T = TypeVar("T")
PathLike = str | os.PathLike[str]


def load_adapter(
    path: PathLike, adapter_name: str | None = None, *, allow_dora: bool = False, init: PathLike | None = None
) -> Adapter:
    """Open an adapter directory of PEFT.

    Headers and configuration are read and checked now; a layer's tensors are read from the file each time the layer
    is asked for, and not kept (but of experts, the last module's).

    Args:
        path: the directory.
        adapter_name: for a directory of several adapters, the one to read (PEFT keeps ``default`` in the directory
            itself and every other one in a subdirectory of its name).
        allow_dora: read DoRA: ``B A`` as LoRA, the magnitudes as full tensors to be averaged. Both together are not
            the mean of the clients' weights, so this warns.
        init: directory of the adapter as it was initialised, for PiSSA, OLoRA, CorDA and LoRA-GA: every layer is then
            the update ``s (B A - B0 A0)`` of the original base weights, of twice the rank.

    Returns:
        An Adapter: ``modules`` by the module's name in the base model, each with its own scaling (names of other kinds
        than linear maps end in a bracket that says the kind); ``extras`` by the tensor's name in the file;
        ``config`` as the file states it; aggregating refuses clients that ``check_compatible`` refuses, and gives the
        result the configuration that ``merge_configs`` makes.

    Raises:
        ValueError: names file, module and reason: no such adapter, broken file, ranks that do not fit the
            configuration, or a kind of adapter that is not supported.
        OSError: a file cannot be read.
    """
    start = None if init is None else _open(Path(init), None, allow_dora=allow_dora, initial=True)
    adapter = _open(Path(path), adapter_name, allow_dora=allow_dora, initial=start is not None)
    _warn_of_dora([adapter], [path])
    return adapter if start is None else since(adapter, start, str(path))


def load_adapters(
    paths: Sequence[PathLike],
    *,
    adapter_name: str | None = None,
    allow_dora: bool = False,
    init: PathLike | None = None,
) -> list[Adapter]:
    """Open the clients' directories and check that they belong together.

    Args:
        paths: one directory per client.
        adapter_name, allow_dora, init: as in ``load_adapter``, for every client.

    Raises:
        ValueError: as ``load_adapter`` and ``check_compatible``; or no directory, or one given twice.
    """
    if not paths:
        raise ValueError("no adapter directories given")
    seen: dict[str, PathLike] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"{path}: given twice ({seen[real]} is the same directory)")
        seen[real] = path
    labels = [str(path) for path in paths]
    start = None if init is None else _open(Path(init), None, allow_dora=allow_dora, initial=True)
    adapters = [_open(Path(p), adapter_name, allow_dora=allow_dora, initial=start is not None) for p in paths]
    check_compatible(adapters, labels)
    _warn_of_dora(adapters, paths)
    if start is None:
        return adapters
    check_same_start([adapter.config for adapter in adapters], labels)
    return [since(adapter, start, label) for adapter, label in zip(adapters, labels, strict=True)]


def _open(path: Path, adapter_name: str | None, *, allow_dora: bool = False, initial: bool = False) -> Adapter:
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

    def extra(key: str) -> Tensor:
        scaling = contents.scalings.get(key)
        return file.read(key) if scaling is None else read_update(file, key, scaling)

    special = {key: role for key, role in contents.roles.items() if role != "mean"}
    extras = LazyTensors(sorted(contents.roles), extra, file, contents.scalings)
    files = (folder / CONFIG_NAME, *file.files)
    return Adapter(LazyMapping(contents.layers, layer, files), extras, AdapterConfig(config), special)


def _warn_of_dora(adapters: Sequence[Adapter], paths: Sequence[PathLike]) -> None:
    found = [path for path, adapter in zip(paths, adapters, strict=True) if (adapter.config or {}).get("use_dora")]
    if found:
        warnings.warn(
            f"{found[0]}: DoRA: the low-rank parts are aggregated and the magnitudes averaged by weight, which is not "
            "the mean of the clients' weights",
            stacklevel=3,
        )


def check_compatible(adapters: Sequence[AdapterLike], names: Sequence[str] | None = None) -> None:
    """Refuse adapters of different base models, task types or peft types (those without configuration pass).

    Raises:
        ValueError: names the two clients and the field. Also refused: different ``target_parameters``, token indices
            or DoRA, and experts of PEFT before and after 0.19, which lays them out differently.
    """
    labels = [f"client {i}" for i in range(len(adapters))] if names is None else names
    check_shared([as_adapter(adapter).config for adapter in adapters], labels)


def load_global(
    path: PathLike, clients: Sequence[Adapter], name: str, *, allow_dora: bool = False, covered: bool = False
) -> Adapter:
    """Open an earlier global adapter that the clients' updates are taken together with (anchor, align_to).

    Args:
        path: its directory.
        clients: as ``load_adapters`` returns them.
        name: what the first of them is called.
        allow_dora: as in ``load_adapter``.
        covered: refuse modules that no client has. Of an anchor, which the result takes the place of, they would be
            lost.

    Raises:
        ValueError, OSError: as ``load_adapter``; or it is an adapter of another base model, or its experts lie
            otherwise.
    """
    adapter = load_adapter(path, allow_dora=allow_dora)
    check_shared([clients[0].config, adapter.config], [name, str(path)], BASE)
    for module in adapter.modules if covered else ():
        if not any(module in client.modules for client in clients):
            raise ValueError(
                f"{path}: {module}: no client has this module, and so the result would not; "
                "missing='renormalize' or 'zero' (--missing) leaves it out"
            )
    return adapter


def check_output(path: PathLike) -> None:
    """Check, before long work, that an adapter can be written to ``path``: makes and removes one beside it.

    Raises:
        ValueError: ``path`` is a file, or a directory that holds other files than an adapter's two.
        OSError: the place cannot be written.
    """
    check_writable(path, OUTPUT_FILES)


def save_adapter(adapter: AdapterLike, path: PathLike, *, config: Mapping[str, Any] | None = None) -> None:
    """Write an adapter directory that ``PeftModel.from_pretrained`` loads.

    Every layer is written with scaling 1: its own scaling is multiplied into lora_B (one rounding), ``lora_alpha``
    is the rank, and ``rank_pattern`` with an equal ``alpha_pattern`` names the modules of other ranks. Layers that
    PEFT gives one rank (all experts and parameters of ``target_parameters``, the two maps of an attention module) are
    padded with zeros to the largest among them. The directory appears by one rename: an interrupted run leaves the
    previous output whole.

    Args:
        adapter: the layers are asked for one at a time, up to three times if the mapping is lazy. Layers of rank 0 are
            written as one row of zeros, since PEFT has no rank 0.
        path: a new directory, or one that holds nothing but an earlier output.
        config: configuration to write in place of ``adapter.config``; ranks, scalings and initialisation in it are
            overruled, ``target_modules`` kept where it matches the layers.

    Raises:
        ValueError: no layers, layers of names that do not go together, extras that the configuration does not
            declare or that are named like factors, a configuration that JSON cannot hold or ``load_adapter`` would
            refuse, a layer that is not finite after scaling or has a rank above 1,024 and both sides of its matrix
            (``load_adapter`` would not read it), or an output directory that holds other files.
        OSError: the output cannot be written.
    """
    adapter = as_adapter(adapter)
    if not adapter.modules:
        raise ValueError("adapter: holds no layers")
    shapes = _shapes(adapter.modules)
    layout = FileLayout(shapes)
    extras = extra_specs(adapter)
    if both := sorted(extras.keys() & layout.specs.keys()):
        raise ValueError(f"extras: {both[0]!r}: is a factor of one of the layers")
    document = output_config(config or adapter.config, layout, [key.removeprefix(PREFIX) for key in extras])
    text = _json(document)

    def tensor(key: str) -> Tensor:
        return adapter.extras[key] if key in extras else layout.tensor(key, factor)

    def factor(name: str, side: str) -> tuple[Tensor, float]:
        if isinstance(adapter.modules, StoredLayers):
            return adapter.modules.factor(name, side)
        layer = adapter.modules[name]
        return (layer.A if side == "A" else layer.B), layer.scaling

    with staged_directory(path, OUTPUT_FILES) as stage:
        specs = layout.specs | extras
        if not _linked(adapter.modules, stage / WEIGHTS_NAME, specs, layout.verbatim(shapes)):
            write_tensors(stage / WEIGHTS_NAME, specs, tensor)
        _write_text(stage / CONFIG_NAME, text)


def save_residual(residual: AdapterLike, path: PathLike) -> None:
    """Write what an aggregation leaves out, as ``save_adapter`` writes an adapter.

    Its configuration states no task type: PEFT would look for the head of a classification task, which it has not.

    Raises:
        ValueError, OSError: as ``save_adapter``; or it is of DoRA, where adding it up means nothing.
    """
    config = as_adapter(residual).config
    check_residual([config])
    save_adapter(residual, path, config=None if config is None else {**config, "task_type": None})


def _shapes(modules: Mapping[str, LoraLayer]) -> dict[str, LayerShape]:
    if isinstance(modules, StoredLayers):
        return {name: modules.shape(name) for name in modules}
    return {name: layer_shape(name, layer) for name, layer in modules.items()}


def _linked(
    modules: Mapping[str, LoraLayer],
    path: Path,
    specs: Mapping[str, TensorSpec],
    source: Mapping[str, tuple[str, str]] | None,
) -> bool:
    return isinstance(modules, StoredLayers) and source is not None and modules.link(path, specs, source)


def layer_shape(name: str, layer: LoraLayer) -> LayerShape:
    """What ``FileLayout`` must know of a layer."""
    return LayerShape(spec_of(layer.A, name).dtype, *layer.shape, layer.rank)


def extra_specs(adapter: Adapter) -> dict[str, TensorSpec]:
    """Dtype and shape of every extra.

    Raises:
        ValueError: a name that PEFT does not have, or a dtype that cannot be stored.
    """
    for key in adapter.extras:
        if not key.startswith(PREFIX):
            raise ValueError(f"extras: {key!r}: names of PEFT start with {PREFIX!r}")
    return {key: spec_of(tensor, key) for key, tensor in adapter.extras.items()}


def _json(config: Mapping[str, Any]) -> str:
    """A configuration as the text of its file; sets, which PEFT's own objects hold, as lists."""

    def plain(value: object) -> list[Any]:
        if isinstance(value, set | frozenset):
            return sorted(value)
        raise TypeError(f"{type(value).__name__} is nothing that JSON has")

    try:
        return json.dumps(config, indent=2, sort_keys=True, default=plain) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config: cannot be written as JSON ({error})") from error


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file, filed_errors(path):
        file.write(text)
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


def _open_tensors(folder: Path) -> TensorSource:
    if (folder / WEIGHTS_NAME).exists():
        return TensorFile(folder / WEIGHTS_NAME)
    if (folder / INDEX_NAME).exists():
        return ShardedTensors(folder / INDEX_NAME)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickled:
        raise ValueError(f"{folder / pickled[0]}: a pickle, which is never opened: save it as {WEIGHTS_NAME}")
    raise ValueError(f"{folder}: no {WEIGHTS_NAME}")
