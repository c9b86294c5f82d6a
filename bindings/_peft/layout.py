"""Where an adapter's layers go in the file that PEFT loads: tensors, ranks, and the layers that share a tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedgram.flora_na.finite import is_finite

from ..files.tensor_file import TensorSpec
from .names import LayerName, factor_key

FactorOf = Callable[[str, str], tuple[Tensor, float]]
MAX_RANK = 1024
"""Of a layer, unless both sides of its matrix are longer."""


def check_rank(layer: object, rank: int, m: int, n: int) -> None:
    """Refuse ranks that make a small file much work: it grows with their cube, and means no more above m or n.

    Args:
        layer: what the layer is called, for the message.
        rank: of the layer.
        m, n: the sides of its matrix.

    Raises:
        ValueError: names the layer and the largest rank.
    """
    most = max(MAX_RANK, min(m, n))
    if rank > most:
        raise ValueError(f"{layer}: rank {rank} of a {m} x {n} matrix: at most {most} is read and written")


def is_linear_expert(module: str) -> bool:
    """Whether a module is a linear map of one expert, as transformers had them before version 5."""
    return re.search(r"\.experts\.\d+\.", module) is not None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What must be known of a layer before it is written: ``dtype`` as the file names it, (m, n), and the rank."""

    dtype: str
    m: int
    n: int
    rank: int


@dataclass(frozen=True, slots=True)
class _Factor:
    """One tensor of the file: the layers it holds (all experts, else one), the side, whether it is transposed."""

    names: tuple[str, ...]
    side: str
    transposed: bool = False


class FileLayout:
    """The tensors of the LoRA layers of one file.

    PEFT knows one rank per adapted module, and none per parameter of ``target_parameters`` that its own checks would
    not complain of. So layers that share one are padded with zeros to its largest: the experts and all parameters
    with each other, the two maps of an attention module with each other. So are experts that are a linear map each, as
    transformers had them before version 5: of these PEFT makes parameters, and can stack but equal ranks.

    Args:
        shapes: the layers by name (see ``names``).

    Attributes:
        ranks: module, as PEFT selects it -> rank; tied heads too (parameters of ``target_parameters`` left out).
        parameter_rank: the rank of all parameters of ``target_parameters``, or None.
        expert_rank: the rank of all experts that are linear maps, or None.
        parameters: the modules that they belong to.
        paths: paths of all layers, tied heads included.
        tied: whether there are tied heads.
        specs: name -> dtype and shape of every tensor.

    Raises:
        ValueError: names that are not whole or do not go together (an expert missing, a path in two kinds), or a rank
            that would not be read.
    """

    def __init__(self, shapes: Mapping[str, LayerShape]) -> None:
        self.ranks: dict[str, int] = {}
        self.parameter_rank: int | None = None
        self.parameters: set[str] = set()
        self.paths: set[str] = set()
        self.specs: dict[str, TensorSpec] = {}
        self._factors: dict[str, _Factor] = {}
        self._rank: dict[str, int] = {}
        self._names = {name: LayerName.parse(name) for name in shapes}
        self.tied = any(name.tied for name in self._names.values())
        groups: dict[str, list[str]] = {}
        for name, parsed in self._names.items():
            groups.setdefault(parsed.path, []).append(name)
        for name, parsed in self._names.items():
            self._take_rank(parsed, max(shapes[name].rank, 1))
        experts = {module: rank for module, rank in self.ranks.items() if is_linear_expert(module)}
        self.expert_rank = max(experts.values(), default=None)
        self.ranks |= dict.fromkeys(experts, self.expert_rank or 1)
        for path, names in groups.items():
            self._add(path, names, shapes)

    def _take_rank(self, name: LayerName, rank: int) -> None:
        if name.kind == "expert":
            self.parameter_rank = max(rank, self.parameter_rank or 0)
            self.parameters.add(name.owner)
            return
        for owner in (name.owner, *name.tied):
            self.ranks[owner] = max(rank, self.ranks.get(owner, 0))

    def _add(self, path: str, names: list[str], shapes: Mapping[str, LayerShape]) -> None:
        first, shape = self._names[names[0]], shapes[names[0]]
        names = sorted(names, key=lambda name: self._names[name].expert)
        experts = max(first.experts, 1)
        if [self._names[name] for name in names] != [_expert(first, e) for e in range(experts)]:
            raise ValueError(f"{path}: {len(names)} layers ({names[0]}, ...) are not one whole module")
        for name in names[1:]:
            if (shapes[name].dtype, shapes[name].m, shapes[name].n) != (shape.dtype, shape.m, shape.n):
                raise ValueError(f"{path}: {name} differs from {names[0]} in dtype or shape")
        rank = (self.parameter_rank or 1) if first.kind == "expert" else self.ranks[first.owner]
        check_rank(names[0], rank, shape.m, shape.n)
        self._rank |= dict.fromkeys(names, rank)
        size = prod(first.kernel)
        if shape.n % size:
            raise ValueError(f"{names[0]}: {shape.n} columns are not a number of channels times {size}")
        tail = (1,) * len(first.kernel)
        A = (experts * rank, shape.n // size, *first.kernel)
        B = (shape.m, experts * rank, *tail)
        for side, dims in (("A", A), ("B", B)):
            self._put(first.key(side), _Factor(tuple(names), side), shape.dtype, dims)
        for head in first.tied:
            self._put(factor_key(head, "A"), _Factor(tuple(names), "B", True), shape.dtype, B[::-1])
            self._put(factor_key(head, "B"), _Factor(tuple(names), "A", True), shape.dtype, A[::-1])
        self.paths |= {path, *first.tied}

    def _put(self, key: str, factor: _Factor, dtype: str, shape: tuple[int, ...]) -> None:
        if key in self._factors:
            raise ValueError(f"{key}: two layers would be written to it")
        self._factors[key], self.specs[key] = factor, TensorSpec(dtype, shape)

    def verbatim(self, shapes: Mapping[str, LayerShape]) -> dict[str, tuple[str, str]] | None:
        """Of every tensor the layer and side whose factor it is, number by number; None where one is put together."""
        found = {}
        for key, factor in self._factors.items():
            [name, *more] = factor.names
            if more or factor.transposed or self._rank[name] != shapes[name].rank:
                return None
            found[key] = (name, factor.side)
        return found

    def tensor(self, key: str, factors: FactorOf) -> Tensor:
        """The tensor of a name, of layers of scaling 1.

        Args:
            key: its name.
            factors: reads one factor, side ``A`` or ``B``, of a layer, and the layer's scaling.

        Raises:
            ValueError: a factor is not finite once the scaling is multiplied in.
        """
        factor = self._factors[key]
        side = factor.side
        parts = [unit_factor(name, side, *factors(name, side), self._rank[name]) for name in factor.names]
        if len(parts) == 1:
            whole = parts[0]
        elif side == "A":
            whole = torch.cat(parts)
        else:
            whole = torch.stack(parts, 2).flatten(1)
        return whole.T if factor.transposed else whole.reshape(self.specs[key].shape)


def _expert(name: LayerName, expert: int) -> LayerName:
    return LayerName(name.path, name.kind, name.kernel, expert, name.experts, name.tied)


def unit_factor(name: str, side: str, factor: Tensor, scaling: float, rank: int) -> Tensor:
    """One factor of a layer with the scaling multiplied into lora_B, padded with zeros to ``rank``.

    Raises:
        ValueError: it is not finite.
    """
    factor = factor.detach().cpu()
    if side == "B" and scaling != 1:
        # In float64, then one rounding: a float16 product with a large scaling must not pass through float16 twice.
        factor = (factor.double() * scaling).to(factor.dtype)
    if not is_finite(factor):
        raise ValueError(f"{name}: lora_{side} holds NaN or Inf (scaling {scaling:g} in {factor.dtype})")
    missing = rank - factor.shape[side == "B"]
    return (
        factor if not missing else torch.nn.functional.pad(factor, (0, 0, 0, missing) if side == "A" else (0, missing))
    )
