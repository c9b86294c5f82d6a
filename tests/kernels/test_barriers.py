"""What one thread of a program has stored, another loads only behind a barrier.

A compiler may lay a tensor out over the threads in one way where it is stored and in another where it is loaded.
Neither the interpreter nor a single run on a GPU shows what is missing then, so it is looked for in the sources.
"""

import ast
from pathlib import Path

import pytest

from fedgram import kernels

FILES = sorted(Path(kernels.__file__).parent.glob("_*_triton.py"))


def calls(loop, name):
    """Lines, and first arguments without their offsets, of the calls ``tl.name`` in a loop."""
    found = [n for n in ast.walk(loop) if isinstance(n, ast.Call) and ast.unparse(n.func) == f"tl.{name}"]
    return [(call.lineno, ast.unparse(call.args[0]).split(" + ")[0] if call.args else "") for call in found]


def outer_loops(node):
    """Loops that stand in no other."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.For | ast.While):
            yield child
        else:
            yield from outer_loops(child)


def unguarded(source):
    """Pointers that a loop stores to, and loads from without a barrier before."""
    found = set()
    for loop in outer_loops(ast.parse(source)):
        stored, barriers = {pointer for _, pointer in calls(loop, "store")}, calls(loop, "debug_barrier")
        loaded = [(line, pointer) for line, pointer in calls(loop, "load") if pointer in stored]
        found |= {pointer for line, pointer in loaded if not any(barrier < line for barrier, _ in barriers)}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_loops_load_what_they_store_behind_a_barrier(file):
    assert unguarded(file.read_text()) == set()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("tl.store(p, tl.load(p) + x)", {"p"}),
        ("tl.debug_barrier()\n    tl.store(p, tl.load(p) + x)", set()),
        ("x = tl.load(p + i)\n    tl.debug_barrier()\n    tl.store(p + j, x)", {"p"}),
        ("tl.store(p, tl.load(q))", set()),
    ],
)
def test_a_missing_barrier_is_found(body, found):
    assert unguarded(f"for s in range(n):\n    {body}") == found
