"""What ``adapter_config.json`` says: which kinds of adapter are read, and how each module is scaled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

PREFIX = "base_model.model."

T = TypeVar("T")

# Options that make the update something else than scaling * B @ A of linear layers.
REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "aLoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "lora_bias",
    "target_parameters": "MoE LoRA (target_parameters)",
    "trainable_token_indices": "trainable tokens",
    "megatron_config": "Megatron layers",
}
# Options that do not change what B A means. Any other option that is set is refused: it may.
# fmt: off
HARMLESS = frozenset(
    {
        "auto_mapping", "peft_version", "inference_mode", "base_model_name_or_path", "revision", "peft_type",
        "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication",
        "init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
        "fan_in_fan_out", "lora_dropout", "ensure_weight_tying", "qalora_group_size", "megatron_core", "runtime_config",
    }
)
# fmt: on
# Initialisations that leave the base weights alone, so that B A is the whole update.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ValueError: it is missing, not JSON, or not the configuration of a LoRA adapter.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file: not an adapter of PEFT'}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} is not supported: only 'LORA' is")
    return config


def refuse_other_kinds(config: Mapping[str, Any], path: Path) -> None:
    """Refuse every option under which ``scaling * B @ A`` is not the update.

    Raises:
        ValueError: names the option and the kind of adapter.
    """
    for option, kind in REFUSED.items():
        if config.get(option):
            raise ValueError(f"{path}: every module: {kind} is not supported ({option} is set)")
    init = config.get("init_lora_weights", True)
    if not any(init is plain or (isinstance(init, str) and init.lower() == plain) for plain in PLAIN_INITS):
        raise ValueError(
            f"{path}: every module: init_lora_weights={init!r} is not supported: it may change the base weights, "
            "and B A is then not the update"
        )
    for option, value in config.items():
        if value and option not in HARMLESS and option not in REFUSED:
            raise ValueError(f"{path}: option {option!r} is set and not known here: the update may not be B A")


@dataclass(frozen=True)
class LoraSettings:
    """Ranks, scalings and extra tensors that a configuration declares.

    ``rank_pattern`` and ``alpha_pattern`` map regular expressions of module names to values.
    """

    path: Path
    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: str
    modules_to_save: tuple[str, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any], path: Path) -> LoraSettings:
        """Check the types and values of the fields that matter.

        Raises:
            ValueError: names the field and its value.
        """
        bias, rslora = config.get("bias", "none"), config.get("use_rslora", False)
        if bias not in ("none", "all", "lora_only"):
            raise ValueError(f"{path}: bias: expected none, all or lora_only, got {bias!r}")
        if not isinstance(rslora, bool | None):
            raise ValueError(f"{path}: use_rslora: expected true or false, got {rslora!r}")
        return cls(
            path=path,
            r=_rank(config.get("r", 8), f"{path}: r"),
            alpha=_number(config.get("lora_alpha", 8), f"{path}: lora_alpha"),
            rslora=bool(rslora),
            rank_pattern={
                k: _rank(v, f"{path}: rank_pattern[{k!r}]") for k, v in _pattern(config, "rank_pattern", path)
            },
            alpha_pattern={
                k: _number(v, f"{path}: alpha_pattern[{k!r}]") for k, v in _pattern(config, "alpha_pattern", path)
            },
            bias=bias,
            modules_to_save=_strings(config, "modules_to_save", path),
        )

    def ranks(self, module: str) -> list[int]:
        """The ranks that the configuration states for a module: more than one where patterns overlap."""
        return matching(self.rank_pattern, module) or [self.r]

    def scaling(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA.

        Raises:
            ValueError: patterns of different alphas match the module. PEFT takes the first but writes its patterns
                in alphabetical order: which one was first in training cannot be told from the file.
        """
        alphas = matching(self.alpha_pattern, module) or [self.alpha]
        if len(alphas) > 1:
            raise ValueError(
                f"{self.path}: {module}: several entries of alpha_pattern match, with alphas {alphas}, and the file "
                "does not keep their order: make the patterns exclude each other"
            )
        return alphas[0] / (math.sqrt(rank) if self.rslora else rank)

    def declares(self, key: str, modules: Collection[str]) -> bool:
        """Whether a full tensor (its name without prefix) is one that ``modules_to_save`` or ``bias`` announce."""
        owner, _, parameter = key.rpartition(".")
        lora_bias = self.bias == "lora_only" and owner.removesuffix(".base_layer") in modules
        if parameter == "bias" and (self.bias == "all" or lora_bias):
            return True
        return any(saved_by(entry, key) for entry in self.modules_to_save)


def matches(key: str, module: str) -> bool:
    """Whether a pattern matches a module by PEFT's rule: its whole name, or all that follows one of its dots."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def matching(pattern: Mapping[str, T], module: str) -> list[T]:
    """The different values of all entries that match the module, the one that PEFT takes first."""
    return list(dict.fromkeys(value for key, value in pattern.items() if matches(key, module)))


def saved_by(entry: str, key: str) -> bool:
    """Whether an entry of modules_to_save names a module around the tensor ``key`` (PEFT compares ends of names)."""
    parts = key.split(".")
    return any(".".join(parts[:i]).endswith(entry) for i in range(1, len(parts)))


def _pattern(config: Mapping[str, Any], field: str, path: Path) -> Iterable[tuple[str, Any]]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{path}: {field}: expected an object, got {pattern!r}")
    for key in pattern:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: {field}: {key!r} is not a regular expression ({error})") from error
    return pattern.items()


def _strings(config: Mapping[str, Any], field: str, path: Path) -> tuple[str, ...]:
    values = config.get(field) or []
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"{path}: {field}: expected a list of names, got {values!r}")
    return tuple(values)


def _rank(value: Any, label: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{label}: expected a positive integer, got {value!r}")
    return value


def _number(value: Any, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"{label}: expected a finite number, got {value!r}")
    return float(value)
