"""Finished results as a journal lists them: facts, and where the tensors lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the data of the journal, and the checksum of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    crc: int

    def document(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {"dtype": self.dtype, "shape": self.shape, "start": self.start, "nbytes": self.nbytes, "crc": self.crc}


@dataclass(frozen=True, slots=True)
class Record:
    """One finished result: its facts (JSON), and its tensors by name."""

    facts: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @staticmethod
    def of(document: Mapping[str, Any]) -> Record:
        """The record of what JSON holds of it."""
        tensors = {n: StoredTensor(**{**t, "shape": tuple(t["shape"])}) for n, t in document["tensors"].items()}
        return Record(document["facts"], tensors)

    def text(self) -> bytes:
        """As JSON."""
        document = {"facts": self.facts, "tensors": {name: t.document() for name, t in self.tensors.items()}}
        return json.dumps(document, separators=(",", ":")).encode()


class Records(Mapping[str, Record]):
    """Results by key, kept as JSON: a third of the memory, which counts where modules are many and small."""

    def __init__(self) -> None:
        self._texts: dict[str, bytes] = {}
        self._last: tuple[str, Record] | None = None

    def __getitem__(self, key: str) -> Record:
        last = self._last  # what is asked of a record is asked in a row
        if last is None or last[0] != key:
            self._last = last = key, Record.of(json.loads(self._texts[key]))
        return last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, key: object) -> bool:
        return key in self._texts

    def add(self, texts: Mapping[str, bytes]) -> None:
        """Keep records as their JSON."""
        self._texts |= texts
        self._last = None
