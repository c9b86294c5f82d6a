"""Sources that ``torch.compile`` reads: kept to what every supported torch traces, not the pinned one alone."""

import ast
from pathlib import Path

import pytest

from fedgram import flora_na, kernels, stamp

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
TRACED = [
    *Path(kernels.__file__).parent.glob("*.py"),
    *Path(stamp.__file__).parent.glob("*.py"),
    *Path(flora_na.__file__).parent.glob("batched*.py"),
    *Path(flora_na.__file__).parent.glob("_batched*.py"),
]


def walruses(source):
    """Lines of assignments within comprehensions."""
    whole = [node for node in ast.walk(ast.parse(source)) if isinstance(node, COMPREHENSIONS)]
    return sorted({inner.lineno for node in whole for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)})


@pytest.mark.parametrize("file", TRACED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_comprehension_assigns(file):
    """torch 2.11 refuses to trace ``f(y := x, y) for x in ..``, later ones do not; CI has the pinned one only."""
    assert walruses(file.read_text()) == []


def test_assignments_within_comprehensions_are_found():
    assert walruses(
        "a = [(d := x) * d for x in y]\nb = tuple((d := x) for x in y)\nc = [x for x in y if (d := x)]"
    ) == [1, 2, 3]
    assert walruses("if (d := [x for x in y]):\n    pass") == []
