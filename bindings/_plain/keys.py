"""LoRA factors in state dicts, told apart by name: which module, which side, and every other tensor beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .._peft.keys import KINDS

# DistributedDataParallel puts ``module.`` before every name and torch.compile ``_orig_mod.``: around a PEFT model they
# are no part of what patterns see. Without PEFT's prefix, ``module.`` may as well be a layer of the model's own.
WRAPPED = re.compile(r"(?:module\.|_orig_mod\.)*base_model\.model\.|(?:module\.)*(?:_orig_mod\.(?:module\.)*)+")
DDP = "module."

T = TypeVar("T")

# PEFT writes ``x.lora_A.weight`` (adapter files), ``x.lora_A.default.weight`` (model.state_dict()) and
# ``x.lora_embedding_A`` with or without the adapter's name; loralib and others ``x.lora_A`` and ``x.lora_a.weight``.
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<stem>lora(?:_embedding)?)_(?P<side>[ABab])"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<ending>\.weight)?"
)


@dataclass(frozen=True)
class FactorKey:
    """Where one factor of a module was found."""

    module: str
    side: str  # "A" or "B"
    stem: str  # "lora" or "lora_embedding"
    key: str
    shape: torch.Size


@dataclass
class StateKeys:
    """The names in one state dict: the two factors of every module, and the tensors beside them, name -> key."""

    factors: dict[str, dict[str, FactorKey]] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)


def sort_state(state: Mapping[str, Tensor], label: str) -> StateKeys:
    """Sort the names of a state dict.

    Raises:
        ValueError: names the client, the tensor and the reason: not a tensor, half a pair, two adapters in one state
            dict, or a kind of adapter whose update is not ``B @ A``.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dicts: {label} is a {type(state).__name__}; expected a state dict")
    keys = StateKeys()
    beside: dict[str, list[str]] = {}  # by what they are called without a wrapper's prefix
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise ValueError(f"state_dicts: {label} has the key {key!r}; expected names")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{key}: {label} has a {type(tensor).__name__}; expected a tensor")
        found = FACTOR.fullmatch(key)
        if found is None:
            _refuse_kind(key, label)
            beside.setdefault(module_name(key), []).append(key)
            continue
        module, side, stem = module_name(found["module"]), found["side"].upper(), found["stem"]
        _add(keys, FactorKey(module, side, stem, key, tensor.shape), label)
    for name, found_keys in beside.items():  # two that differ by the prefix alone are two tensors
        keys.extras |= {name: found_keys[0]} if len(found_keys) == 1 else {key: key for key in found_keys}
    for module, pair in keys.factors.items():
        if module.endswith(".base_layer"):
            raise ValueError(f"{module}: {label}: LoRA of experts (target_parameters) is not supported in state dicts")
        if lacking := {"A", "B"} - pair.keys():
            raise ValueError(f"{module}: {label} has no lora_{lacking.pop()}")
    return keys


def module_name(name: str) -> str:
    """A module's name in the model that PEFT was put on, which is what patterns are matched against."""
    wrapped = WRAPPED.match(name)
    return name[wrapped.end() :] if wrapped else name


def entry_name(key: str) -> str:
    """What an entry is, however it is spelled: a module's factor, or a tensor beside the factors."""
    found = FACTOR.fullmatch(key)
    return module_name(key) if found is None else f"{module_name(found['module'])}.lora_{found['side'].upper()}"


def factor_modules(state: Iterable[str]) -> set[str]:
    """The modules of which a state dict has factors."""
    return {module_name(found["module"]) for key in state if (found := FACTOR.fullmatch(key)) is not None}


def completed(start: Mapping[str, T], state: Mapping[str, T]) -> dict[str, T]:
    """A round's new state, and of what it started from the entries that nobody sent, as they were."""
    answered = {entry_name(key) for key in state}
    return {key: value for key, value in start.items() if key in state or entry_name(key) not in answered} | dict(state)


def _add(keys: StateKeys, factor: FactorKey, label: str) -> None:
    pair = keys.factors.setdefault(factor.module, {})
    if factor.side in pair:
        raise ValueError(
            f"{factor.module}: {label} has two adapters ({pair[factor.side].key!r} and {factor.key!r}): send one"
        )
    pair[factor.side] = factor


def _refuse_kind(key: str, label: str) -> None:
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part in KINDS:
            raise ValueError(f"{'.'.join(parts[:i])}: {label}: {KINDS[part]} not supported ({part})")
        if part.lower() in ("lora_a", "lora_b") and parts[i + 1 :][-1:] == ["bias"]:
            raise ValueError(f"{'.'.join(parts[:i])}: {label}: lora_bias is not supported")
        if part.lower().startswith("lora_"):
            raise ValueError(f"{key}: {label}: unknown kind of LoRA tensor")


def same_layer(pair: Mapping[str, FactorKey], label: str, other: Mapping[str, FactorKey], whose: str) -> None:
    """Refuse layers of another kind or kernel: flattened, their factors may well fit each other.

    Raises:
        ValueError: names the module, both clients and what they sent.
    """
    A, B = pair["A"], other["A"]
    if (A.stem, A.shape[1:]) != (B.stem, B.shape[1:]):
        own, others = (f"{factor.stem}_A {tuple(factor.shape)}" for factor in (A, B))
        raise ValueError(f"{A.module}: {label} has {own}, {whose} {others}: not the same layer")


def matrices(state: Mapping[str, Tensor], pair: Mapping[str, FactorKey]) -> tuple[Tensor, Tensor]:
    """``(A (r, n), B (m, r))`` of a module. Convolutions are flattened: A (r, c_in, k, ..) and B (m, r, 1, ..).

    Raises:
        ValueError: B of a convolution has a kernel of its own, or belongs to a grouped one (``flora_na.LoraLayer``
            then finds that the two do not multiply).
    """
    A, B = state[pair["A"].key].detach(), state[pair["B"].key].detach()
    if A.ndim < 2 or B.ndim < 2 or any(size != 1 for size in B.shape[2:]):
        raise ValueError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not the factors of one update")
    return A.flatten(1), B.flatten(1)


def restored(factor: Tensor, like: FactorKey) -> Tensor:
    """A factor (r, n) or (m, r) in the shape that its key had in the state dict; the rank may be another."""
    if len(like.shape) == 2:
        return factor
    return factor.reshape(factor.shape[0], -1, *like.shape[2:])
