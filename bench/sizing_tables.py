"""The tables of docs/sizing.md, from the cost model of ``bindings.sizing``.

``python -P -m fedgram.bench.sizing_tables docs/sizing.md`` writes them into the page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedgram.bindings.sizing import Host, Module, aggregation, llama_7b


def table(modules: Sequence[Module], *, own: bool, host: Host | None = None) -> str:
    """A Markdown table for 100, 1,000 and 10,000 clients on 1, 8 and 64 hosts."""
    lines = [
        "| clients | hosts | all factors | read by a rank | sent by a rank | received, with results | memory of a rank"
        " | opening | reading | exchange | computing | together |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for clients in (100, 1_000, 10_000):
        for hosts in (1, 8, 64):
            c = aggregation(modules, clients, hosts, own=own, host=host)
            sizes = (c.factors, c.read, c.sent, c.received + c.gathered, c.memory)
            times = (c.open_seconds, c.read_seconds, c.exchange_seconds, c.solve_seconds, c.seconds)
            cells = [f"{clients:,}", str(hosts), *map(_size, sizes), *map(_time, times)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return "0" if not count else f"{count / 1e3:.3g} kB"


def _time(value: float) -> str:
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if value >= 2 * unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} s" if value >= 0.01 else "< 0.01 s"


def write_tables(page: Path) -> None:
    """Put the tables into a page that holds earlier ones: that of files all hosts read first."""
    kept, tables = [], [table(llama_7b(), own=own) for own in (True, False)]
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        starts = line.startswith("| clients | hosts |")
        inside = starts or (inside and line.startswith("|"))
        if starts:
            kept.append(tables.pop())
        elif not inside:
            kept.append(line)
    page.write_text("\n".join(kept) + "\n", encoding="utf-8")


def main() -> None:
    """Print the tables of docs/sizing.md, or write them into a page that is named."""
    if len(sys.argv) > 1:
        write_tables(Path(sys.argv[1]))
        return
    for own in (False, True):
        print(f"### {'Clients on different hosts' if own else 'Files that all hosts read'}\n")
        print(table(llama_7b(), own=own), end="\n\n")


if __name__ == "__main__":
    main()
