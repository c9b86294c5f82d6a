"""Small whole adapters of every kind, as drafts that can be damaged before and after they become files."""

import copy
import json
import math
import random
import struct
from dataclasses import dataclass, field

WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "adapter_model.safetensors.index.json"
PREFIX = "base_model.model."
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass
class Draft:
    """An adapter before it is written: ``tensors`` maps a name to dtype, shape and values."""

    kind: str
    config: dict
    tensors: dict[str, tuple[str, list[int], list[float]]]
    folder: str = ""  # where PEFT puts an adapter that is not named "default"
    shards: int = 1

    def copy(self) -> "Draft":
        tensors = {key: (dtype, list(shape), list(data)) for key, (dtype, shape, data) in self.tensors.items()}
        return Draft(self.kind, copy.deepcopy(self.config), tensors, self.folder, self.shards)


@dataclass
class Header:
    """A safetensors header as a list: unlike an object it can hold a name twice."""

    entries: list[tuple[str, object]] = field(default_factory=list)
    data: bytes = b""

    def text(self) -> bytes:
        pairs = (f"{json.dumps(key)}:{json.dumps(value)}" for key, value in self.entries)
        return ("{" + ",".join(pairs) + "}").encode("utf-8", "surrogatepass")


def pack(values: list[float], dtype: str) -> bytes:
    """Bytes of numbers; what a type cannot hold becomes infinite, or 0 in an integer type."""
    if dtype == "BF16":
        data = pack(values, "F32")
        return b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))  # the upper halves
    code = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b"}.get(dtype, "B")
    if code not in "dfe":
        values = [int(value) if 0 <= value < 100 else 0 for value in values]
    try:
        return struct.pack(f"<{len(values)}{code}", *values)
    except OverflowError:
        largest = {"f": 3.4e38, "e": 65504.0}[code]
        values = [value if not abs(value) > largest else math.copysign(math.inf, value) for value in values]
        return struct.pack(f"<{len(values)}{code}", *values)


def header_of(tensors: dict[str, tuple[str, list[int], list[float]]]) -> Header:
    """The header and the data that the format's own writer would make."""
    header = Header([("__metadata__", {"format": "pt"})])
    for key, (dtype, shape, values) in tensors.items():
        data = pack(values, dtype)
        begin, end = len(header.data), len(header.data) + len(data)
        header.entries.append((key, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}))
        header.data += data
    return header


def file_of(header: Header) -> bytes:
    """A whole safetensors file."""
    text = header.text()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + header.data


def _config(**changes) -> dict:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "a/model",
        "task_type": None,
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "target_modules": ["q_proj", "v_proj"],
        "inference_mode": True,
        "lora_dropout": 0.1,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    } | changes


def _tensor(rng: random.Random, *shape: int, dtype: str = "F32") -> tuple[str, list[int], list[float]]:
    count = 1
    for n in shape:
        count *= n
    return dtype, list(shape), [rng.gauss(0, 1) for _ in range(count)]


def _pair(rng: random.Random, module: str, m: int, n: int, r: int = 2, dtype: str = "F32") -> dict:
    return {
        f"{PREFIX}{module}.lora_A.weight": _tensor(rng, r, n, dtype=dtype),
        f"{PREFIX}{module}.lora_B.weight": _tensor(rng, m, r, dtype=dtype),
    }


def bases() -> list[Draft]:
    """One draft of every kind; the same ones each time."""
    rng = random.Random(0)
    attention = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
    layers = {key: value for module in attention for key, value in _pair(rng, module, 4, 6).items()}
    half = {key: value for module in attention for key, value in _pair(rng, module, 4, 6, dtype="BF16").items()}
    head = {f"{PREFIX}score.weight": _tensor(rng, 3, 4), f"{PREFIX}score.bias": _tensor(rng, 3)}
    patterns = _config(
        rank_pattern={r".*\.layers\.(0|1)\.self_attn\.v_proj": 1}, alpha_pattern={"q_proj": 3}, use_rslora=True
    )
    mixed = {
        key: value for i in range(2) for key, value in _pair(rng, f"model.layers.{i}.self_attn.q_proj", 4, 6).items()
    }
    mixed |= {k: v for i in range(2) for k, v in _pair(rng, f"model.layers.{i}.self_attn.v_proj", 4, 6, 1).items()}
    conv = {f"{PREFIX}c.lora_A.weight": _tensor(rng, 2, 3, 3, 3), f"{PREFIX}c.lora_B.weight": _tensor(rng, 4, 2, 1, 1)}
    embedding = {f"{PREFIX}e.lora_embedding_A": _tensor(rng, 2, 9), f"{PREFIX}e.lora_embedding_B": _tensor(rng, 4, 2)}
    experts = {
        f"{PREFIX}mlp.experts.base_layer.lora_A.weight": _tensor(rng, 6, 4),
        f"{PREFIX}mlp.experts.base_layer.lora_B.weight": _tensor(rng, 5, 6),
    }
    magnitude = {f"{PREFIX}q_proj.lora_magnitude_vector": _tensor(rng, 4)}
    bias = {f"{PREFIX}q_proj.lora_B.bias": _tensor(rng, 4)}
    tokens = {f"{PREFIX}embed.token_adapter.trainable_tokens_delta": _tensor(rng, 2, 4)}
    one = _pair(rng, "q_proj", 4, 6)
    return [
        Draft("linear", _config(), layers),
        Draft("bfloat16", _config(), half),
        Draft("patterns", patterns, mixed),
        Draft("saved", _config(modules_to_save=["score"], task_type="SEQ_CLS"), layers | head),
        Draft("bias", _config(bias="all"), layers | {f"{PREFIX}model.norm.bias": _tensor(rng, 4)}),
        Draft("named", _config(), layers, folder="other"),
        Draft("sharded", _config(), layers, shards=2),
        Draft("embedding", _config(target_modules=["e"]), embedding),
        Draft("conv", _config(target_modules=["c"]), conv),
        Draft("experts", _config(target_modules=[], target_parameters=["mlp.experts.down_proj"]), experts),
        Draft("dora", _config(use_dora=True), one | magnitude),
        Draft("lora_bias", _config(lora_bias=True), one | bias),
        Draft("tokens", _config(trainable_token_indices={"embed": [1, 3]}), one | tokens),
        Draft("pissa", _config(init_lora_weights="pissa"), one),
    ]
