"""Opening the clients' directories and checking the outputs, for the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fedgram.flora_na import Adapter

from .._peft.files import check_kept, check_separate
from ..console import shown_warnings
from ..peft import check_output, load_adapters, load_global


def open_clients(
    dirs: Sequence[Path], adapter_name: str | None, allow_dora: bool, init: Path | None, *, warn: bool = True
) -> list[Adapter]:
    """``load_adapters``, its warnings as lines on stderr."""
    with shown_warnings(warn):
        return load_adapters(dirs, adapter_name=adapter_name, allow_dora=allow_dora, init=init)


def open_global(
    path: Path | None, clients: Sequence[Adapter], first: Path, allow_dora: bool, *, covered: bool = False
) -> Adapter | None:
    """``load_global`` for clients of which the first lies in ``first``, or None."""
    with shown_warnings(False):
        return None if path is None else load_global(path, clients, str(first), allow_dora=allow_dora, covered=covered)


def check_per_client(others: dict[str, Any]) -> None:
    """Refuse ``--rank-per-client`` with options that speak of one result.

    Raises:
        typer.BadParameter: names the option.
    """
    for option, value in others.items():
        if value:
            raise typer.BadParameter(f"one result per client does not go with {option}", param_hint="--rank-per-client")


def check_outputs(output: Path, residual: Path | None, adapters: Sequence[Adapter]) -> list[Path]:
    """The outputs of one aggregation, checked to be writable and to leave its input as it is.

    Raises:
        ValueError: an output is read from, lies in the other, or holds other files.
        OSError: the place cannot be written.
    """
    outputs = [path for path in (output, residual) if path is not None]
    check_kept(outputs, adapters)
    check_separate(output, residual)
    for path in outputs:
        check_output(path)
    return outputs


def client_outputs(output: Path, dirs: Sequence[Path], adapters: Sequence[Adapter]) -> list[Path]:
    """OUTPUT/<name of the client's directory> for every client, checked as ``check_outputs`` does.

    Raises:
        ValueError: two clients of one name, or an output that is read from or holds other files.
        OSError: the place cannot be written.
    """
    names = [os.path.basename(os.path.abspath(path)) for path in dirs]
    for name, path in zip(names, dirs, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"{path}: another client's directory has the name {name!r}, and with it the same output")
    outputs = [output / name for name in names]
    check_kept(outputs, adapters)
    for path in outputs:
        check_output(path)
    return outputs
