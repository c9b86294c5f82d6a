"""The tensors of an adapter file, told apart by name: LoRA pairs, tensors beside them, and kinds that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..files.tensor_file import TensorSpec
from .config import PREFIX
from .names import RESERVED

FACTORS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
EMBEDDING_FACTORS = {".lora_embedding_A": "A", ".lora_embedding_B": "B"}
LORA_BIAS, MAGNITUDE, TOKENS = ".lora_B.bias", ".lora_magnitude_vector", ".token_adapter.trainable_tokens_delta"
# Name components that give other kinds away.
KINDS = {
    "lora_magnitude_vector": "DoRA is",
    "lora_diag": "KaSA is",
    "lora_monteclora_sampler": "MonteCLoRA is",
    "lora_E": "AdaLoRA is",
    "trainable_tokens_delta": "trainable tokens are",
}


@dataclass
class AdapterKeys:
    """Names in an adapter file.

    Attributes:
        factors: by the module's path, the names of its two factors.
        embeddings: paths whose factors are those of an embedding.
        biases: path -> name of its ``lora_B.bias``.
        magnitudes: path -> name of its DoRA magnitudes.
        tokens: path -> name of its trained token rows.
        others: names of all other tensors.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    biases: dict[str, str] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def sort_keys(where: object, specs: Mapping[str, TensorSpec]) -> AdapterKeys:
    """Sort the tensors of a file by what they are.

    Args:
        where: the file, for messages.
        specs: its tensors.

    Raises:
        ValueError: names file, module and kind of the first tensor that belongs to another kind of adapter, or of
            the first module without both factors.
    """
    keys = AdapterKeys()
    for key in sorted(specs):
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ValueError(f"{where}: {key}: unknown tensor: names of PEFT start with {PREFIX!r}")
        if RESERVED in name:
            raise ValueError(f"{where}: {key}: names that hold {RESERVED!r} are not supported")
        if not (_add_factor(where, keys, key, name) or _add_beside(keys, key, name)):
            _refuse_kind(where, name)
            keys.others.append(key)
    if not keys.factors:
        raise ValueError(f"{where}: holds no LoRA factors")
    for path, pair in keys.factors.items():
        for side in "AB":
            if side not in pair:
                stem = f"lora_embedding_{side}" if path in keys.embeddings else f"lora_{side}.weight"
                raise ValueError(f"{where}: {path}: {stem} is missing")
    return keys


def _add_factor(where: object, keys: AdapterKeys, key: str, name: str) -> bool:
    for suffix, side in (FACTORS | EMBEDDING_FACTORS).items():
        if not name.endswith(suffix) or name == suffix:
            continue
        path, embedding = name.removesuffix(suffix), suffix in EMBEDDING_FACTORS
        if keys.factors.get(path) and (path in keys.embeddings) != embedding:
            raise ValueError(f"{where}: {path}: has factors of an embedding and of a linear map")
        keys.factors.setdefault(path, {})[side] = key
        keys.embeddings |= {path} if embedding else set()
        return True
    return False


def _add_beside(keys: AdapterKeys, key: str, name: str) -> bool:
    for suffix, table in ((LORA_BIAS, keys.biases), (MAGNITUDE, keys.magnitudes), (TOKENS, keys.tokens)):
        if name.endswith(suffix):
            table[name.removesuffix(suffix)] = key
            return True
    return False


def _refuse_kind(where: object, name: str) -> None:
    parts = name.split(".")
    for i, part in enumerate(parts):
        module = f"{where}: {'.'.join(parts[:i]).removesuffix('.token_adapter')}"
        if part in KINDS:
            raise ValueError(f"{module}: {KINDS[part]} not supported ({part})")
        if part.startswith("lora_"):
            raise ValueError(f"{module}: unknown kind of LoRA tensor {'.'.join(parts[i:])!r}")
