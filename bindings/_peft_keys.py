"""The tensors of an adapter file, told apart by name: LoRA pairs, declared full tensors, and kinds that are refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._peft_config import PREFIX, LoraSettings
from ._tensor_file import TensorFile

FACTORS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
# Name components (or, with a dot, ends of names) that give other kinds away.
KINDS = {
    "lora_magnitude_vector": "DoRA is",
    "lora_embedding_A": "embedding LoRA is",
    "lora_embedding_B": "embedding LoRA is",
    "lora_diag": "KaSA is",
    "lora_monteclora_sampler": "MonteCLoRA is",
    "lora_E": "AdaLoRA is",
    "trainable_tokens_delta": "trainable tokens are",
}
CONVOLUTIONS = {3: "Conv1d LoRA", 4: "Conv2d LoRA", 5: "Conv3d LoRA"}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass
class AdapterKeys:
    """Names in an adapter file: the two factors of every module, and everything else (by its full name)."""

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def sort_keys(file: TensorFile) -> AdapterKeys:
    """Sort the tensors of a file by what they are.

    Raises:
        ValueError: names file, module and kind of the first tensor that belongs to another kind of adapter.
    """
    keys = AdapterKeys()
    for key in sorted(file.specs):
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ValueError(f"{file.path}: {key}: unknown tensor: names of PEFT start with {PREFIX!r}")
        suffix = next((s for s in FACTORS if name.endswith(s)), None)
        if suffix is None:
            _refuse_kind(file, name)
            keys.others.append(key)
        else:
            keys.factors.setdefault(name.removesuffix(suffix), {})[FACTORS[suffix]] = key
    if not keys.factors:
        raise ValueError(f"{file.path}: holds no LoRA factors")
    return keys


def check_factors(file: TensorFile, keys: AdapterKeys, settings: LoraSettings) -> None:
    """Check that every module has two factors that multiply, of the rank that the configuration states.

    Raises:
        ValueError: names file, module and what does not fit.
    """
    for module, pair in keys.factors.items():
        where = f"{file.path}: {module}"
        if module.endswith(".base_layer"):
            raise ValueError(f"{where}: MoE LoRA (target_parameters) is not supported")
        for side in "AB":
            if side not in pair:
                raise ValueError(f"{where}: lora_{side}.weight is missing")
        A, B = file.specs[pair["A"]], file.specs[pair["B"]]
        if len(A.shape) != 2 or len(B.shape) != 2:
            kind = CONVOLUTIONS.get(len(A.shape), "LoRA of this shape")
            raise ValueError(f"{where}: {kind} is not supported (lora_A {A.shape}, lora_B {B.shape})")
        if A.dtype != B.dtype or A.dtype not in FLOATS:
            raise ValueError(f"{where}: lora_A is {A.dtype} and lora_B is {B.dtype}: expected one floating-point type")
        if B.shape[1] != A.shape[0] or 0 in A.shape + B.shape:
            raise ValueError(f"{where}: lora_B {B.shape} and lora_A {A.shape} do not multiply")
        if A.shape[0] not in settings.ranks(module):
            stated = " or ".join(map(str, settings.ranks(module)))
            raise ValueError(
                f"{where}: rank {A.shape[0]} in the file, {stated} by r and rank_pattern of {settings.path.name}: "
                "its scaling is not known"
            )
        settings.scaling(module, A.shape[0])


def check_others(file: TensorFile, keys: AdapterKeys, settings: LoraSettings) -> None:
    """Check that the configuration announces every tensor that is not a LoRA factor.

    Raises:
        ValueError: names file and tensor.
    """
    for key in keys.others:
        if not settings.declares(key.removeprefix(PREFIX), keys.factors):
            raise ValueError(
                f"{file.path}: {key}: unknown tensor: neither a LoRA factor nor declared by modules_to_save or bias"
            )


def _refuse_kind(file: TensorFile, name: str) -> None:
    parts = name.split(".")
    if name.endswith(".lora_B.bias"):
        raise ValueError(f"{file.path}: {name.removesuffix('.lora_B.bias')}: lora_bias is not supported")
    for i, part in enumerate(parts):
        where = f"{file.path}: {'.'.join(parts[:i]).removesuffix('.token_adapter')}"
        if part in KINDS:
            raise ValueError(f"{where}: {KINDS[part]} not supported ({part})")
        if part.startswith("lora_"):
            raise ValueError(f"{where}: unknown kind of LoRA tensor {'.'.join(parts[i:])!r}")
