"""Adapter directories of PEFT, read and written without PEFT and without the base model.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or several such files and an index). Read
exactly are LoRA of linear maps, embeddings, convolutions and the parameters of ``target_parameters`` (experts one by
one), with alpha / r, rsLoRA and patterns; and beside them ``lora_bias``, ``modules_to_save``, ``bias``, trainable
tokens and tied weights. DoRA, and initialisations that change the base weights, are read on demand; every other kind
is refused by name. Pickled files are never opened. ``_peft.names`` says how layers are named.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgram.flora_na import Adapter, AdapterLike
from fedgram.flora_na.layer import as_adapter

from ._peft.config import PREFIX
from ._peft.initial import check_same_start, since
from ._peft.layer_source import LayerSource
from ._peft.layout import FileLayout
from ._peft.merging import BASE, check_residual, check_shared, merge_configs
from ._peft.opening import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from ._peft.output import config_text, output_config
from .files.documents import filed_errors
from .files.staging import check_writable, staged_directory
from .files.tensor_file import TensorSpec, spec_of, write_tensors

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

OUTPUT_FILES = frozenset({CONFIG_NAME, WEIGHTS_NAME})
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
    start = None if init is None else open_adapter(Path(init), None, allow_dora=allow_dora, initial=True)
    adapter = open_adapter(Path(path), adapter_name, allow_dora=allow_dora, initial=start is not None)
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
    start = None if init is None else open_adapter(Path(init), None, allow_dora=allow_dora, initial=True)
    adapters = [open_adapter(Path(p), adapter_name, allow_dora=allow_dora, initial=start is not None) for p in paths]
    check_compatible(adapters, labels)
    _warn_of_dora(adapters, paths)
    if start is None:
        return adapters
    check_same_start([adapter.config for adapter in adapters], labels)
    return [since(adapter, start, label) for adapter, label in zip(adapters, labels, strict=True)]


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
    layers = LayerSource.of(adapter.modules)
    shapes = {name: layers.shape(name) for name in layers}
    layout = FileLayout(shapes)
    extras = extra_specs(adapter)
    if both := sorted(extras.keys() & layout.specs.keys()):
        raise ValueError(f"extras: {both[0]!r}: is a factor of one of the layers")
    names = [key.removeprefix(PREFIX) for key in extras]
    frozen = {key.removeprefix(PREFIX) for key, role in adapter.roles.items() if role == "frozen"}
    document = output_config(config or adapter.config, layout, names, frozen)
    text = config_text(document)

    source = layout.verbatim(shapes)

    def tensor(key: str) -> Tensor:
        return adapter.extras[key] if key in extras else layout.tensor(key, layers.factor)

    with staged_directory(path, OUTPUT_FILES) as stage:
        specs = layout.specs | extras
        if source is None or not layers.link(stage / WEIGHTS_NAME, specs, source):
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


def extra_specs(adapter: Adapter) -> dict[str, TensorSpec]:
    """Dtype and shape of every extra.

    Raises:
        ValueError: a name that PEFT does not have, or a dtype that cannot be stored.
    """
    for key in adapter.extras:
        if not key.startswith(PREFIX):
            raise ValueError(f"extras: {key!r}: names of PEFT start with {PREFIX!r}")
    return {key: spec_of(tensor, key) for key, tensor in adapter.extras.items()}


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file, filed_errors(path):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
