"""What commands share: errors and warnings as one line, progress bars."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ProgressCallback = Callable[[int, int, str], None]
LONGEST = 1000
"""Characters of a message before it is shortened."""
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input and failing files into one line on stderr and exit code 1."""
    try:
        yield
    except Exception as error:
        if not is_input_error(error):
            raise
        fail(describe(error))


def is_input_error(error: Exception) -> bool:
    """Whether a line says all there is to say; the rest are faults of the program."""
    if out_of_memory(error):
        return True
    if isinstance(error, RuntimeError):
        return str(error).startswith("backend=")  # a forced backend that cannot run is input
    return isinstance(error, ValueError | OSError | ImportError)


def out_of_memory(error: Exception) -> bool:
    """Whether memory was refused, by Python or by torch, which says so in words only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


@contextlib.contextmanager
def shown_warnings(shown: bool = True) -> Iterator[None]:
    """Print each warning as one line on stderr, or none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught if shown else ():
        print(f"fedgram: warning: {one_line(str(warning.message))}", file=sys.stderr)


def print_always() -> None:
    """From now on, what stdout's encoding does not have is printed as a question mark, and ends no finished work."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # stderr does as much by itself


def fail(message: str) -> None:
    """Print one line on stderr and exit with code 1."""
    print(f"fedgram: {one_line(message)}", file=sys.stderr)
    raise typer.Exit(1)


def describe(error: Exception) -> str:
    """An error as a user reads it: for the operating system's, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if out_of_memory(error):
        return f"out of memory: {error}" if str(error) else "out of memory"
    return str(error)


def one_line(text: str) -> str:
    """``text`` on one line, its control characters escaped, its middle left out if it is long.

    Names and values in adapter files are anybody's.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


@contextlib.contextmanager
def progress_bar(label: str, *, shown: bool) -> Iterator[ProgressCallback]:
    """A bar on stderr, driven by (done, total, module); nothing where it is not shown or stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("{task.fields[module]}"),
        console=console,
        transient=True,
        disable=not shown or not console.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=None, module="")
        yield lambda done, total, module: bar.update(task, completed=done, total=total, module=escape(one_line(module)))
