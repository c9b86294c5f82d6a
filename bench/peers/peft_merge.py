"""PEFT's merging of adapters, on a real model with adapters of the benchmarked size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .optional import need

NAME = "PEFT add_weighted_adapter(svd)"


def add_weighted_adapter(
    B: Sequence[Tensor], A: Sequence[Tensor], weights: Tensor, rank: int
) -> tuple[Callable[[], object], Callable[[object], tuple[Tensor, Tensor]]]:
    """Return the merge as a user runs it, ``combination_type="svd"``, and how to read the pair from its result.

    The model is a one-layer BERT built from its configuration, whose query projection has the benchmarked size; each
    client is one adapter on it, scaling 1.
    """
    peft, transformers = need(NAME, "peft", "transformers")
    side = B[0].shape[0]
    sizes = {"hidden_size": side, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=16, max_position_embeddings=16, **sizes)
    names = [f"client{u}" for u in range(len(B))]
    lora = [peft.LoraConfig(r=b.shape[1], lora_alpha=b.shape[1], target_modules=["query"]) for b in B]
    model = peft.get_peft_model(transformers.BertModel(config).to(B[0]), lora[0], adapter_name=names[0])
    for name, one in zip(names[1:], lora[1:], strict=True):
        model.add_adapter(name, one)
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    with torch.no_grad():
        for name, b, a in zip(names, B, A, strict=True):
            layer.lora_B[name].weight.copy_(b)
            layer.lora_A[name].weight.copy_(a)

    def run() -> object:
        if "merged" in layer.lora_A:
            model.delete_adapter("merged")
        model.add_weighted_adapter(names, weights.tolist(), "merged", combination_type="svd", svd_rank=rank)
        return layer

    def pair(_: object) -> tuple[Tensor, Tensor]:
        scaled = layer.lora_B["merged"].weight.detach() * layer.scaling["merged"]
        return scaled, layer.lora_A["merged"].weight.detach().clone()

    return run, pair
