"""What one client does, through PEFT: load an adapter, train it on its own messages, save it; and how it is judged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .minilm import BATCH, FROZEN_LAYERS, HiddenStates, MeanPoolClassifier, quiet

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

LAYERS = 6


def lora_config(rank: int) -> LoraConfig:
    """LoRA on query and value of the upper layers, scaling 1, and the head beside it as ``modules_to_save``."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=["query", "value"],
        layers_to_transform=list(range(FROZEN_LAYERS, LAYERS)),
        layers_pattern="layer",
        modules_to_save=["classifier"],
    )


def new_adapter(model: MeanPoolClassifier, rank: int, seed: int, path: Path) -> None:
    """Write an adapter that changes nothing yet: A random by ``seed``, B and the head zero."""
    with restored(model), quiet(), torch.random.fork_rng(devices=[]):
        from peft import get_peft_model

        torch.manual_seed(seed)
        get_peft_model(model, lora_config(rank)).save_pretrained(str(path))


@contextlib.contextmanager
def adapted(model: MeanPoolClassifier, path: Path, *, trainable: bool) -> Iterator[PeftModel]:
    """The model with the adapter at ``path`` in place; afterwards the model is as it was."""
    with restored(model):
        with quiet():
            from peft import PeftModel

            wrapped = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
        # No dropout: a run is repeatable, and the lower layers' output can be kept.
        yield wrapped.eval()


@contextlib.contextmanager
def restored(model: MeanPoolClassifier) -> Iterator[None]:
    """Take whatever PEFT put into the model out again; its own ``unload`` would leave the trained head behind."""
    layers: Any = model.bert.encoder.layer
    places = [(layer.attention.self, name) for layer in layers for name in ("query", "value")]
    places.append((model, "classifier"))
    originals = [getattr(parent, name) for parent, name in places]
    try:
        yield
    finally:
        for (parent, name), module in zip(places, originals, strict=True):
            setattr(parent, name, module)


def train(
    model: MeanPoolClassifier,
    start: Path,
    batches: Sequence[np.ndarray],
    hidden: HiddenStates,
    labels: np.ndarray,
    learning_rate: float,
    output: Path,
    stepped: Callable[[int], None] = lambda steps: None,
) -> None:
    """Train the adapter at ``start`` by AdamW (no weight decay), one step per batch, and save it to ``output``.

    Args:
        model: the classifier.
        start: the adapter to start from.
        batches: indices of each step's messages.
        hidden: the messages below the adapted layers.
        labels: class of each message.
        learning_rate: of factors and head alike.
        output: where to save.
        stepped: called with 1 after every step.
    """
    targets = torch.from_numpy(labels)
    with adapted(model, start, trainable=True) as wrapped:
        learnt = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=learning_rate, weight_decay=0.0)
        for batch in batches:
            loss = nn.functional.cross_entropy(model.upper(*hidden.batch(batch)), targets[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            stepped(1)
        with quiet():
            wrapped.save_pretrained(str(output))


@torch.no_grad()
def right_answers(
    model: MeanPoolClassifier, adapter: Path, indices: np.ndarray, hidden: HiddenStates, labels: np.ndarray
) -> np.ndarray:
    """Which of the messages at ``indices`` the model with this adapter classifies right, bool, in their order."""
    order = hidden.by_length(indices)
    predicted = np.empty(len(labels), dtype=np.int64)
    with adapted(model, adapter, trainable=False):
        for start in range(0, len(order), BATCH):
            block = order[start : start + BATCH]
            predicted[block] = model.upper(*hidden.batch(block)).argmax(1).numpy()
    return predicted[indices] == labels[indices]


def draw_batches(own: np.ndarray, steps: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """``steps`` batches of a client's messages, without repetition until all have been seen."""
    epochs = -(-steps * size // len(own))
    stream = np.concatenate([rng.permutation(own) for _ in range(epochs)])
    return [stream[i * size : (i + 1) * size] for i in range(steps)]
