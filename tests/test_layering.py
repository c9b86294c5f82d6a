"""The rooms of the package import in one direction only, read from the sources."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNTS_LAUNCHES = "bench/host_overhead.py"
"""It puts a counter in the place of every kernel, so it has to know where each is launched from."""
ALLOWED = {
    "kernels": {"kernels"},
    "flora_na": {"kernels", "flora_na"},
    "stamp": {"kernels", "stamp"},
    "bindings": {"kernels", "flora_na", "stamp", "bindings"},
    "bench": {"kernels", "flora_na", "stamp", "bindings", "bench"},
}


def imported_modules(path: Path, package: str) -> set[str]:
    """Absolute names of everything that the file imports, wherever in the file the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            prefix = ".".join(part for part in (base, node.module) if part)
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    """The fedgram rooms (kernels, flora_na, ...) that a source file imports."""
    package = "fedgram." + ".".join(path.relative_to(ROOT).parent.parts)
    return {name.split(".")[1] for name in imported_modules(path, package) if name.startswith("fedgram.")}


def private_parts_of_other_rooms(path: Path) -> set[str]:
    """Names below another room's ``_module`` that a source file imports."""
    room = path.relative_to(ROOT).parts[0]
    package = "fedgram." + ".".join(path.relative_to(ROOT).parent.parts)
    names = imported_modules(path, package)
    return {
        name
        for name in names
        if name.startswith("fedgram.")
        and name.split(".")[1] != room
        and any(part.startswith("_") for part in name.split(".")[2:])
    }


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_never_run_backwards(room):
    sources = sorted((ROOT / room).rglob("*.py"))
    assert sources
    for path in sources:
        assert rooms_imported(path) <= ALLOWED[room], f"{path.relative_to(ROOT)} imports {rooms_imported(path)}"


@pytest.mark.parametrize("room", ALLOWED)
def test_no_room_reaches_into_the_private_modules_of_another(room):
    reached = {str(path.relative_to(ROOT)): private_parts_of_other_rooms(path) for path in (ROOT / room).rglob("*.py")}
    assert {path: names for path, names in reached.items() if names and path != COUNTS_LAUNCHES} == {}
    if room == "bench":
        assert reached[COUNTS_LAUNCHES], "no exception is needed any more"


def test_the_reader_of_imports_sees_relative_and_nested_imports(tmp_path):
    source = tmp_path / "x.py"
    source.write_text("def f():\n    from ..stamp import match\n    import fedgram.bench.cli\n    from . import y\n")
    assert imported_modules(source, "fedgram.kernels") == {
        "fedgram.stamp.match",
        "fedgram.bench.cli",
        "fedgram.kernels.y",
    }


def test_every_package_is_declared():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "fedgram." + ".".join(path.parent.relative_to(ROOT).parts)
        for room in ALLOWED
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert declared == found
