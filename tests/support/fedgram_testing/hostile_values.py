"""What a stranger may write where a number, a name, a pattern or a file is expected."""

import random

NAMES = [
    "../../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "..",
    ".",
    "",
    "C:\\windows\\x",
    "file:///etc/passwd",
    "a\x00b",
    "a\nb\nc",
    "a\r\x1b[2J\x1b[31mred",
    "\u202eesrever",
    "\u2028line",
    "名前.ünï",
    "\ud800",
    "a" * 3000,
    "." * 500,
    "%s%n{0}",
    "[bold]markup[/bold]",
    "__metadata__",
    "lora_A.weight",
    "q_proj.lora_A.weight",
    "base_model.model.",
    "base_model.model.lora_A.weight",
    "base_model.model..lora_A.weight",
    "base_model.model.x.lora_A.default.weight",
    "base_model.model.x.lora_C.weight",
    "base_model.model.x.lora_magnitude_vector",
    "base_model.model.x.base_layer.lora_A.weight",
    "base_model.model.x.base_layer.base_layer.lora_B.weight",
    "base_model.model.x.lora_embedding_A",
    "base_model.model.x.token_adapter.trainable_tokens_delta",
    "base_model.model.x.lora_B.bias",
    "base_model.model.experts[3].lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    "base_model.model.score.weight",
]
PATTERNS = [
    "(a+)+$",
    "(.*a){30}",
    "(.*.*)*x",
    "((((.*)*)*)*)*!",
    "(.|.|.)+!",
    ".*" * 100,
    "(?=(.*)*!)" * 5,
    "(.{0,99}){0,99}!",
    "(){999999999}",
    "(",
    "a)|(b",
    "[[a]--b",
    "(?i)x",
    r"(.)\1",
    "(?P<n>.)(?P=n)",
    "(?(1)a|b)",
    "\\",
    "(" * 300,
    "(" * 120 + "a" + ")*" * 120,
    "q_proj",
    "v_proj",
    ".*",
    "",
    r".*\.layers\.(0|1)\..*",
    "^model.layers.0.self_attn.q_proj",
    "x" * 1500,
    "名前",
    "\n",
]


def number(rng: random.Random) -> object:
    """Something where a size, rank, offset or scaling is expected."""
    pool = [0, 1, 2, 3, 8, 64, -1, -(2**31), 2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**300]
    odd = [True, None, 2.0, 0.5, 1e308, float("nan"), float("inf"), "2", "", [], [2], {}, {"r": 2}, "\ud800"]
    return rng.choice(pool) if rng.random() < 0.6 else rng.choice(odd)


def junk(rng: random.Random) -> object:
    """Something where anything may stand."""
    draw = rng.random()
    if draw < 0.4:
        return number(rng)
    if draw < 0.55:
        return rng.choice(NAMES)
    if draw < 0.65:
        return rng.choice(PATTERNS)
    if draw < 0.75:
        return [junk(rng) for _ in range(rng.randrange(4))]
    if draw < 0.85:
        return {rng.choice(NAMES): junk(rng) for _ in range(rng.randrange(3))}
    if draw < 0.9:
        return nested(rng.choice([30, 200, 900]))
    return rng.choice([False, "none", "all", "lora_only", "all-linear", ["q_proj"], {"q_proj": 2}, "pissa", "gaussian"])


def nested(depth: int) -> object:
    """Lists in lists."""
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


SPECIAL = [
    float("nan"),
    float("inf"),
    -float("inf"),
    -0.0,
    0.0,
    1e-45,
    -1e-42,
    1.1754944e-38,
    3.4e38,
    -3.4e38,
    65504.0,
    6e-8,
    1e30,
    1e-30,
]
