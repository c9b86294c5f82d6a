"""Layers about to be written: no more is read of them than is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedgram.flora_na import LoraLayer

from ..files.tensor_file import TensorSpec, spec_of
from .layout import LayerShape
from .lazy_tensors import LazyMapping


class LayerSource(LazyMapping[LoraLayer]):
    """A mapping whose layers can also be had factor by factor. Here of any mapping, whose layers are read whole."""

    @staticmethod
    def of(layers: Mapping[str, LoraLayer]) -> LayerSource:
        """The layers themselves if they are one."""
        return layers if isinstance(layers, LayerSource) else LayerSource(layers, layers.__getitem__)

    def shape(self, name: str) -> LayerShape:
        """The shape of a layer.

        Raises:
            ValueError: a dtype that cannot be stored.
        """
        layer = self[name]
        return LayerShape(spec_of(layer.A, name).dtype, *layer.shape, layer.rank)

    def factor(self, name: str, side: str) -> tuple[Tensor, float]:
        """One factor, side ``A`` or ``B``, of a layer, and the layer's scaling."""
        layer = self[name]
        return (layer.A if side == "A" else layer.B), layer.scaling

    def link(self, path: Path, specs: Mapping[str, TensorSpec], source: Mapping[str, tuple[str, str]]) -> bool:
        """Make ``path`` a safetensors file without copying a byte, where what is stored is just that.

        Args:
            path: a new file.
            specs: dtype and shape of all tensors to be in it, by name.
            source: of the tensors that are a factor as it is, its layer's name and its side; the others are no layers'.

        Returns:
            False, and nothing has happened, where it cannot be: the tensors are to be written.
        """
        return False
