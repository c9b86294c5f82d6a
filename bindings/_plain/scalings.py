"""How the scalings of the clients' layers and of the output are told: alphas, numbers, or LoRA configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from fedgram.flora_na.layer import is_finite_number

from .._peft.config import LoraSettings, refuse_other_kinds
from .keys import DDP, StateKeys

Numbers: TypeAlias = float | Sequence[float] | Tensor | None
Settings: TypeAlias = Any  # a peft.LoraConfig, a mapping, or a sequence of them


@dataclass(frozen=True)
class ScalingRule:
    """How the scaling of a client's layer is known."""

    labels: Sequence[str]
    alphas: list[float] | None = None
    numbers: list[float] | None = None
    settings: list[LoraSettings] | None = None

    @staticmethod
    def make(
        labels: Sequence[str], took_part: Sequence[bool], lora_alpha: Numbers, scalings: Numbers, config: Settings
    ) -> ScalingRule:
        """The rule of those that took part, of the clients called by ``labels``; the others' settings are not read.

        Raises:
            ValueError: names the argument, and the client where it is of one.
        """
        _require_one(lora_alpha=lora_alpha, scalings=scalings, config=config)
        told = {"lora_alpha": lora_alpha, "scalings": scalings, "config": config}
        alphas, numbers, configs = (_per_client(value, took_part, argument) for argument, value in told.items())
        active = list(compress(labels, took_part))
        return ScalingRule(
            active,
            None if alphas is None else _scalings(alphas, active, "lora_alpha"),
            None if numbers is None else _scalings(numbers, active, "scalings"),
            None if configs is None else _each_settings(configs, active),
        )

    @property
    def known(self) -> bool:
        """Whether the scalings were told in any way."""
        return not (self.alphas is None and self.numbers is None and self.settings is None)

    def holds_at_any_rank(self, scaling: float, before: float | None) -> bool:
        """Whether receivers of another rank than the clients' have the clients' scaling, too: it was told as a number,
        or it is what an earlier round had (``before``, None where that is not known)."""
        if before is None or not self.known:
            return self.numbers is not None
        return before == scaling

    def scaling(self, client: int, module: str, rank: int) -> float:
        """Of the layer of one client (by its position)."""
        if self.numbers is not None:
            return self.numbers[client]
        if self.alphas is not None:
            return self.alphas[client] / max(rank, 1)
        if self.settings is not None:
            return self._stated(self.settings[client], self.labels[client], module, rank)
        return 1.0

    @staticmethod
    def _stated(settings: LoraSettings, label: str, module: str, rank: int) -> float:
        """What a configuration says of a layer, by either reading of a name that begins with ``module.``."""
        names = [module, module.removeprefix(DDP)] if module.startswith(DDP) else [module]
        fitting = [name for name in names if rank in settings.ranks(name)]
        if not fitting:
            stated = " or ".join(map(str, settings.ranks(module)))
            raise ValueError(f"{module}: {label} has rank {rank}, its config {stated}: the scaling is not known")
        scalings = [settings.scaling(name, rank) for name in fitting]
        if scalings[0] != scalings[-1]:
            raise ValueError(
                f"{module}: {label}: its config scales by {scalings[0]:g}, or by {scalings[-1]:g} where {DDP!r} is "
                "only DistributedDataParallel's: take it off, or send names that begin with 'base_model.model.'"
            )
        return scalings[0]


def check_scaling_options(
    *, lora_alpha: Any = None, scalings: Any = None, output_scaling: Any = None, config: Any = None
) -> None:
    """Check options that hold for all clients, before there are any.

    Raises:
        ValueError: names the option: not a finite number other than 0, not a LoRA configuration, or more than one way
            to tell the scalings.
    """
    _require_one(lora_alpha=lora_alpha, scalings=scalings, config=config)
    many = output_scaling if isinstance(output_scaling, Mapping) else {"": output_scaling}
    outputs = {f"output_scaling: {module}" if module else "output_scaling": value for module, value in many.items()}
    for option, value in {"lora_alpha": lora_alpha, "scalings": scalings, **outputs}.items():
        if value is not None:
            _checked(value, option)
    if config is not None:
        _settings(config, "config")


def _require_one(**told: Any) -> None:
    given = [name for name, value in told.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]}: give this or {given[1]}, not both")


def _each_settings(configs: Sequence[Any], labels: Sequence[str]) -> list[LoraSettings]:
    if len(configs) == 1:
        return [_settings(configs[0], "config")]
    return [_settings(one, f"config of {label}") for one, label in zip(configs, labels, strict=True)]


def config_fields(config: Any, label: str) -> dict[str, Any]:
    """The fields of a configuration; mappings, lists and sets of any library in it as dicts and lists.

    Raises:
        ValueError: it is neither a ``peft.LoraConfig`` nor a mapping.
    """
    fields = config if isinstance(config, Mapping) else getattr(config, "to_dict", lambda: None)()
    if not isinstance(fields, Mapping):
        raise ValueError(f"{label}: expected a peft.LoraConfig or a mapping, got {type(config).__name__}")
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, Set):
        return sorted(map(str, value))
    return (
        [_plain(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value
    )


def _settings(config: Any, label: str) -> LoraSettings:
    """What a configuration says of ranks and scalings; kinds whose update is not B A are refused."""
    plain = config_fields(config, label)
    if (kind := plain.get("peft_type")) not in (None, "LORA"):
        raise ValueError(f"{label}: peft_type {kind!r} is not supported: only 'LORA' is")
    refuse_other_kinds(plain, Path(label))
    return LoraSettings.parse(plain, Path(label))


def _per_client(told: Any, took_part: Sequence[bool], argument: str) -> list[Any] | None:
    """One value for each client that took part, of one for all or one per client."""
    if told is None:
        return None
    values = told.tolist() if isinstance(told, Tensor | np.ndarray) else told
    values = list(values) if isinstance(values, Sequence) else [values] * len(took_part)
    if len(values) != len(took_part):
        raise ValueError(f"{argument}: expected one, or {len(took_part)} (one per client), got {len(values)}")
    return list(compress(values, took_part))


def _scalings(values: Sequence[Any], labels: Sequence[str], argument: str) -> list[float]:
    for label, value in zip(labels, values, strict=True):
        if not _is_scaling(value):
            raise ValueError(f"{argument}: {label} has {value!r}; expected a finite number other than 0")
    return [float(value) for value in values]


def is_number(value: Any) -> bool:
    """Whether it is one finite number, Python's or numpy's."""
    of_kind = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return of_kind and is_finite_number(value)


def _is_scaling(value: Any) -> bool:
    return is_number(value) and bool(value != 0)


def _checked(value: Any, option: str) -> float:
    if not _is_scaling(value):
        raise ValueError(f"{option}: expected a finite number other than 0, got {value!r}")
    return float(value)


def output_scaling_of(
    module: str, own: Sequence[tuple[str, float]], given: float | Mapping[str, float] | None
) -> float:
    """What the receivers multiply a module's pair by: as given, or what all clients (label, scaling) share."""
    if given is not None:
        return _checked(given.get(module) if isinstance(given, Mapping) else given, f"output_scaling: {module}")
    first_label, first = own[0]
    for label, scaling in own[1:]:
        if scaling != first:
            raise ValueError(
                f"{module}: {label} scales by {scaling:g}, {first_label} by {first:g}: "
                "say in output_scaling by what the receivers will"
            )
    if first == 0:
        raise ValueError(f"{module}: the scaling is 0: say in output_scaling by what the receivers will multiply")
    return first


def require_equal_ranks(found: Sequence[StateKeys], labels: Sequence[str]) -> None:
    """Without alpha, clients of one rank have one scaling if they share alpha; of different ranks they have not."""
    first: dict[str, tuple[int, str]] = {}
    for keys, label in zip(found, labels, strict=True):
        for module, pair in keys.factors.items():
            rank = pair["A"].shape[0]
            other, whose = first.setdefault(module, (rank, label))
            if rank != other:
                raise ValueError(
                    f"{module}: {label} has rank {rank}, {whose} rank {other}, so their scalings may differ: "
                    "give lora_alpha, scalings or config"
                )
