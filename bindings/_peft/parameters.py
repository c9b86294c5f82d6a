"""Which parameter a nested wrapper of ``target_parameters`` adapts, and so of which rank and how many experts it is.

A module that several parameters are adapted of is wrapped once for each, in the order in which the base model
registers them: an order that no adapter file tells. It matters only where the configuration gives them different
ranks or alphas; then the one order counts in which all parameters have the same number of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from math import perm, prod

from .config import LoraSettings
from .names import ends_of, owner_of
from .patterns import selection

MAX_READINGS = 10_000


@dataclass(frozen=True)
class Parameter:
    """Rank, scaling and number of experts of one wrapper."""

    rank: int
    scaling: float
    experts: int


class TargetParameters:
    """The entries of ``target_parameters``, by the module that they name."""

    def __init__(self, settings: LoraSettings) -> None:
        self._settings = settings
        self._selected: Callable[[str], bool] | None = None
        self._entries: dict[str, dict[str, None]] = {}
        for entry in settings.parameters:
            module, _, name = entry.rpartition(".")
            self._entries.setdefault(module, {})[name] = None

    def adapted(self, module: str) -> bool:
        """Whether factors of this module that no other wraps are those of a parameter, and not of the module's weight.

        A bare name, such as ``gate_up_proj``, leads to that parameter of whatever module has one: every module may. But
        PEFT adapts no parameter of a module that ``target_modules`` selects.

        Raises:
            ValueError: names ``target_modules``: not an expression that is known here, or one that takes too long.
        """
        if any(end in self._entries for end in ends_of(module)):
            return True
        return "" in self._entries and not self._targeted(module)

    def _targeted(self, module: str) -> bool:
        targets = self._settings.targets
        if not isinstance(targets, str):
            return not targets.isdisjoint(ends_of(module))
        try:
            if self._selected is None:
                self._selected = selection(targets)
            return self._selected(module)
        except ValueError as error:
            raise ValueError(f"{self._settings.path}: target_modules {targets[:100]!r} {error}") from error

    def of(self, owner: str) -> list[str]:
        """Names of the parameters of a module that PEFT may have adapted: all entries that its name ends with."""
        return list(dict.fromkeys(name for end in (*ends_of(owner), "") for name in self._entries.get(end, ())))

    def assign(self, owner: str, rows: Mapping[str, int]) -> dict[str, Parameter]:
        """Tell the wrappers of one module apart.

        Args:
            owner: the module.
            rows: path of each wrapper -> rows of its lora_A, which are experts times rank.

        Raises:
            ValueError: names the module: no entry of ``target_parameters`` leads to it, or more than one reading of
                the file is possible, or none.
        """
        names = self.of(owner)
        if len(names) < len(rows):
            raise ValueError(f"{owner}: {len(rows)} adapted parameters, but target_parameters names {len(names)}")
        choices = {name: self._choices(f"{owner}.{name}") for name in names}
        different = sorted({choice for found in choices.values() for choice in found})
        readings = self._equal(rows, *different[0]) if len(different) == 1 else self._unequal(rows, choices)
        if len(readings) != 1:
            fault = "and the file does not tell which is which" if readings else "none of which fits the shapes"
            raise ValueError(
                f"{owner}: target_parameters {', '.join(names)}: ranks and alphas {different} by the patterns, {fault}"
            )
        return dict(zip(rows, readings.pop(), strict=True))

    def _equal(self, rows: Mapping[str, int], rank: int, alpha: float) -> set[tuple[Parameter, ...]]:
        """All parameters of one rank and alpha: which is which does not matter."""
        if any(count % rank for count in rows.values()):
            return set()
        scaling = self._settings.scale(alpha, rank)
        return {tuple(Parameter(rank, scaling, count // rank) for count in rows.values())}

    def _unequal(
        self, rows: Mapping[str, int], choices: Mapping[str, list[tuple[int, float]]]
    ) -> set[tuple[Parameter, ...]]:
        """Every reading in which the parameters have the same number of experts."""
        if perm(len(choices), len(rows)) * prod(map(len, choices.values())) > MAX_READINGS:
            return set()
        readings = self._readings(list(rows.values()), choices)
        return {reading for reading in readings if len({p.experts for p in reading}) == 1}

    def _choices(self, key: str) -> list[tuple[int, float]]:
        """Ranks and alphas that the configuration states for a parameter; several where patterns overlap."""
        return list(product(self._settings.ranks(key), self._settings.alphas(key)))

    def _readings(
        self, rows: list[int], choices: Mapping[str, list[tuple[int, float]]]
    ) -> Iterable[tuple[Parameter, ...]]:
        for order in permutations(choices, len(rows)):
            for picked in product(*(choices[name] for name in order)):
                if all(count % rank == 0 for count, (rank, _) in zip(rows, picked, strict=True)):
                    yield tuple(
                        Parameter(rank, self._settings.scale(alpha, rank), count // rank)
                        for count, (rank, alpha) in zip(rows, picked, strict=True)
                    )


def wrappers(paths: Iterable[str], parameters: TargetParameters) -> dict[str, list[str]]:
    """Modules with adapted parameters -> the paths of their wrappers."""
    paths = list(paths)
    inner = {owner_of(path) for path in paths if path.endswith(".base_layer")}
    found: dict[str, list[str]] = {}
    for path in paths:
        owner = owner_of(path)
        if path.endswith(".base_layer") or (owner == path and (owner in inner or parameters.adapted(owner))):
            found.setdefault(owner, []).append(path)
    return found
