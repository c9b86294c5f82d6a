"""The layers of an adapter file: which kind each is, its scaling, and how its two matrices lie in the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedgram.flora_na import LoraLayer

from .config import LoraSettings
from .keys import AdapterKeys
from .layout import check_rank
from .names import LayerName, owner_of
from .parameters import Parameter, TargetParameters, wrappers
from .shards import TensorSource

FLOATS = ("F64", "F32", "F16", "BF16")
CONVOLUTIONS = (3, 4, 5)
MAX_EXPERTS = 1 << 18
MAX_TIED = 64
"""Comparisons of tied factors: PEFT ties heads to one embedding."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer in a file: its name, the names of its tensors, its rank and its scaling."""

    name: LayerName
    A: str
    B: str
    rank: int
    scaling: float

    def sizes(self, file: TensorSource) -> tuple[int, int, int]:
        """m, n, r of the two matrices, without reading them."""
        return file.specs[self.B].shape[0], prod(file.specs[self.A].shape[1:]), self.rank

    def read(self, file: TensorSource) -> LoraLayer:
        """The two matrices, (r, n) and (m, r)."""
        return self.layer(*file.read_pair(self.A, self.B))

    def layer(self, A: Tensor, B: Tensor) -> LoraLayer:
        """The two matrices as the tensors of the file hold them."""
        if self.name.kind == "conv":
            A, B = A.flatten(1), B.flatten(1)
        elif self.name.kind == "expert" and self.name.experts > 1:
            # A is expert-major, (E r, n); B is rank-major: column j * E + e is column j of expert e.
            A = A[self.name.expert * self.rank :][: self.rank].clone()
            B = B[:, self.name.expert :: self.name.experts].contiguous()
        return LoraLayer(A=A, B=B, scaling=self.scaling)


class LastPair:
    """Reads a file's tensors and keeps the last two: the experts of a module come from the same ones in turn.

    After the last expert they are let go, so that no more than the module at hand is kept.
    """

    def __init__(self, file: TensorSource) -> None:
        self._file = file
        self._kept: dict[str, Tensor] = {}

    def __call__(self, key: str) -> Tensor:
        tensor = self._kept.get(key)  # another thread may let it go at any time
        if tensor is None:
            tensor = self._file.read(key)
            self._kept = dict(list(self._kept.items())[-1:]) | {key: tensor}
        return tensor

    def layer(self, stored: StoredLayer) -> LoraLayer:
        """One expert."""
        layer = stored.layer(self(stored.A), self(stored.B))
        if stored.name.expert == stored.name.experts - 1:
            self._kept = {}
        return layer


def stored_layers(file: TensorSource, keys: AdapterKeys, settings: LoraSettings) -> dict[str, StoredLayer]:
    """All layers of a file by name; heads tied to an embedding are part of the embedding's layer.

    Raises:
        ValueError: names file, module and what does not fit.
    """
    shapes = {path: _checked_shapes(file, keys, path) for path in keys.factors}
    parameters = TargetParameters(settings)
    nested = wrappers((path for path in keys.factors if path not in keys.embeddings), parameters)
    assigned: dict[str, Parameter] = {}
    for owner, paths in nested.items():
        rows = {path: shapes[path][0][0] for path in paths}
        try:
            assigned |= parameters.assign(owner, rows)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None
        for path in paths:
            if len(shapes[path][0]) != 2:
                raise ValueError(f"{file.path}: {path}: lora_A {shapes[path][0]} is not that of a parameter")
    if sum(parameter.experts for parameter in assigned.values()) > MAX_EXPERTS:
        raise ValueError(f"{file.path}: {settings.path.name} makes more than {MAX_EXPERTS} experts of it")
    tied = _tied_heads(file, keys, settings) if settings.tying else {}
    heads = {head for found in tied.values() for head in found}
    layers: list[StoredLayer] = []
    for path in keys.factors:
        if path in assigned:
            layers += _experts(file, keys, path, assigned[path])
            continue
        layer = _layer(file, keys, settings, path, shapes[path][0], tied.get(path, ()))
        layers += [] if path in heads else [layer]
    for layer in layers:
        A, B = shapes[layer.name.path]
        try:
            check_rank(layer.name, layer.rank, m=B[0], n=prod(A[1:]))
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None
    return {str(layer.name): layer for layer in layers}


def _layer(
    file: TensorSource,
    keys: AdapterKeys,
    settings: LoraSettings,
    path: str,
    A: tuple[int, ...],
    tied: tuple[str, ...],
) -> StoredLayer:
    where, owner = f"{file.path}: {path}", owner_of(path)
    if ".base_layer" in owner:
        raise ValueError(f"{where}: a layer inside a wrapper of this kind is not supported")
    if A[0] not in settings.ranks(owner):
        stated = " or ".join(map(str, settings.ranks(owner)))
        raise ValueError(
            f"{where}: rank {A[0]} in the file, {stated} by r and rank_pattern of {settings.path.name}: "
            "its scaling is not known"
        )
    kind = "embedding" if path in keys.embeddings else "conv" if len(A) > 2 else "linear"
    name = LayerName(path, kind, kernel=A[2:], tied=tied)
    pair = keys.factors[path]
    return StoredLayer(name, pair["A"], pair["B"], A[0], settings.scaling(owner, A[0]))


def _experts(file: TensorSource, keys: AdapterKeys, path: str, parameter: Parameter) -> list[StoredLayer]:
    pair, count = keys.factors[path], parameter.experts
    return [
        StoredLayer(
            LayerName(path, "expert", expert=e, experts=count), pair["A"], pair["B"], parameter.rank, parameter.scaling
        )
        for e in range(count)
    ]


def _checked_shapes(file: TensorSource, keys: AdapterKeys, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of lora_A and lora_B, which are known to multiply."""
    where, pair = f"{file.path}: {path}", keys.factors[path]
    a, b = file.specs[pair["A"]], file.specs[pair["B"]]
    A, B = a.shape, b.shape
    convolution = path not in keys.embeddings and len(A) in CONVOLUTIONS and set(B[2:]) == {1}
    shapes = f"lora_B {B} and lora_A {A}"
    if len(A) != len(B) or not (len(A) == 2 or convolution):
        raise ValueError(f"{where}: LoRA of this shape is not supported ({shapes})")
    if a.dtype != b.dtype or a.dtype not in FLOATS:
        raise ValueError(f"{where}: lora_A is {a.dtype} and lora_B is {b.dtype}: expected one floating-point type")
    if len(A) > 2 and 0 < B[1] < A[0] and A[0] % B[1] == 0:
        raise ValueError(f"{where}: LoRA of a convolution of {A[0] // B[1]} groups is not supported ({shapes})")
    if B[1] != A[0] or 0 in A + B:
        raise ValueError(f"{where}: {shapes} do not multiply")
    return A, B


def _tied_heads(file: TensorSource, keys: AdapterKeys, settings: LoraSettings) -> dict[str, tuple[str, ...]]:
    """Embeddings with the linear maps that share their weight, and so their factors, transposed.

    Raises:
        ValueError: a head of these shapes has factors or a scaling of its own although ``ensure_weight_tying`` is set.
    """
    alike: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for path in sorted(keys.embeddings):
        A, B = _shapes(file, keys, path)
        alike.setdefault((B[::-1], A[::-1]), []).append(path)
    heads: dict[str, list[str]] = {}
    for path in sorted(keys.factors.keys() - keys.embeddings):
        embeddings = alike.get(_shapes(file, keys, path), [])
        if embeddings:
            heads[path] = embeddings
    if sum(map(len, heads.values())) > MAX_TIED:
        embedding = next(iter(heads.values()))[0]
        raise ValueError(f"{file.path}: {embedding}: {len(heads)} layers look tied to it (ensure_weight_tying)")
    found: dict[str, tuple[str, ...]] = {}
    for path, embeddings in heads.items():
        embedding = _twin(file, keys, settings, path, embeddings)
        found[embedding] = (*found.get(embedding, ()), path)
    return found


def _twin(file: TensorSource, keys: AdapterKeys, settings: LoraSettings, head: str, embeddings: list[str]) -> str:
    """Of the embeddings of its shapes the one that a head is tied to: T5 has three, and ties the head to one.

    Raises:
        ValueError: it has factors or a scaling of its own.
    """
    rank = _shapes(file, keys, head)[0][0]
    for embedding in embeddings:
        if not _transposed(file, keys.factors[head], keys.factors[embedding]):
            continue
        if _scalings(settings, head, rank) == _scalings(settings, embedding, rank):
            return embedding
    raise ValueError(f"{file.path}: {head}: differs from {embeddings[0]} although ensure_weight_tying is set")


def _shapes(file: TensorSource, keys: AdapterKeys, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pair = keys.factors[path]
    return file.specs[pair["A"]].shape, file.specs[pair["B"]].shape


def _transposed(file: TensorSource, head: Mapping[str, str], embedding: Mapping[str, str]) -> bool:
    """Whether the factors of a head are bit for bit those of an embedding, transposed."""
    return all(torch.equal(file.read(head[x]), file.read(embedding[y]).T) for x, y in ("AB", "BA"))


def _scalings(settings: LoraSettings, path: str, rank: int) -> list[float]:
    return [settings.scale(alpha, rank) for alpha in settings.alphas(path)]


def read_update(file: TensorSource, key: str, scaling: float) -> Tensor:
    """A trained bias as the update that it is: times the scaling, float32 or wider so that this rounds nothing away."""
    bias = file.read(key)
    return (bias.double() * scaling).to(torch.promote_types(bias.dtype, torch.float32))


def bias_scalings(keys: AdapterKeys, layers: Mapping[str, StoredLayer]) -> dict[str, float]:
    """Name of every ``lora_B.bias`` -> the scaling of its module."""
    by_path = {layer.name.path: layer.scaling for layer in layers.values()}
    tied = {head: layer.scaling for layer in layers.values() for head in layer.name.tied}
    return {key: (by_path | tied)[path] for path, key in keys.biases.items()}
