"""Real PEFT adapters on tiny models built from configurations: made, filled with seeded values, saved by PEFT."""

import json
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

with warnings.catch_warnings():  # what these libraries warn of while they are imported is theirs to mend
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer as PeftLoraLayer
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )


def mlp() -> nn.Module:
    """Two linear layers with biases, (6 -> 7) and (7 -> 5), and a head (5 -> 3)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 3))


def bert() -> nn.Module:
    """A classifier of two small BERT layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))


def llama() -> nn.Module:
    """A causal model of two small Llama layers, keys and values narrower than queries."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, max_position_embeddings=32, **sizes))


def gpt2() -> nn.Module:
    """A causal model of two small layers whose linear maps are Conv1D: their weights are stored transposed."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def quietly(function, *args, **kwargs):
    """Call with warnings ignored: PEFT warns of things that these tests do on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def adapted(base: nn.Module, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    """``base`` with a LoRA adapter whose trained tensors (factors, saved modules, biases) hold seeded values."""
    model = quietly(lambda: get_peft_model(base, LoraConfig(**options)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                parameter.data = parameter.data.to(dtype)
    return model


def write_client(path: Path, base: nn.Module, **options) -> PeftModel:
    """Save an adapter made by ``adapted`` with PEFT's own writer; returns the model."""
    model = adapted(base, **options)
    quietly(model.save_pretrained, str(path))
    return model


def edit_config(folder: Path, **changes) -> None:
    """Change what an adapter's configuration says."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def peft_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """The update of every adapted module, as PEFT computes it, by the module's name in the base model."""
    names = {id(module): name for name, module in model.base_model.model.named_modules()}
    layers = [module for module in model.modules() if isinstance(module, PeftLoraLayer)]
    return {names[id(layer)]: layer.get_delta_weight("default").detach() for layer in layers}


def load_with_peft(base: nn.Module, path: Path) -> PeftModel:
    """Load a directory with ``PeftModel.from_pretrained``; any warning is an error (missing keys are a warning)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for something it renames
        return PeftModel.from_pretrained(base, str(path))
