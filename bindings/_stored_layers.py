"""Layers that are stored somewhere and written again: no more is read of them than is written."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fedgram.flora_na import LoraLayer

from ._lazy_tensors import LazyMapping
from ._peft_layout import LayerShape


class StoredLayers(LazyMapping[LoraLayer], ABC):
    """A lazy mapping whose layers can also be had factor by factor, and whose shapes are known unread."""

    @abstractmethod
    def shape(self, name: str) -> LayerShape:
        """The shape of a layer."""

    @abstractmethod
    def factor(self, name: str, side: str) -> tuple[Tensor, float]:
        """One factor, side ``A`` or ``B``, of a layer, and the layer's scaling."""
