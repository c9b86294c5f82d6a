"""Regular expressions of strangers, matched without backtracking: no pattern and no name can make it take for ever.

Python's parser reads the expression, so that it means what it means to ``re``; a set of automaton states then walks
over the name, one step per character. Steps are remembered (a deterministic automaton made as it is needed) and
counted: a budget bounds time and memory.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from re import _constants as c  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_STATES = 20_000
MAX_ASSERTIONS = 10
MAX_RANGES = 20
MAX_HELD = 1_000_000
"""A measure of what remembered steps take (about 100 MB); more are forgotten and made again."""

Step = tuple[int, tuple[int, ...]]
"""The number of the set of states after a character, and the tags of what is accepted before it."""


class Budget:
    """Work that may still be done."""

    def __init__(self, steps: int = 10_000_000) -> None:
        self.left = steps

    def spend(self, steps: int) -> None:
        """Take away steps.

        Raises:
            ValueError: there are no more.
        """
        self.left -= steps
        if self.left < 0:
            raise ValueError("matching the patterns takes too many steps")


def parse(expression: str) -> Any:
    """The syntax tree of an expression, by Python's own parser.

    Raises:
        ValueError: it is not a regular expression.
    """
    try:
        with warnings.catch_warnings():  # of syntax that may change its meaning one day
            warnings.simplefilter("ignore")
            return _parser.parse(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression ({getattr(error, 'msg', error)})") from error


class Automaton:
    """Expressions united into one automaton, which tells those that match at a position of a text.

    Repeats, alternatives, classes, anchors, word boundaries and lookarounds are known. Back-references, atomic
    groups, possessive repeats and inline flags are not.
    """

    def __init__(self, budget: Budget, cost: int = 1) -> None:
        self._budget, self._cost = budget, cost
        self._starts: frozenset[int] = frozenset()
        self._tests: dict[int, Callable[[str], bool]] = {}  # states that take a character
        self._next: list[tuple[int, ...]] = []
        self._asserts: dict[int, int] = {}  # states that are passed where an assertion holds
        self._assertions: dict[Any, tuple[int, Callable[[str, int], bool]]] = {}
        self._tags: dict[int, int] = {}  # states that accept an expression
        self._steps: dict[tuple[int, tuple[bool, ...], str], Step] = {}
        self._forget()

    def add(self, tree: Any, tag: int) -> None:
        """Unite with one more expression.

        Raises:
            ValueError: it is too large, or uses what is not known here.
        """
        accept = self._state()
        self._tags[accept] = tag
        self._starts |= {self._sequence(tree, accept)}
        self._forget()

    def match(self, text: str) -> set[int]:
        """Tags of the expressions for which ``re.match`` finds a match."""
        return {tag for _, tags in self.accepted(text, 0) for tag in tags}

    def accepted(self, text: str, start: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Positions where a match that begins at ``start`` may end, each with the tags of what matches."""
        states = 0
        for position in range(start, len(text) + 1):
            if self._held > MAX_HELD:
                current = self._sets[states]
                self._forget()
                states = self._number(current)
            context = tuple([holds(text, position) for _, holds in self._assertions.values()])
            states, tags = self._step(states, context, text[position : position + 1])
            if tags:
                yield position, tags
            if not self._sets[states]:
                return

    def _step(self, states: int, context: tuple[bool, ...], character: str) -> Step:
        self._budget.spend(self._cost + 4 * len(context))
        found = self._steps.get((states, context, character))
        if found is None:
            found = self._steps[states, context, character] = self._make_step(states, context, character)
            self._held += 8
        return found

    def _make_step(self, states: int, context: tuple[bool, ...], character: str) -> Step:
        seen = set(self._sets[states])
        ahead = list(seen)
        while ahead:
            state = ahead.pop()
            if state in self._tests or (state in self._asserts and not context[self._asserts[state]]):
                continue
            fresh = [s for s in self._next[state] if s not in seen]
            seen.update(fresh)
            ahead.extend(fresh)
        self._budget.spend(4 * len(seen) + 4)
        takers = seen & self._tests.keys() if character else ()
        after = frozenset(self._next[state][0] for state in takers if self._tests[state](character))
        return self._number(after), tuple(self._tags[state] for state in seen & self._tags.keys())

    def _number(self, states: frozenset[int]) -> int:
        """A number for a set of states, made when it is first seen."""
        if states not in self._numbers:
            self._numbers[states] = len(self._sets)
            self._sets.append(states)
            self._held += len(states)
        return self._numbers[states]

    def _forget(self) -> None:
        """Begin anew; number 0 is the set of starts."""
        self._steps.clear()
        self._numbers, self._sets, self._held = {self._starts: 0}, [self._starts], len(self._starts)

    def _state(self, *after: int) -> int:
        if len(self._next) >= MAX_STATES:
            raise ValueError(f"is too large: more than {MAX_STATES} states")
        self._next.append(after)
        return len(self._next) - 1

    def _sequence(self, items: Any, after: int) -> int:
        """The state in which the items begin, when the state ``after`` follows them."""
        for op, argument in reversed(list(items)):
            after = self._item(op, argument, after)
        return after

    def _item(self, op: Any, argument: Any, after: int) -> int:
        if op in _TESTS:
            state = self._state(after)
            self._tests[state] = _TESTS[op](argument)
            return state
        if op is c.SUBPATTERN:
            _, added, removed, items = argument
            if added or removed:
                raise ValueError("uses inline flags, which are not supported")
            return self._sequence(items, after)
        if op is c.BRANCH:
            return self._state(*[self._sequence(items, after) for items in argument[1]])
        if op in (c.MAX_REPEAT, c.MIN_REPEAT):
            least, most, items = argument
            return self._repeat(least, most, items, after)
        if op is c.AT:
            return self._assert(argument, _ANCHORS[argument], after)
        if op in (c.ASSERT, c.ASSERT_NOT):
            direction, items = argument
            return self._look(op, direction, items, after)
        if op is c.FAILURE:
            return self._state()
        raise ValueError(f"uses {str(op).lower()}, which is not supported")

    def _repeat(self, least: int, most: int, items: Any, after: int) -> int:
        """Copies: as many as there must be, then a loop or copies that may be left."""
        start = after
        if most is c.MAXREPEAT:
            start = self._state()
            self._next[start] = (self._sequence(items, start), after)
        for i in range(least if most is c.MAXREPEAT else most):
            body = self._sequence(items, start)
            if body == start:
                break  # nothing, however often
            start = body if most is c.MAXREPEAT or i >= most - least else self._state(body, after)
        return start

    def _assert(self, key: Any, holds: Callable[[str, int], bool], after: int) -> int:
        state = self._state(after)
        self._asserts[state] = self._assertions.setdefault(key, (len(self._assertions), holds))[0]
        return state

    def _look(self, op: Any, direction: int, items: Any, after: int) -> int:
        if len(self._assertions) >= MAX_ASSERTIONS:
            raise ValueError(f"is too large: more than {MAX_ASSERTIONS} look-arounds")
        inner = Automaton(self._budget, cost=4)  # begun anew at every character
        inner.add(items, 0)
        width = 0
        if direction < 0:
            width, most = items.getwidth()
            if width != most:
                raise ValueError("uses a look-behind without a fixed width")

        def holds(text: str, position: int) -> bool:
            if direction > 0:
                found = any(True for _ in inner.accepted(text, position))
            else:
                found = position >= width and any(p == position for p, _ in inner.accepted(text, position - width))
            return found is (op is c.ASSERT)

        return self._assert(object(), holds, after)


def _in(items: Iterable[tuple[Any, Any]]) -> Callable[[str], bool]:
    items = list(items)
    negated = items[0][0] is c.NEGATE
    letters = frozenset(chr(code) for op, code in items if op is c.LITERAL)
    tests = [_TESTS[op](argument) for op, argument in items[negated:] if op is not c.LITERAL]
    if len(tests) > MAX_RANGES:
        raise ValueError(f"is too large: more than {MAX_RANGES} ranges in a class")
    return lambda x: (x in letters or any(test(x) for test in tests)) is not negated


def _word(x: str) -> bool:
    return x == "_" or x.isalnum()


def _at_boundary(text: str, i: int) -> bool:
    return _word(text[i - 1 : i] if i else "") is not _word(text[i : i + 1])


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    c.CATEGORY_DIGIT: str.isdecimal,
    c.CATEGORY_SPACE: str.isspace,
    c.CATEGORY_WORD: _word,
    c.CATEGORY_NOT_DIGIT: lambda x: not x.isdecimal(),
    c.CATEGORY_NOT_SPACE: lambda x: not x.isspace(),
    c.CATEGORY_NOT_WORD: lambda x: not _word(x),
}
_TESTS: dict[Any, Callable[[Any], Callable[[str], bool]]] = {
    c.LITERAL: lambda code: chr(code).__eq__,
    c.NOT_LITERAL: lambda code: chr(code).__ne__,
    c.RANGE: lambda ends: lambda x: ends[0] <= ord(x) <= ends[1],
    c.CATEGORY: _CATEGORIES.__getitem__,
    c.ANY: lambda _: "\n".__ne__,
    c.IN: _in,
}
_ANCHORS: dict[Any, Callable[[str, int], bool]] = {
    c.AT_BEGINNING: lambda text, i: i == 0,
    c.AT_BEGINNING_STRING: lambda text, i: i == 0,
    c.AT_END: lambda text, i: i == len(text) or (i == len(text) - 1 and text[i] == "\n"),
    c.AT_END_STRING: lambda text, i: i == len(text),
    c.AT_BOUNDARY: _at_boundary,
    c.AT_NON_BOUNDARY: lambda text, i: not _at_boundary(text, i) and bool(text),
}
