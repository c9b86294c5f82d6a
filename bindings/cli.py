"""The commands ``aggregate`` and ``inspect`` on adapter directories of PEFT.

Exit codes: 0 done, 1 bad input (one line on stderr), 2 usage.
"""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

try:
    import rich  # noqa: F401 - the tables
    import typer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; the command line needs: pip install 'fedgram[cli]'", name=error.name
    ) from error

from fedgram import flora_na
from fedgram.flora_na import Adapter, Aggregation

from . import _cli_tables as tables
from ._cli_support import one_line_errors, progress_bar, read_weights
from .peft import check_output, load_adapter, load_adapters, merge_configs, save_adapter

app = typer.Typer(
    name="fedgram",
    help="Federated aggregation of LoRA adapters, in Gram space.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Method = Enum("Method", {name: name for name in flora_na.METHODS}, type=str)
Backend = Enum("Backend", {name: name for name in ("auto", "triton", "torch")}, type=str)
Missing = Enum("Missing", {name: name for name in ("error", "renormalize", "zero")}, type=str)

Directories = Annotated[list[Path], typer.Argument(metavar="DIRS", help="The clients' adapter directories.")]
WeightsFile = Annotated[
    Path | None,
    typer.Option("--weights", help="JSON: an object from directory name to sample count, or a list in order."),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the result; by default each module's largest rank.")]
BackendName = Annotated[Backend, typer.Option(help="Which implementation of the operations runs.")]
MissingPolicy = Annotated[Missing, typer.Option(help="What to do about a module that a client lacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.callback()
def _root() -> None:
    """Federated aggregation of LoRA adapters, in Gram space."""


@app.command()
def aggregate(
    dirs: Directories,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the global adapter.")],
    method: Annotated[Method, typer.Option(help="How the pair of factors is estimated.")] = Method.als,
    weights: WeightsFile = None,
    rank: Rank = None,
    residual: Annotated[
        Path | None, typer.Option(help="Also write what the pair leaves out, as an adapter of its own.")
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="flora-na: one P and Q for all modules.")] = False,
    anchor: Annotated[Path | None, typer.Option(help="Last global adapter: estimate the step from it.")] = None,
    align_to: Annotated[Path | None, typer.Option(help="Earlier global adapter to rotate the result to.")] = None,
    missing: MissingPolicy = Missing.error,
    backend: BackendName = Backend.auto,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Aggregate the clients' adapters into one adapter that PEFT loads."""
    with one_line_errors():
        outputs = [path for path in (output, residual) if path is not None]
        _check_outputs(outputs, dirs)
        adapters = load_adapters(dirs)
        counts = read_weights(weights, dirs)
        with progress_bar("aggregating", shown=not (quiet or as_json)) as progress:
            result = flora_na.aggregate(
                adapters,
                counts,
                method=method.value,
                rank=rank,
                shared=shared,
                anchor=None if anchor is None else load_adapter(anchor),
                align_to=None if align_to is None else load_adapter(align_to),
                missing=missing.value,
                residual=residual is not None,
                backend=backend.value,
                progress=progress,
                names=[str(path) for path in dirs],
            )
        _save(result, merge_configs(adapter.config for adapter in adapters), output, residual)
        if as_json:
            _print_json({"output": str(output), "residual": residual and str(residual), **result.report.to_dict()})
        elif not quiet:
            console = tables.console()
            console.print(tables.aggregate_table(result.report))
            console.print(f"wrote {' and '.join(map(str, outputs))}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    dirs: Directories,
    rank: Rank = None,
    weights: WeightsFile = None,
    missing: MissingPolicy = Missing.error,
    backend: BackendName = Backend.auto,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare every method's divergence, and the clients with each other, before aggregating."""
    with one_line_errors():
        adapters = load_adapters(dirs)
        counts = read_weights(weights, dirs)
        with progress_bar("inspecting", shown=not (quiet or as_json)) as progress:
            result = flora_na.inspect(
                adapters,
                counts,
                rank=rank,
                missing=missing.value,
                backend=backend.value,
                progress=progress,
                names=[str(path) for path in dirs],
            )
        if as_json:
            _print_json(result.to_dict())
        elif not quiet:
            _print_inspection(result)


def _print_inspection(result: flora_na.Inspection) -> None:
    console = tables.console()
    console.print(tables.ladder_table(result))
    console.print()
    console.print(tables.clients_table(result))
    ranks, rhos = tables.rank_curve(result)
    if ranks:
        console.print()
        console.print(tables.curve_table(ranks, rhos))


def _save(result: Aggregation, config: dict[str, Any] | None, output: Path, residual: Path | None) -> None:
    if residual is not None and result.residual is not None:
        # Without a task type: PEFT would look for the head of a classification task, which a residual has not.
        rest = Adapter(result.residual.modules, {}, config)
        save_adapter(rest, residual, config=None if config is None else config | {"task_type": None})
    save_adapter(result.adapter, output, config=config)


def _check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    real = [os.path.realpath(path) for path in outputs]
    sources = {os.path.realpath(path) for path in inputs}
    for path, place in zip(outputs, real, strict=True):
        if place in sources:
            raise ValueError(f"{path}: is one of the clients' directories: choose another output")
    if len(real) == 2 and os.path.commonpath(real) in real:
        raise ValueError(f"{outputs[1]}: one output lies in the other: choose separate directories")
    for path in outputs:
        check_output(path)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))
