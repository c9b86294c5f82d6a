"""The work itself, which knows nothing of Flower: model, a client's messages, training, judging."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedgram.bench.demo.clients import draw_batches, lora_config
from fedgram.bench.demo.minilm import HiddenStates, MeanPoolClassifier, load_model, quiet
from fedgram.bench.demo.newsgroups import Messages, dirichlet_partition, load_split

if TYPE_CHECKING:
    from peft import PeftModel

CONCENTRATION = 0.3
LOCAL_TEST = 100
JUDGED_AT_ONCE = 64


class Task:
    """One process's model and messages; MiniLM's lower layers are frozen, so what they make of a message is kept.

    Args:
        split: ``train`` or ``test``.
        count: how many messages, drawn with ``seed``.
        rank: of the LoRA factors.
        max_tokens: longer messages are cut.
        seed: of the draw and of the initial factors: equal in all processes.
    """

    def __init__(self, split: str, count: int, rank: int, max_tokens: int, seed: int) -> None:
        everything = load_split(split)
        drawn = np.random.default_rng([seed, 0]).permutation(len(everything.texts))[:count]
        self.messages: Messages = everything.subset(np.sort(drawn))
        self.classifier: MeanPoolClassifier = load_model(len(everything.classes))
        self.hidden = HiddenStates(self.classifier, self.messages.texts, max_tokens)
        with quiet(), torch.random.fork_rng(devices=[]):
            from peft import get_peft_model

            torch.manual_seed(seed)
            # No dropout, so that a run is repeatable and the lower layers' output can be kept.
            self.model: PeftModel = get_peft_model(self.classifier, lora_config(rank)).eval()
        self.seed = seed

    def part(self, client: int, clients: int) -> np.ndarray:
        """Indices of the messages that a client holds."""
        rng = np.random.default_rng([self.seed, 1])
        return dirichlet_partition(self.messages.labels, clients, CONCENTRATION, rng)[client]

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's state dict: LoRA factors, and the head beside them."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model)

    def load(self, adapter: dict[str, Tensor]) -> None:
        """Take up an adapter; it is rounded to the model's dtype."""
        from peft import set_peft_model_state_dict

        unexpected = set_peft_model_state_dict(self.model, adapter).unexpected_keys
        if unexpected:
            raise ValueError(f"adapter: {unexpected[0]}: the model has no such tensor")

    def train(self, own: np.ndarray, steps: int, batch: int, learning_rate: float, round_: int) -> float:
        """AdamW over the adapter, one step a batch; returns the mean loss."""
        targets = torch.from_numpy(self.messages.labels)
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=learning_rate, weight_decay=0.0)
        losses = []
        for indices in draw_batches(own, steps, batch, np.random.default_rng([self.seed, 2, round_, len(own)])):
            logits = self.classifier.upper(*self.hidden.batch(indices))
            loss = nn.functional.cross_entropy(logits, targets[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return float(np.mean(losses))

    @torch.no_grad()
    def accuracy(self, indices: np.ndarray) -> float:
        """The share of these messages that the model classifies right."""
        order = self.hidden.by_length(indices)
        right = 0
        for start in range(0, len(order), JUDGED_AT_ONCE):
            block = order[start : start + JUDGED_AT_ONCE]
            predicted = self.classifier.upper(*self.hidden.batch(block)).argmax(1).numpy()
            right += int((predicted == self.messages.labels[block]).sum())
        return right / len(order)


@lru_cache(maxsize=2)
def load_task(split: str, count: int, rank: int, max_tokens: int, seed: int) -> Task:
    """A Task, kept by the process: a simulation's worker serves many rounds and clients."""
    torch.set_num_threads(1)  # workers run side by side
    return Task(split, count, rank, max_tokens, seed)
