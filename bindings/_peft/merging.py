"""Clients' configurations: what must be the same in all of them, and the one that describes what they share."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SHARED = {
    "base_model_name_or_path": "base model",
    "revision": "base model revision",
    "task_type": "task type",
    "peft_type": "peft type",
    "layer_replication": "layer replication",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable token indices",
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "ensure_weight_tying": "weight tying",
}
BASE = ("base_model_name_or_path", "revision", "layer_replication")
"""The fields of ``SHARED`` that say which weights ``B A`` is added to."""


class AdapterConfig(dict[str, Any]):
    """``adapter_config.json`` as it is, with which ``flora_na`` checks and merges those of the clients."""

    def merged(self, configs: Sequence[Mapping[str, Any] | None], names: Sequence[str]) -> dict[str, Any] | None:
        """The configuration of the clients' aggregate (see ``flora_na.layer.MergingConfig``).

        Raises:
            ValueError: as ``check_shared``.
        """
        check_shared(configs, names)
        return merge_configs(configs)


def check_shared(
    configs: Sequence[Mapping[str, Any] | None], names: Sequence[str], fields: Collection[str] = tuple(SHARED)
) -> None:
    """Refuse clients whose updates cannot be added up; a client without configuration is passed over.

    Args:
        configs: of the clients, or of a client and an earlier adapter.
        names: what they are called.
        fields: those of ``SHARED`` that are compared.

    Raises:
        ValueError: names both clients and the field.
    """
    stated = [(name, config) for name, config in zip(names, configs, strict=True) if config is not None]
    for name, config in stated[1:]:
        first_name, first = stated[0]
        for field in fields:
            label = SHARED[field]
            if _compared(config, field) != _compared(first, field):
                raise ValueError(
                    f"{name}: {label} {config.get(field)!r} differs from {first.get(field)!r} of {first_name}"
                )
        if config.get("target_parameters") and _old_experts(config) != _old_experts(first):
            raise ValueError(
                f"{name}: experts written by PEFT {config.get('peft_version')} lie otherwise than those of "
                f"{first_name}, written by PEFT {first.get('peft_version')}"
            )


def _compared(config: Mapping[str, Any], field: str) -> Any:
    value = config.get(field) or None
    # Their order means nothing: PEFT goes by the base model's.
    return sorted(map(str, value)) if field == "target_parameters" and isinstance(value, list) else value


def _old_experts(config: Mapping[str, Any]) -> bool:
    """Whether PEFT took the axes of expert parameters in their old order (before 0.19)."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("peft_version") or "0.19"))
    return found is not None and (int(found[1]), int(found[2])) < (0, 19)


def check_residual(configs: Iterable[Mapping[str, Any] | None]) -> None:
    """Refuse a residual where adding it up means nothing.

    Raises:
        ValueError: a configuration is that of DoRA.
    """
    if any((config or {}).get("use_dora") for config in configs):
        raise ValueError("residual: DoRA scales the sum of all parts, so a residual cannot be added to it")


def merge_configs(configs: Iterable[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The first client's configuration, without its selection of modules where the clients' selections differ.

    A selection that does more than list names stays: ``save_adapter`` then writes the modules' own names so that no
    other module matches. ``modules_to_save`` and ``bias`` are those of all clients together.
    """
    stated = [config for config in configs if config is not None]
    if not stated:
        return None
    merged = dict(stated[0])
    if any(_selection(config) != _selection(merged) for config in stated[1:]):
        kept = next((config for config in stated if not only_names(config)), {})
        merged |= {field: kept.get(field) for field in SELECTION}
    saved = dict.fromkeys(entry for config in stated for entry in config.get("modules_to_save") or [])
    biases = {config.get("bias", "none") for config in stated}
    merged["modules_to_save"] = list(saved) or None
    merged["bias"] = next((bias for bias in ("all", "lora_only") if bias in biases), "none")
    return merged


def only_names(config: Mapping[str, Any]) -> bool:
    """Whether modules are selected by the ends of their names alone: no expression, none left out, no layers chosen."""
    targets, *others = _selection(config)
    expression = isinstance(targets, str) and targets != "all-linear"
    return not expression and all(other is None for other in others)


def _selection(config: Mapping[str, Any]) -> list[Any]:
    """The fields of ``SELECTION``, comparable; one that selects nothing and leaves nothing out is None."""
    return [_comparable(config.get(field)) for field in SELECTION]


def _comparable(value: Any) -> Any:
    if isinstance(value, list | set):
        return sorted(map(str, value)) or None
    return None if value == "" else value
