"""``rank_pattern`` and ``alpha_pattern``: values by module, found as PEFT finds them and in bounded time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from re import _constants as c  # type: ignore[attr-defined]
from threading import Lock
from typing import Any, TypeVar

from .automaton import MAX_STATES, Automaton, Budget, parse

T = TypeVar("T")
MAX_LENGTH = 1000
"""Characters of one pattern."""

Spans = tuple[tuple[int, int], ...]


class PatternTable(Mapping[str, T]):
    """A mapping from PEFT's patterns to values, asked by module name.

    PEFT takes the first pattern with ``re.match(rf"(.*\\.)?({pattern})$", module)``: it matches the whole name, or all
    that follows one of its dots. The same modules match here, but nothing backtracks: names of modules, which most
    patterns are, are looked up; the other expressions walk over a name together, one step per character.

    Args:
        values: pattern -> value, in PEFT's order.
        where: begins every error: the file and the field.

    Raises:
        ValueError: a pattern is no regular expression, is longer than 1,000 characters, or uses what is not known
            (back-references, atomic groups, possessive repeats, inline flags); from ``matching``, patterns that take
            too many steps.
    """

    def __init__(self, values: Mapping[str, T], where: str = "") -> None:
        self._where = where
        self._values = dict(values)
        self._budget, self._lock = Budget(), Lock()
        self._names = _Names(self._budget)
        self._rest: Automaton | None = None
        self._found: dict[str, list[T]] = {}
        self._ordered = list(self._values.values())
        for tag, pattern in enumerate(self._values):
            try:
                self._add(tag, pattern)
            except RecursionError as error:
                raise ValueError(f"{where}{pattern[:MAX_LENGTH]!r} is nested too deeply") from error
            except ValueError as error:
                raise ValueError(f"{where}{pattern[:MAX_LENGTH]!r} {error}") from error

    def _add(self, tag: int, pattern: str) -> None:
        if len(pattern) > MAX_LENGTH:
            raise ValueError(f"is longer than {MAX_LENGTH} characters")
        tree = parse(rf"(.*\.)?({pattern})$")
        if not self._names.add(tree, tag):
            self._rest = self._rest or Automaton(self._budget)
            self._rest.add(tree, tag)

    def __getitem__(self, pattern: str) -> T:
        return self._values[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def matching(self, module: str) -> list[T]:
        """The different values of all patterns that match the module, the one that PEFT takes first.

        Raises:
            ValueError: the patterns take too many steps.
        """
        if module not in self._found:
            tags = self._tags(module)
            self._found[module] = list(dict.fromkeys(self._ordered[tag] for tag in sorted(tags)))
        return self._found[module]

    def _tags(self, module: str) -> set[int]:
        try:
            with self._lock:  # steps are remembered as they are made
                return self._names.match(module) | (set() if self._rest is None else self._rest.match(module))
        except ValueError as error:
            raise ValueError(f"{self._where}{module}: {error}") from error


def selection(targets: str) -> Callable[[str], bool]:
    """Whether PEFT's ``re.fullmatch`` with an expression of ``target_modules`` finds a module, in bounded time.

    Raises:
        ValueError: as ``PatternTable``, but longer than 20,000 characters, unless it is names with bars between them;
            from the function, too many steps.
    """
    if targets == "all-linear":
        return lambda module: True
    parts = targets.split("|")
    names = {re.sub(r"\\(.)", r"\1", part) for part in parts}
    if {re.escape(name) for name in names} == set(parts):  # as save_adapter writes them
        return names.__contains__
    if len(targets) > MAX_STATES:
        raise ValueError(f"is longer than {MAX_STATES} characters")
    automaton = Automaton(Budget())
    try:
        automaton.add(parse(rf"(?:{targets})\Z"), 0)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    return lambda module: bool(automaton.match(module))


class _Names:
    """Patterns that are names: characters, and dots that stand for any character; perhaps anchored by ``^``."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        # By width and by the characters between the dots: what these characters are -> tags.
        self._tags: dict[int, dict[Spans, dict[str, list[tuple[bool, int]]]]] = {}

    def add(self, tree: Any, tag: int) -> bool:
        """Take the pattern if it is a name."""
        items = list(tree)
        if len(items) != 3 or items[1][0] is not c.SUBPATTERN or items[1][1][0] != 2:
            return False
        letters = list(items[1][1][3])
        anchored = bool(letters) and letters[0] == (c.AT, c.AT_BEGINNING)
        letters = letters[anchored:]
        if not letters or any(op not in (c.LITERAL, c.ANY) for op, _ in letters):
            return False
        text = "".join("\n" if op is c.ANY else chr(code) for op, code in letters)
        spans = _spans([op is c.ANY for op, _ in letters])
        group = self._tags.setdefault(len(letters), {}).setdefault(spans, {})
        group.setdefault(_pick(text, spans), []).append((anchored, tag))
        return True

    def match(self, name: str) -> set[int]:
        """Tags of the patterns that match."""
        ends = (len(name), len(name) - 1) if name.endswith("\n") else (len(name),)  # as $ has it
        return {tag for end in ends for width in self._tags for tag in self._match(name, end - width, end)}

    def _match(self, name: str, start: int, end: int) -> Iterator[int]:
        """Tags of the patterns that match just this part of the name, if a pattern may match there."""
        self._budget.spend(1)
        if start < 0 or (start > 0 and (name[start - 1] != "." or "\n" in name[:start])):
            return
        part = name[start:end]
        for spans, group in self._tags[end - start].items():
            self._budget.spend(1 + len(spans))
            for anchored, tag in group.get(_pick(part, spans), ()):
                if not (anchored and start) and not _newline_between(part, spans):
                    yield tag


def _spans(holes: list[bool]) -> Spans:
    """The stretches between the holes."""
    edges = [-1, *(i for i, hole in enumerate(holes) if hole), len(holes)]
    return tuple((a + 1, b) for a, b in pairwise(edges))


def _pick(text: str, spans: Spans) -> str:
    return "".join(text[a:b] for a, b in spans)


def _newline_between(text: str, spans: Spans) -> bool:
    return any(text[b] == "\n" for _, b in spans[:-1])
