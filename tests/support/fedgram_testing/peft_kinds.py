"""One small model and configuration per kind of adapter that PEFT writes, and what PEFT itself makes of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .peft_adapters import PeftLoraLayer, bert, gpt2, llama, load_with_peft, mlp, quietly, write_client

with __import__("warnings").catch_warnings():
    __import__("warnings").simplefilter("ignore")
    from peft.tuners.lora.layer import Conv1D, Embedding, ParamWrapper
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        WhisperConfig,
        WhisperForConditionalGeneration,
    )


WHISPER = {"layers": 1, "ffn_dim": 12, "attention_heads": 2}


def seeded(make):
    torch.manual_seed(0)
    return make()


def tied_llama() -> nn.Module:
    """A causal model whose head is its embedding."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = LlamaConfig(vocab_size=20, max_position_embeddings=16, tie_word_embeddings=True, **sizes)
    return seeded(lambda: LlamaForCausalLM(config))


def t5() -> nn.Module:
    """Three embeddings and a head, all of one weight."""
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return seeded(lambda: T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)))


def whisper() -> nn.Module:
    """A decoder whose embedding is tied to a head that is called proj_out."""
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in WHISPER.items()}
    tokens = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 6}
    return seeded(lambda: WhisperForConditionalGeneration(WhisperConfig(d_model=8, **sides, **tokens, **lengths)))


def mixtral(layers: int = 1) -> nn.Module:
    """Three experts in each layer, whose weights are (experts, out, in)."""
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 12}
    config = MixtralConfig(
        vocab_size=20, num_key_value_heads=1, num_local_experts=3, max_position_embeddings=16, num_experts_per_tok=2,
        **sizes,
    )  # fmt: skip
    return seeded(lambda: MixtralForCausalLM(config))


class Experts(nn.Module):
    """Experts whose weights are (experts, in, out), and a two-dimensional parameter."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 5, 7))
        self.flat = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.up), x @ self.flat.T


def experts() -> nn.Module:
    return seeded(lambda: nn.ModuleDict({"moe": Experts(), "lin": nn.Linear(4, 3)}))


def embeddings() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7)))


def convolutions() -> nn.Module:
    return seeded(
        lambda: nn.ModuleDict(
            {
                "one": nn.Conv1d(3, 6, 4),
                "two": nn.Conv2d(4, 6, (3, 2)),
                "three": nn.Conv3d(3, 5, 2),
                "point": nn.Conv2d(5, 6, 1),
                "flat": nn.Linear(6, 4),
            }
        )
    )


def attention() -> nn.Module:
    return seeded(lambda: nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "lin": nn.Linear(4, 3)}))


def normalised() -> nn.Module:
    """A saved module with integers and statistics beside its weights."""
    return seeded(lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)))


@dataclass(frozen=True)
class Kind:
    """A model, options of LoraConfig beside rank and alpha, and options that reading it needs."""

    base: Callable[[], nn.Module]
    options: dict
    reading: dict = field(default_factory=dict)


BOTH = ["0", "2"]
KINDS = {
    "linear": Kind(mlp, {"target_modules": BOTH}),
    "rslora": Kind(mlp, {"target_modules": BOTH, "use_rslora": True}),
    "patterns": Kind(mlp, {"target_modules": BOTH, "rank_pattern": {"0": 1}, "alpha_pattern": {"^2": 7}}),
    "Conv1D": Kind(gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": Kind(embeddings, {"target_modules": ["0", "1"]}),
    "embedding of a language model": Kind(llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "convolutions": Kind(convolutions, {"target_modules": ["one", "two", "three", "point", "flat"]}),
    "experts": Kind(
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"q_proj": 2},
        },
    ),
    "experts by bare names": Kind(
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
        },
    ),
    "experts of some layers": Kind(lambda: mixtral(2), {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "experts by all-linear": Kind(mixtral, {"target_modules": "all-linear"}),
    "transposed experts": Kind(experts, {"target_modules": ["lin"], "target_parameters": ["moe.up"]}),
    "parameter": Kind(experts, {"target_modules": [], "target_parameters": ["moe.flat"]}),
    "attention": Kind(attention, {"target_modules": ["mha", "lin"]}),
    "lora_bias": Kind(mlp, {"target_modules": BOTH, "lora_bias": True}),
    "lora_bias of convolutions": Kind(convolutions, {"target_modules": ["one", "two", "flat"], "lora_bias": True}),
    "bias all": Kind(bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "bias": "all"}),
    "bias lora_only": Kind(bert, {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "lora_only"}),
    "modules_to_save": Kind(normalised, {"target_modules": ["0"], "modules_to_save": ["1", "2"]}),
    "tokens": Kind(tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 7]}),
    "tokens by module": Kind(
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}}
    ),
    "tied embedding": Kind(
        tied_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
    ),
    "a head tied to one of three": Kind(t5, {"target_modules": ["lm_head", "q"], "ensure_weight_tying": True}),
    "tied saved module": Kind(
        tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    ),
    "layers_to_transform": Kind(llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "exclude_modules": Kind(llama, {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*k_proj"}),
    "targets by regex": Kind(llama, {"target_modules": r".*\.layers\.(0|1)\.self_attn\.[qv]_proj"}),
    "all-linear": Kind(llama, {"target_modules": "all-linear"}),
    "DoRA": Kind(convolutions, {"target_modules": ["two", "flat"], "use_dora": True}, {"allow_dora": True}),
    "DoRA of an embedding": Kind(embeddings, {"target_modules": ["0"], "use_dora": True}, {"allow_dora": True}),
}


def write_kind(kind: Kind, path: Path, *, r: int = 3, lora_alpha: int = 5, seed: int = 0, **options):
    """One client of the kind, written by PEFT; returns the model."""
    return quietly(write_client, path, kind.base(), r=r, lora_alpha=lora_alpha, seed=seed, **kind.options, **options)


def matrices(model) -> dict[str, torch.Tensor]:
    """PEFT's delta weight of every adapted module as the matrix ``B A`` (or one per expert), by the module's name."""
    names = {id(module): name for name, module in model.base_model.model.named_modules()}
    found = {}
    for module in model.modules():
        if isinstance(module, PeftLoraLayer):
            delta = module.get_delta_weight("default").detach()
            if isinstance(module, ParamWrapper):
                stacked = module.num_experts > 1 and not module._did_swap_in_out_features
                delta = delta.mT if stacked else delta
            elif isinstance(module, Embedding) or isinstance(module.get_base_layer(), Conv1D):
                delta = delta.T
            elif delta.ndim > 2:
                delta = delta.flatten(1)
            found[names[id(module)]] = delta
    return found


def trained(model) -> dict[str, torch.Tensor]:
    """All that an adapter does to the model: delta weights, and every tensor trained beside the factors.

    LoRA biases are multiplied by their scaling, as PEFT does when it merges them.
    """
    found = {f"delta of {name}": delta for name, delta in matrices(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, PeftLoraLayer) and module.lora_bias.get("default"):
            found[f"bias of {name}"] = module.lora_B["default"].bias.detach() * module.scaling["default"]
    biases = model.peft_config["default"].bias != "none"
    beside = ("modules_to_save.", "trainable_tokens_delta.", "lora_magnitude_vector.")
    for name, tensor in model.state_dict().items():
        if any(part in name for part in beside) or (biases and name.endswith(".bias") and "lora_" not in name):
            found[name] = tensor.detach().clone()
    return found


def loaded(kind: Kind, path: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of a directory, loaded without a warning into a fresh model."""
    return trained(load_with_peft(kind.base(), path))
