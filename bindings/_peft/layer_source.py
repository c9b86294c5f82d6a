"""Layers that are stored somewhere and written again: no more is read of them than is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedgram.flora_na import LoraLayer

from ..files.tensor_header import TensorSpec
from .layout import LayerShape
from .lazy_tensors import LazyMapping


class StoredLayers(LazyMapping[LoraLayer], ABC):
    """A lazy mapping whose layers can also be had factor by factor, and whose shapes are known unread."""

    @abstractmethod
    def shape(self, name: str) -> LayerShape:
        """The shape of a layer."""

    @abstractmethod
    def factor(self, name: str, side: str) -> tuple[Tensor, float]:
        """One factor, side ``A`` or ``B``, of a layer, and the layer's scaling."""

    @abstractmethod
    def link(self, path: Path, specs: Mapping[str, TensorSpec], source: Mapping[str, tuple[str, str]]) -> bool:
        """Make ``path`` a safetensors file without copying a byte, where what is stored is just that.

        Args:
            path: a new file.
            specs: dtype and shape of all tensors to be in it, by name.
            source: of the tensors that are a factor as it is, its layer's name and its side; the others are no layers'.

        Returns:
            False, and nothing has happened, where it cannot be: the tensors are to be written.
        """
