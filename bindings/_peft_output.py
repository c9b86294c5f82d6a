"""The configuration of the global adapter: from the clients' configurations and what the aggregation returned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._peft_config import LoraSettings, matching, saved_by

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SHARED = {
    "base_model_name_or_path": "base model",
    "revision": "base model revision",
    "task_type": "task type",
    "peft_type": "peft type",
    "layer_replication": "layer replication",
}
DEFAULTS: dict[str, Any] = {
    "base_model_name_or_path": None,
    "task_type": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
}


def check_shared(configs: Sequence[Mapping[str, Any] | None], names: Sequence[str]) -> None:
    """Refuse clients whose base model, task type or peft type differ; a client without configuration is passed over.

    Raises:
        ValueError: names both clients and the field.
    """
    stated = [(name, config) for name, config in zip(names, configs, strict=True) if config is not None]
    for field, label in SHARED.items():
        for name, config in stated[1:]:
            first_name, first = stated[0]
            if (config.get(field) or None) != (first.get(field) or None):
                raise ValueError(
                    f"{name}: {label} {config.get(field)!r} differs from {first.get(field)!r} of {first_name}"
                )


def merge_configs(configs: Iterable[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The first client's configuration, without its selection of modules where the clients' selections differ."""
    stated = [config for config in configs if config is not None]
    if not stated:
        return None
    merged = dict(stated[0])
    if any(_selection(config) != _selection(merged) for config in stated[1:]):
        merged |= dict.fromkeys(SELECTION)
    return merged


def output_config(config: Mapping[str, Any] | None, ranks: Mapping[str, int], extras: Iterable[str]) -> dict[str, Any]:
    """The configuration of an adapter to be written: every scaling is 1 (lora_alpha = r, patterns where ranks vary).

    Args:
        config: the clients' configuration, or None.
        ranks: module name -> rank.
        extras: names of the full tensors, without prefix.

    Raises:
        ValueError: a full tensor is not declared by ``modules_to_save`` or ``bias``: PEFT would not load it.
    """
    out = DEFAULTS | dict(config or {})
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank))
    pattern = _exact_pattern(ranks, r)
    out |= {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True, "use_rslora": False}
    out |= {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    out |= {"eva_config": None, "corda_config": None, "lora_ga_config": None, "loftq_config": {}}
    out |= _saved_extras(out, list(extras), ranks)
    if not all(_targeted(out, module) for module in ranks):
        out |= dict.fromkeys(SELECTION) | {"target_modules": sorted(ranks)}
    return out


def _exact_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Ranks other than the default by module name; anchored where a name is also the end of another's."""
    plain = {module: rank for module, rank in ranks.items() if rank != default}
    if all((matching(plain, module) or [default]) == [rank] for module, rank in ranks.items()):
        return plain
    return {f"^{re.escape(module)}": rank for module, rank in plain.items()}


def _saved_extras(config: Mapping[str, Any], extras: list[str], modules: Collection[str]) -> dict[str, Any]:
    """modules_to_save and bias as far as their tensors are there: PEFT fails on declared tensors that are not."""
    entries = config["modules_to_save"] or []
    if not entries and config["bias"] == "none":
        entries = sorted({key.rpartition(".")[0] for key in extras} - {""})
    saved = [entry for entry in entries if any(saved_by(entry, key) for key in extras)]
    has_bias = any(key.endswith("bias") and not any(saved_by(entry, key) for entry in saved) for key in extras)
    kept = {"modules_to_save": saved or None, "bias": config["bias"] if has_bias else "none"}
    settings = LoraSettings.parse({**config, **kept}, Path("config"))
    for key in extras:
        if not settings.declares(key, modules):
            raise ValueError(f"extras: {key!r} is declared neither by modules_to_save nor by bias of the configuration")
    return kept


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether the configuration's selection leads PEFT to this module."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


def _selection(config: Mapping[str, Any]) -> list[Any]:
    values = (config.get(field) or None for field in SELECTION)
    return [sorted(map(str, value)) if isinstance(value, list) else value for value in values]
