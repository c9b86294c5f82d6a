"""The installed package holds the tree's files, every one and unchanged: what the tree's tests found holds for it too.

Called with the installed package's directory; says what differs and exits with 1.
"""

import sys
from pathlib import Path

ROOMS = ("kernels", "flora_na", "stamp", "bindings", "bench")


def differing(tree: Path, installed: Path) -> list[str]:
    """Source files that one of the two lacks, or that differ."""
    found = []
    for room in ROOMS:
        files = {p.relative_to(tree) for p in (tree / room).rglob("*.py")}
        files |= {p.relative_to(installed) for p in (installed / room).rglob("*") if p.suffix in (".py", ".json")}
        for name in sorted(files):
            there = [(root / name).is_file() for root in (tree, installed)]
            if not all(there) or (tree / name).read_bytes() != (installed / name).read_bytes():
                found.append(str(name))
    return found


if __name__ == "__main__":
    names = differing(Path.cwd(), Path(sys.argv[1]))
    sys.exit(f"not as in the tree: {', '.join(names)}" if names else 0)
