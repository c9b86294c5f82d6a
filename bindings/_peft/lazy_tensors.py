"""Mappings whose values are made when they are asked for; full tensors of a file, read whole or in part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from .shards import TensorSource

T = TypeVar("T")


class LazyMapping(Mapping[str, T]):
    """A mapping that makes its values when they are asked for and keeps none.

    Args:
        names: its keys; those of a mapping are not copied.
        make: makes the value of a key.
        files: all files that this reads; None where they are not known.
        sizes: of layers, tells (m, n, r) without reading anything; None where that is not known.
    """

    def __init__(
        self,
        names: Collection[str],
        make: Callable[[str], T],
        files: tuple[Path, ...] | None = None,
        sizes: Callable[[str], tuple[int, int, int]] | None = None,
    ) -> None:
        self._names: Mapping[str, object] = names if isinstance(names, Mapping) else dict.fromkeys(names)
        self._make = make
        self.files, self.sizes = files, sizes

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def get(self, name: str, default: T | None = None) -> T | None:  # type: ignore[override]
        """The value of a key, or the default where there is none."""
        return self._make(name) if name in self._names else default

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LazyTensors(LazyMapping[Tensor]):
    """Tensors by name that are read each time they are asked for, and not kept; large ones can be read in parts.

    Args:
        names: of the tensors.
        make: reads one whole.
        file: where they lie.
        made: names of those that ``make`` does more to than read; they are small.
    """

    def __init__(
        self, names: Collection[str], make: Callable[[str], Tensor], file: TensorSource, made: Collection[str] = ()
    ) -> None:
        super().__init__(names, make, file.files)
        self._file, self._made = file, made

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._file.specs[name].shape

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """The numbers ``start:stop`` of a tensor in a row."""
        return self[name].flatten()[start:stop] if name in self._made else self._file.read(name, start, stop)
