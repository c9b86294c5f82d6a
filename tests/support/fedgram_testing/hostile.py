"""A corpus of damaged adapters: every number of a seed makes one directory, always the same."""

import json
import random
from pathlib import Path

from . import hostile_values as values
from .hostile_bases import CONFIG, INDEX, WEIGHTS, Draft, bases, file_of, header_of
from .hostile_mutations import STAGES

BASES = bases()
LOADABLE = ("linear", "bfloat16", "patterns", "saved", "bias")


def build(seed: str, folder: Path) -> str:
    """Write one adapter into the empty ``folder``; returns what was done to it, for reports."""
    rng = random.Random(seed)
    draft = rng.choice(BASES).copy()
    done = [draft.kind]
    chosen: dict[str, list] = {}
    while not any(chosen.values()):
        chosen = {
            name: [rng.choice(mutations) for _ in range(rng.choice((1, 1, 1, 2, 3)))] if rng.random() < share else []
            for name, (share, mutations) in STAGES.items()
        }
    for name in ("draft", "config"):
        for mutate in chosen[name]:
            done.append(mutate.__name__)
            mutate(rng, draft)
    place = folder / draft.folder if draft.folder else folder
    place.mkdir(exist_ok=True)
    files = _files(draft, chosen["header"], rng, done)
    for mutate in chosen["bytes"]:
        name = rng.choice(sorted(files))
        done.append(f"{mutate.__name__}({name})")
        files[name] = mutate(rng, files[name])
    for name, data in files.items():
        (place / name).write_bytes(data)
    for mutate in chosen["files"]:
        name = rng.choice(sorted(files))
        done.append(f"{mutate.__name__}({name})")
        mutate(rng, place / name, folder)
    return " ".join(done)


def write(draft: Draft, folder: Path) -> Path:
    """Write a draft as it is."""
    place = folder / draft.folder
    place.mkdir(parents=True, exist_ok=True)
    for name, data in _files(draft, [], random.Random(0), []).items():
        (place / name).write_bytes(data)
    return folder


def _files(draft: Draft, mutations: list, rng: random.Random, done: list[str]) -> dict[str, bytes]:
    """The files of an adapter, one of its headers changed by ``mutations``."""
    config = json.dumps(draft.config).encode("utf-8", "surrogatepass")
    if draft.config.pop("<twice>", False):
        config = config[:-1] + b', "r": 3}'
    files = {CONFIG: config}
    names = list(draft.tensors)
    parts = [names[i :: draft.shards] for i in range(draft.shards)]
    weight_map = {}
    changed = rng.randrange(draft.shards)
    for i, part in enumerate(parts):
        header = header_of({name: draft.tensors[name] for name in part})
        for mutate in mutations if i == changed else []:
            done.append(mutate.__name__)
            mutate(rng, header)
        name = WEIGHTS if draft.shards == 1 else f"adapter_model-{i + 1:05}-of-{draft.shards:05}.safetensors"
        files[name] = file_of(header)
        weight_map |= dict.fromkeys(part, name)
    if draft.shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        if rng.random() < 0.5 and mutations:
            done.append(_twist_index(rng, index))
        files[INDEX] = json.dumps(index).encode("utf-8", "surrogatepass")
    return files


def _twist_index(rng: random.Random, index: dict) -> str:
    weight_map = index["weight_map"]
    key = rng.choice(list(weight_map))
    twist = rng.choice(["path", "missing", "extra", "swap", "junk", "not an object"])
    if twist == "path":
        traps = [
            "../../../etc/passwd",
            "/etc/passwd",
            "../other.safetensors",
            ".",
            "",
            "a\x00.safetensors",
            "/dev/zero",
        ]
        weight_map[key] = rng.choice([*traps, *(f"{trap}.safetensors" for trap in traps)])
    elif twist == "missing":
        del weight_map[key]
    elif twist == "extra":
        weight_map[rng.choice(values.NAMES)] = weight_map[key]
    elif twist == "swap":
        weight_map[key] = rng.choice(list(weight_map.values()))
    elif twist == "junk":
        weight_map[key] = values.junk(rng)
    else:
        index["weight_map"] = values.junk(rng)
    return f"index:{twist}"
