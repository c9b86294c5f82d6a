"""Layers and their reports as facts and tensors of a journal, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgram.flora_na import LoraLayer, ModuleReport

from .._peft.layer_source import LayerSource
from .._peft.layout import LayerShape
from ..files.linked_file import link_tensors
from ..files.tensor_header import TensorSpec
from .journal import Journal
from .records import StoredTensor

LAYER, RESIDUAL, EXTRA = "layer ", "residual ", "extra "
"""What the keys of a journal begin with."""
Result = tuple[dict[str, Any], dict[str, Tensor]]
YARDSTICKS = ("rho_fedavg", "rho_optimal")


def layer_result(layer: LoraLayer, report: ModuleReport | None = None) -> Result:
    """Facts and tensors of one layer, with its report where it has one."""
    facts: dict[str, Any] = {"layer": {"scaling": layer.scaling}}
    if report is not None:
        known = (field.name for field in fields(report) if not field.name.startswith("_"))
        facts["report"] = {name: getattr(report, name) for name in (*known, *YARDSTICKS)}
    return facts, {"A": layer.A, "B": layer.B}


class JournalLayers(LayerSource):
    """Layers that ``layer_result`` took apart, read from a journal.

    Args:
        journal: that has them.
        kind: what their keys begin with.
        names: of the layers.
    """

    def __init__(self, journal: Journal, kind: str, names: Collection[str]) -> None:
        super().__init__(names, self._layer)
        self._journal, self._kind = journal, kind

    def shape(self, name: str) -> LayerShape:
        """The shape of a layer, unread."""
        tensors = self._journal.records[self._kind + name].tensors
        (rank, n), (m, _) = tensors["A"].shape, tensors["B"].shape
        return LayerShape(tensors["A"].dtype, m, n, rank)

    def factor(self, name: str, side: str) -> tuple[Tensor, float]:
        """One factor of a layer, and the layer's scaling."""
        key = self._kind + name
        return self._journal.read(key, side), self._journal.records[key].facts["layer"]["scaling"]

    def link(self, path: Path, specs: Mapping[str, TensorSpec], source: Mapping[str, tuple[str, str]]) -> bool:
        """As ``LayerSource``: where the journal holds these tensors and no others."""
        found = {}
        for key, spec in specs.items():
            stored = self._stored(key, source.get(key))
            if stored is None or (stored.dtype, stored.nbytes) != (spec.dtype, spec.nbytes):
                return False
            found[key] = TensorSpec(spec.dtype, spec.shape, stored.start)
        return link_tensors(self._journal.data, path, self._journal.room, found)

    def _stored(self, key: str, source: tuple[str, str] | None) -> StoredTensor | None:
        """A factor of a layer of scaling 1, or a tensor beside the factors."""
        if source is None:
            record = self._journal.records.get(EXTRA + key)
            return None if record is None else record.tensors[EXTRA + key]
        record = self._journal.records[self._kind + source[0]]
        return record.tensors[source[1]] if record.facts["layer"]["scaling"] == 1 else None

    def _layer(self, name: str) -> LoraLayer:
        (A, scaling), (B, _) = self.factor(name, "A"), self.factor(name, "B")
        return LoraLayer(A=A, B=B, scaling=scaling)


def report_of(facts: Mapping[str, Any]) -> ModuleReport:
    """The report that ``layer_result`` took apart."""
    known = dict(facts["report"])
    fedavg, optimal = (known.pop(name) for name in YARDSTICKS)
    return ModuleReport(**known, _fedavg=partial(float, fedavg), _optimal=partial(float, optimal))
