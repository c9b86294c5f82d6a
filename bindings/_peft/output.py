"""The configuration of the global adapter: from that of the clients and what the aggregation returned."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .config import IN_FILES, LoraSettings, refuse_other_kinds, saved_by
from .extras import EMBEDDINGS, is_frozen
from .keys import LORA_BIAS, MAGNITUDE, TOKENS
from .layout import FileLayout, is_linear_expert
from .merging import SELECTION, only_names
from .names import ends_of
from .parameters import TargetParameters
from .patterns import PatternTable

DEFAULTS: dict[str, Any] = {
    "base_model_name_or_path": None,
    "task_type": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
}
KNOWN_TO_PEFT = frozenset({"embed_tokens", "lm_head"})
"""Names of embeddings and heads by which PEFT finds that something is to be tied."""


def output_config(
    config: Mapping[str, Any] | None, layout: FileLayout, extras: Iterable[str], frozen: Collection[str] = ()
) -> dict[str, Any]:
    """The configuration of an adapter to be written: every scaling is 1 (lora_alpha = r, patterns where ranks vary).

    Args:
        config: the clients' configuration, or None.
        layout: of the layers.
        extras: names of the other tensors, without prefix.
        frozen: those of them that are known to be stored base weights.

    Raises:
        ValueError: a tensor or an expert is not declared by the configuration: PEFT would not load it; or the
            configuration is that of another kind of adapter, as which PEFT would read the factors.
    """
    out = DEFAULTS | dict(config or {})
    names = list(extras)
    r = _default_rank(layout)
    pattern = _exact_pattern(layout.ranks | _parameter_ranks(out, layout), r)
    out |= {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True, "use_rslora": False}
    out |= {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    out |= {"eva_config": None, "corda_config": None, "lora_ga_config": None, "loftq_config": {}}
    out |= _parts(out, names)
    full = [name for name in names if not name.endswith((LORA_BIAS, MAGNITUDE, TOKENS))]
    out |= _saved_extras(out, full, layout.paths, frozen)
    _check_apart(out["modules_to_save"] or [], layout.ranks)
    refuse_other_kinds(out, Path("config"), handled=IN_FILES | {"use_dora"})
    return out | _written_selection(out, layout)


def config_text(config: Mapping[str, Any]) -> str:
    """A configuration as the text of its file; sets, which PEFT's own objects hold, as lists.

    Raises:
        ValueError: JSON cannot hold it.
    """

    def plain(value: object) -> list[Any]:
        if isinstance(value, set | frozenset):
            return sorted(value)
        raise TypeError(f"{type(value).__name__} is nothing that JSON has")

    try:
        return json.dumps(config, indent=2, sort_keys=True, default=plain) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config: cannot be written as JSON ({error})") from error


def _check_apart(saved: Iterable[str], modules: Iterable[str]) -> None:
    """Refuse low-rank factors of a module that is saved whole: PEFT would pass over the factors.

    Raises:
        ValueError: names the module.
    """
    for entry in saved:
        for module in modules:
            if f".{entry}." in f".{module}.":
                raise ValueError(f"{module}: has low-rank factors, and is saved whole (modules_to_save {entry!r})")


def _written_selection(config: Mapping[str, Any], layout: FileLayout) -> dict[str, Any]:
    """The selection that leads PEFT to the modules, where that of the configuration is not to be kept.

    A list of names that leads to all of them is kept, and one of the modules' own names takes the place of one that
    does not. Where the clients' selection does more, their modules may be fewer than those whose names end like
    theirs: an expression of their own names then says which. The clients' expressions do not go into the output: PEFT
    runs them over the names of the base model wherever it is loaded, and a stranger's may take for ever. Tied heads
    are named too: PEFT ties nothing, and passes over their factors, unless one of the names is a head's that it knows,
    or an embedding's; an expression must match such a name by itself, not only where it ends a longer one.

    Of models of experts PEFT takes an expression for the last parts of the names that match in every layer, and finds
    none of those that transformers had before version 5, one linear map per expert: the whole names are listed.
    """
    names = sorted(layout.ranks)
    if not names:  # only parameters, such as those of experts
        return dict.fromkeys(SELECTION) | {"target_modules": []}
    if not only_names(config) and not _of_experts(config, names):
        if layout.tied and KNOWN_TO_PEFT.isdisjoint(names):
            names.append("embed_tokens")
        return dict.fromkeys(SELECTION) | {"target_modules": "|".join(map(re.escape, names))}
    if only_names(config) and _all_targeted(config, names):
        return {}
    return dict.fromkeys(SELECTION) | {"target_modules": names}


def _of_experts(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a model is one of experts: PEFT states its ``target_parameters`` even if none are adapted."""
    return config.get("target_parameters") is not None or any(map(is_linear_expert, names))


def _default_rank(layout: FileLayout) -> int:
    """That of the parameters or experts, for which PEFT takes no patterns without a warning; else the commonest."""
    shared = layout.parameter_rank or layout.expert_rank
    if shared is not None:
        return shared
    counts = Counter(layout.ranks.values())
    return max(counts, key=lambda rank: (counts[rank], rank))


def _parameter_ranks(config: Mapping[str, Any], layout: FileLayout) -> dict[str, int]:
    """Rank of every parameter that PEFT may adapt, by the name that it matches with patterns.

    Raises:
        ValueError: ``target_parameters`` does not lead to one.
    """
    if layout.parameter_rank is None:
        return {}
    parameters = TargetParameters(LoraSettings.parse(config, Path("config")))
    found: dict[str, int] = {}
    for module in layout.parameters:
        names = parameters.of(module)
        if not names:
            raise ValueError(f"{module}: target_parameters of the configuration names none of its parameters")
        found |= {f"{module}.{name}": layout.parameter_rank for name in names}
    return found


def _parts(config: Mapping[str, Any], extras: list[str]) -> dict[str, Any]:
    """The options whose tensors are there: PEFT would look for those of an option that is set.

    Raises:
        ValueError: trained token rows whose indices the configuration does not state.
    """
    tokens = any(key.endswith(TOKENS) for key in extras)
    if tokens and not config.get("trainable_token_indices"):
        raise ValueError("extras: trained token rows without trainable_token_indices in the configuration")
    return {
        "lora_bias": any(key.endswith(LORA_BIAS) for key in extras),
        "use_dora": any(key.endswith(MAGNITUDE) for key in extras),
        "trainable_token_indices": config.get("trainable_token_indices") if tokens else None,
    }


def _exact_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Ranks other than the default by module name; anchored where a name is also the end of another's."""
    plain = {module: rank for module, rank in ranks.items() if rank != default}
    if plain and not _reads_as(plain, ranks, default):
        return {f"^{re.escape(module)}": rank for module, rank in plain.items()}
    return plain


def _reads_as(pattern: Mapping[str, int], ranks: Mapping[str, int], default: int) -> bool:
    """Whether the names, read as expressions, give every module its rank."""
    try:
        table = PatternTable(pattern)
        return all((table.matching(module) or [default]) == [rank] for module, rank in ranks.items())
    except ValueError:
        return False


def _saved_extras(
    config: Mapping[str, Any], extras: list[str], modules: Collection[str], frozen: Collection[str]
) -> dict[str, Any]:
    """modules_to_save and bias as far as their tensors are there: PEFT fails on declared tensors that are not."""
    entries, bias = config["modules_to_save"] or [], config["bias"]
    if not entries and bias == "none":  # told by the tensors: a bias alone was trained as one
        told = [key for key in extras if key not in frozen and not is_frozen(key, modules, EMBEDDINGS)]
        found = [key.rpartition(".") for key in told]
        entries = sorted({module for module, _, part in found if part != "bias"} - {""})
        bias = "all"
    saved = [entry for entry in entries if any(saved_by(entry, key) for key in extras)]
    rest = (key for key in extras if key not in frozen and not any(saved_by(entry, key) for entry in saved))
    has_bias = any(key.endswith("bias") for key in rest)
    kept = {"modules_to_save": saved or None, "bias": bias if has_bias else "none"}
    settings = LoraSettings.parse({**config, **kept}, Path("config"))
    for key in extras:
        tied = settings.tying and bool(saved) and key.endswith(".weight")
        if not (settings.declares(key, modules) or is_frozen(key, modules) or tied):
            raise ValueError(f"extras: {key!r} is declared neither by modules_to_save nor by bias of the configuration")
    return kept


def _all_targeted(config: Mapping[str, Any], modules: Iterable[str]) -> bool:
    """Whether a selection by names alone leads PEFT to all these modules."""
    targets = config.get("target_modules")
    names = {name for name in targets if isinstance(name, str)} if isinstance(targets, list | set) else set()
    return all(not names.isdisjoint(ends_of(module)) for module in modules)
