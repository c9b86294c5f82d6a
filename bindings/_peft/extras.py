"""The tensors beside the factors: biases, DoRA magnitudes, token rows, saved modules, stored base weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import torch

from .config import PREFIX, LoraSettings
from .keys import LORA_BIAS, MAGNITUDE, TOKENS, AdapterKeys
from .shards import TensorSource

# Ends of the names of embeddings and heads whose frozen weights PEFT stores beside an adapter (its option
# save_embedding_layers, and by itself where a vocabulary was resized). Those of the first line are also taken to be
# frozen where nothing says what they are.
EMBEDDINGS = (".embed_tokens", ".embed_in", ".embed_out", ".wte", ".shared", ".word_embeddings", ".lm_head")
FROZEN = (
    *EMBEDDINGS,
    *(".word_embedding", ".tok_embeddings", ".token_embedding", ".backbone.embeddings", ".lm_head.decoder", ".lm_loss"),
    *(".predictions.decoder", ".proj_out", ".output_projection", ".generator_lm_head", ".vocab_projector"),
)

MAX_COMPARISONS = 2_000_000


def extra_roles(file: TensorSource, keys: AdapterKeys, settings: LoraSettings) -> dict[str, str]:
    """What each tensor beside the factors is: ``mean``, ``update`` or ``frozen`` (see ``Adapter.roles``).

    Raises:
        ValueError: names file and tensor: not announced by the configuration, or announced and not there, or of a
            shape that does not fit.
    """
    for table, declared, kind, suffix in (
        (keys.biases, settings.lora_bias, "lora_bias is", LORA_BIAS),
        (keys.magnitudes, settings.dora, "DoRA is", MAGNITUDE),
        (keys.tokens, bool(settings.tokens), "trainable tokens are", TOKENS),
    ):
        _check_declared(file, table, declared, kind, suffix)
    for path, key in (keys.biases | keys.magnitudes).items():
        if path not in keys.factors:
            raise ValueError(f"{file.path}: {path}: {key.removeprefix(PREFIX)} is there, but no factors are")
    for path, pair in keys.factors.items():
        _check_beside(file, keys, settings, path, file.specs[pair["B"]].shape)
    if len(settings.tokens) * len(keys.tokens) > MAX_COMPARISONS:
        raise ValueError(f"{settings.path}: trainable_token_indices: too many entries for {len(keys.tokens)} tensors")
    for path, key in keys.tokens.items():
        _check_rows(file, path, file.specs[key].shape, settings)
    if len(settings.modules_to_save) * len(keys.others) > MAX_COMPARISONS:
        raise ValueError(f"{settings.path}: modules_to_save: too many entries for {len(keys.others)} tensors")
    roles = dict.fromkeys(keys.biases.values(), "update")
    roles |= dict.fromkeys([*keys.magnitudes.values(), *keys.tokens.values()], "mean")
    announced = [key for key in keys.others if settings.declares(key.removeprefix(PREFIX), keys.factors)]
    roles |= dict.fromkeys(announced, "mean")
    twins = {file.specs[key].shape: key for key in announced if settings.tying}
    for key in keys.others:
        if key not in roles:
            roles[key] = _undeclared(file, key, twins.get(file.specs[key].shape), keys.factors)
    return roles


def _check_declared(file: TensorSource, table: Mapping[str, str], declared: bool, kind: str, suffix: str) -> None:
    if table and not declared:
        raise ValueError(f"{file.path}: {next(iter(table))}: {kind} not declared by the configuration ({suffix[1:]})")
    if declared and not table:
        raise ValueError(f"{file.path}: {kind} declared by the configuration, but no {suffix[1:]} is there")


def _check_beside(
    file: TensorSource, keys: AdapterKeys, settings: LoraSettings, path: str, outputs: tuple[int, ...]
) -> None:
    """Of one module: a bias and magnitudes where they are announced, of its number of outputs."""
    for table, suffix, needed in (
        (keys.biases, LORA_BIAS, settings.lora_bias and path not in keys.embeddings),
        (keys.magnitudes, MAGNITUDE, settings.dora),
    ):
        if path not in table:
            if needed:
                raise ValueError(f"{file.path}: {path}: {suffix[1:]} is missing")
            continue
        shape = file.specs[table[path]].shape
        if prod(shape) != outputs[0]:
            raise ValueError(f"{file.path}: {path}: {suffix[1:]} {shape} does not fit {outputs[0]} outputs")


def _check_rows(file: TensorSource, path: str, shape: tuple[int, ...], settings: LoraSettings) -> None:
    """The rows must be those of the indices; PEFT finds the module by the end of its name."""
    found = {indices for end, indices in settings.tokens.items() if path.endswith(end)}
    if len(found) != 1 or len(shape) != 2 or shape[0] != len(min(found)):
        raise ValueError(f"{file.path}: {path}: trained token rows {shape} do not fit trainable_token_indices")


def _undeclared(file: TensorSource, key: str, twin: str | None, modules: Collection[str]) -> str:
    """A weight tied to a saved module (its twin), or a stored base weight."""
    if twin is not None and torch.equal(file.read(key), file.read(twin)):
        return "mean"
    if not is_frozen(key.removeprefix(PREFIX), modules):
        raise ValueError(
            f"{file.path}: {key}: unknown tensor: neither a LoRA factor nor declared by modules_to_save or bias"
        )
    return "frozen"


def is_frozen(name: str, modules: Collection[str], ends: tuple[str, ...] = FROZEN) -> bool:
    """Whether a tensor (its name without prefix) is a stored base weight of an embedding or a head, of those names."""
    owner, _, parameter = name.rpartition(".")
    if parameter not in ("weight", "bias"):
        return False
    module = owner.removesuffix(".token_adapter.base_layer").removesuffix(".base_layer")
    wrapped = module != owner and parameter == "weight" and module in modules
    return wrapped or f".{module}".endswith(ends)
