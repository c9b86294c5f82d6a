"""What ``adapter_config.json`` says: which kinds of adapter are read, and how each module is scaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..files.documents import read_json
from .patterns import PatternTable

PREFIX = "base_model.model."

T = TypeVar("T")
MAX_SAVED = 1000
SPECIAL = frozenset("\\^$*+?{}()[]|")
"""Characters that make a regular expression of a name."""
LARGEST = 1e38
"""Of scalings: their squares still leave room in float64."""

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
# Those of them that an adapter file holds everything of.
IN_FILES = frozenset({"lora_bias", "target_parameters", "trainable_token_indices"})
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
# Initialisations that take the initial product out of the base weights: the update is B A - B0 A0.
MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ValueError: it is missing, not JSON, or not the configuration of a LoRA adapter.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file: not an adapter of PEFT'}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} is not supported: only 'LORA' is")
    return config


def refuse_other_kinds(
    config: Mapping[str, Any], path: Path, *, handled: Collection[str] = (), initial: bool = False
) -> None:
    """Refuse every option under which ``scaling * B @ A`` is not the update.

    Args:
        config: the configuration.
        path: its file, for messages.
        handled: options of ``REFUSED`` that the caller takes care of.
        initial: whether the caller subtracts the product of the initial factors.

    Raises:
        ValueError: names the option and the kind of adapter.
    """
    for option, kind in REFUSED.items():
        if config.get(option) and option not in handled:
            hint = "; allow_dora (--allow-dora) averages its parts" if option == "use_dora" else ""
            raise ValueError(f"{path}: every module: {kind} is not supported ({option} is set){hint}")
    init = config.get("init_lora_weights", True)
    if mutating_init(init):
        if not initial:
            raise ValueError(
                f"{path}: every module: init_lora_weights={init!r} is not supported without the initial factors "
                "(init, --init): it changes the base weights, and B A is then not the update"
            )
    elif not any(init is plain or (isinstance(init, str) and init.lower() == plain) for plain in PLAIN_INITS):
        raise ValueError(
            f"{path}: every module: init_lora_weights={init!r} is not supported: it may change the base weights, "
            "and B A is then not the update"
        )
    for option, value in config.items():
        if value and option not in HARMLESS and option not in REFUSED:
            raise ValueError(f"{path}: option {option!r} is set and not known here: the update may not be B A")


def mutating_init(init: Any) -> str | None:
    """The initialisation (of ``MUTATING_INITS``) that a value of ``init_lora_weights`` names, or None."""
    if not isinstance(init, str):
        return None
    name = init.lower()
    return "pissa" if name.startswith("pissa_niter_") else name if name in MUTATING_INITS else None


@dataclass(frozen=True)
class LoraSettings:
    """Ranks, scalings and extra tensors that a configuration declares.

    ``rank_pattern`` and ``alpha_pattern`` map regular expressions of module names to values. ``parameters`` are the
    entries of ``target_parameters``; ``tokens`` the indices of ``trainable_token_indices`` by the end of a module's
    name ("" for the input embedding); ``tying`` is ``ensure_weight_tying``; ``targets`` is ``target_modules``.
    """

    path: Path
    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: str
    modules_to_save: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    lora_bias: bool = False
    dora: bool = False
    tying: bool = False
    targets: frozenset[str] | str = frozenset()

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
            rank_pattern=_pattern(config, "rank_pattern", path, _rank),
            alpha_pattern=_pattern(config, "alpha_pattern", path, _number),
            bias=bias,
            modules_to_save=_saved_names(config, path),
            parameters=_strings(config, "target_parameters", path),
            tokens=_tokens(config, path),
            lora_bias=bool(config.get("lora_bias")),
            dora=bool(config.get("use_dora")),
            tying=bool(config.get("ensure_weight_tying")),
            targets=_targets(config.get("target_modules")),
        )

    def ranks(self, module: str) -> list[int]:
        """The ranks that the configuration states for a module: more than one where patterns overlap."""
        return matching(self.rank_pattern, module) or [self.r]

    def alphas(self, module: str) -> list[float]:
        """The alphas that the configuration states for a module: more than one where patterns overlap."""
        return matching(self.alpha_pattern, module) or [self.alpha]

    def scale(self, alpha: float, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def scaling(self, module: str, rank: int) -> float:
        """The scaling of a module of this rank.

        Raises:
            ValueError: patterns of different alphas match the module. PEFT takes the first but writes its patterns
                in alphabetical order: which one was first in training cannot be told from the file.
        """
        alphas = self.alphas(module)
        if len(alphas) > 1:
            raise ValueError(
                f"{self.path}: {module}: several entries of alpha_pattern match, with alphas {alphas}, and the file "
                "does not keep their order: make the patterns exclude each other"
            )
        return self.scale(alphas[0], rank)

    def declares(self, key: str, modules: Collection[str]) -> bool:
        """Whether a full tensor (its name without prefix) is one that ``modules_to_save`` or ``bias`` announce."""
        owner, _, parameter = key.rpartition(".")
        lora_bias = self.bias == "lora_only" and owner.removesuffix(".base_layer") in modules
        if parameter == "bias" and (self.bias == "all" or lora_bias):
            return True
        return any(saved_by(entry, key) for entry in self.modules_to_save)


def matching(pattern: Mapping[str, T], module: str) -> list[T]:
    """The different values of all entries that match the module, the one that PEFT takes first.

    Asked for many modules, give a ``PatternTable``: it reads its patterns once.

    Raises:
        ValueError: as ``PatternTable``.
    """
    return (pattern if isinstance(pattern, PatternTable) else PatternTable(pattern)).matching(module)


def saved_by(entry: str, key: str) -> bool:
    """Whether an entry of modules_to_save names a module around the tensor ``key`` (PEFT compares ends of names)."""
    return f"{entry}." in key


def _pattern(config: Mapping[str, Any], field: str, path: Path, value: Callable[[Any, str], T]) -> PatternTable[T]:
    """The table of a field; ``value`` checks one of its values, given a label for errors."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{path}: {field}: expected an object, got {pattern!r}")
    values = {key: value(entry, f"{path}: {field}[{key!r}]") for key, entry in pattern.items()}
    return PatternTable(values, f"{path}: {field}: ")


def _strings(config: Mapping[str, Any], field: str, path: Path) -> tuple[str, ...]:
    values = config.get(field) or []
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"{path}: {field}: expected a list of names, got {values!r}")
    return tuple(values)


def _saved_names(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """``modules_to_save``. PEFT reads its entries as expressions, also those of the output: only names are taken."""
    names = _strings(config, "modules_to_save", path)
    if len(names) > MAX_SAVED:
        raise ValueError(f"{path}: modules_to_save: more than {MAX_SAVED} names")
    for name in names:
        if not SPECIAL.isdisjoint(name):
            raise ValueError(f"{path}: modules_to_save: {name!r} is not a name but a regular expression")
    return names


def _tokens(config: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    value = config.get("trainable_token_indices") or {}
    tables = value if isinstance(value, dict) else {"": value}
    for indices in tables.values():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise ValueError(f"{path}: trainable_token_indices: expected lists of indices, got {str(value)[:100]}")
    return {module: tuple(indices) for module, indices in tables.items()}


def _targets(value: Any) -> frozenset[str] | str:
    """``target_modules``: names, or an expression; what is neither selects nothing."""
    if isinstance(value, str):
        return value
    return frozenset(name for name in value if isinstance(name, str)) if isinstance(value, list | set) else frozenset()


def _rank(value: Any, label: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{label}: expected a positive integer, got {value!r}")
    return value


def _number(value: Any, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"{label}: expected a finite number, got {value!r}")
    if abs(value) > LARGEST:
        raise ValueError(f"{label}: {value!r} is larger than {LARGEST:g}, as no update that float32 can hold needs it")
    return float(value)
