"""The commands ``aggregate`` and ``inspect`` on adapter directories of PEFT.

Exit codes: 0 done, 1 bad input (one line on stderr), 2 usage.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.text import Text
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; the command line needs: pip install 'fedgram[cli]'", name=error.name
    ) from error

from fedgram import flora_na

from ._cli import inspect_plot as picture
from ._cli import tables
from ._cli.aggregations import Findings, aggregate_alone, aggregate_on_ranks, aggregate_per_client
from ._cli.clients import check_outputs, check_per_client, open_clients, open_global
from ._cli.options import (
    ALS,
    AUTO,
    ERROR,
    AdapterNameOption,
    AllowDoraOption,
    BackendOption,
    ClipOption,
    Directories,
    InitOption,
    JsonOption,
    Method,
    MinCosineOption,
    MissingOption,
    QuietOption,
    RankOption,
    RankPerClientOption,
    RankTimeoutOption,
    ResumeOption,
    WeightsOption,
    parse_rank,
)
from ._cli.weights_file import read_weights
from ._distributed.launch import alone_or_on_ranks, refuse_launched
from ._peft.merging import check_residual
from .console import one_line_errors, print_always, progress_bar

app = typer.Typer(
    name="fedgram",
    help="Federated aggregation of LoRA adapters, in Gram space.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        with one_line_errors():
            typer.echo(f"fedgram {importlib.metadata.version('fedgram')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Federated aggregation of LoRA adapters, in Gram space."""
    print_always()
    if context.invoked_subcommand != "aggregate":
        refuse_launched(f"{context.invoked_subcommand}")


@app.command()
def aggregate(
    dirs: Directories,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the global adapter.")],
    method: Annotated[Method, typer.Option(help="How the pair of factors is estimated.")] = ALS,
    weights: WeightsOption = None,
    rank: RankOption = None,
    residual: Annotated[
        Path | None, typer.Option(help="Also write what the pair leaves out, as an adapter of its own.")
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="flora-na: one P and Q for all modules.")] = False,
    anchor: Annotated[Path | None, typer.Option(help="Last global adapter: estimate the step from it.")] = None,
    align_to: Annotated[Path | None, typer.Option(help="Earlier global adapter to rotate the result to.")] = None,
    missing: MissingOption = ERROR,
    clip: ClipOption = None,
    min_cosine: MinCosineOption = None,
    rank_per_client: RankPerClientOption = False,
    adapter_name: AdapterNameOption = None,
    allow_dora: AllowDoraOption = False,
    init: InitOption = None,
    backend: BackendOption = AUTO,
    resume: ResumeOption = None,
    rank_timeout: RankTimeoutOption = 30.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Aggregate the clients' adapters into one adapter that PEFT loads."""
    options = {
        "method": method.value,
        "missing": missing.value,
        "clip": clip,
        "min_cosine": min_cosine,
        "backend": backend.value,
        "names": [str(path) for path in dirs],
    }
    if rank_per_client:
        check_per_client({"--rank": rank, "--residual": residual, "--shared": shared, "--anchor": anchor,
                          "--align-to": align_to, "--resume": resume})  # fmt: skip
        refuse_launched("aggregate --rank-per-client")
        with one_line_errors():
            adapters = open_clients(dirs, adapter_name, allow_dora, init, warn=not quiet)
            counts = read_weights(weights, dirs)
            shown = not (quiet or as_json)
            _tell(aggregate_per_client(dirs, output, adapters, counts, shown=shown, **options), as_json, quiet)
        return
    if resume:
        refuse_launched("aggregate --resume")
    with alone_or_on_ranks(rank_timeout) as watch:
        first = watch is None or watch.rank == 0
        adapters = open_clients(dirs, adapter_name, allow_dora, init, warn=first and not quiet)
        if first:
            check_outputs(output, residual, adapters)
        if residual is not None:
            check_residual(adapter.config for adapter in adapters)
        counts = read_weights(weights, dirs)
        options |= {
            "rank": parse_rank(rank),
            "shared": shared,
            "anchor": open_global(anchor, adapters, dirs[0], allow_dora, covered=missing is ERROR),
            "align_to": open_global(align_to, adapters, dirs[0], allow_dora),
        }
        with progress_bar("aggregating", shown=first and not (quiet or as_json)) as progress:
            options["progress"] = progress
            if watch is None:
                found = aggregate_alone(adapters, counts, output, residual, resume=resume is not False, **options)
            else:
                found = aggregate_on_ranks(adapters, counts, output, residual, watch=watch, **options)
        if first:
            _tell(found, as_json, quiet)


@app.command()
def inspect(
    dirs: Directories,
    rank: RankOption = None,
    weights: WeightsOption = None,
    missing: MissingOption = ERROR,
    clip: ClipOption = None,
    min_cosine: MinCosineOption = None,
    adapter_name: AdapterNameOption = None,
    allow_dora: AllowDoraOption = False,
    init: InitOption = None,
    backend: BackendOption = AUTO,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw it: a picture.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare every method's divergence, and the clients with each other, before aggregating."""
    with one_line_errors():
        if plot is not None:
            picture.check(plot)
        adapters = open_clients(dirs, adapter_name, allow_dora, init, warn=not quiet)
        counts = read_weights(weights, dirs)
        with progress_bar("inspecting", shown=not (quiet or as_json)) as progress:
            result = flora_na.inspect(
                adapters,
                counts,
                rank=parse_rank(rank),
                missing=missing.value,
                clip=clip,
                min_cosine=min_cosine,
                backend=backend.value,
                progress=progress,
                names=[str(path) for path in dirs],
            )
        if plot is not None:
            picture.draw(result, plot)
        if as_json:
            _print_json(result.to_dict())
        elif not quiet:
            _print_inspection(result)


def _print_inspection(result: flora_na.Inspection) -> None:
    console = tables.console()
    console.print(tables.ladder_table(result))
    console.print()
    console.print(tables.clients_table(result))
    if result.screening is not None:
        console.print(tables.screening_text(result.screening), soft_wrap=True)
    ranks, rhos = tables.rank_curve(result)
    if ranks:
        console.print()
        console.print(tables.curve_table(ranks, rhos))
    for warning in tables.warning_texts(result):
        console.print(warning, soft_wrap=True)


def _tell(found: Findings, as_json: bool, quiet: bool) -> None:
    if as_json:
        _print_json(found.document)
    elif not quiet:
        console = tables.console()
        for part in found.parts:
            console.print(part, soft_wrap=isinstance(part, Text))


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))
