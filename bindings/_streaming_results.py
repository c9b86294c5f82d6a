"""Layers and their reports as facts and tensors of a journal, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor

from fedgram.flora_na import LoraLayer, ModuleReport

Result = tuple[dict[str, Any], dict[str, Tensor]]
YARDSTICKS = ("rho_fedavg", "rho_optimal")


def layer_result(layer: LoraLayer, report: ModuleReport | None = None) -> Result:
    """Facts and tensors of one layer, with its report where it has one."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    facts = {"layer": {name: value for name, value in values.items() if name not in tensors}}
    if report is not None:
        known = (field.name for field in fields(report) if not field.name.startswith("_"))
        facts["report"] = {name: getattr(report, name) for name in (*known, *YARDSTICKS)}
    return facts, tensors


def layer_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoraLayer:
    """The layer that ``layer_result`` took apart."""
    return LoraLayer(**tensors, **facts["layer"])


def report_of(facts: Mapping[str, Any]) -> ModuleReport:
    """The report that ``layer_result`` took apart."""
    known = dict(facts["report"])
    fedavg, optimal = (known.pop(name) for name in YARDSTICKS)
    return ModuleReport(**known, _fedavg=partial(float, fedavg), _optimal=partial(float, optimal))
