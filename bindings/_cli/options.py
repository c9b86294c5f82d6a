"""The command line's options, and the values of those that are neither a number nor one of a few words."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fedgram import flora_na
from fedgram.flora_na.cohort import MISSING
from fedgram.flora_na.rank_choice import check_rank
from fedgram.flora_na.screening import check_screening
from fedgram.kernels import BACKENDS

# The members are those that the library has.
Method = Enum("Method", {name: name for name in flora_na.METHODS}, type=str)  # type: ignore[misc]
Backend = Enum("Backend", {name: name for name in BACKENDS}, type=str)  # type: ignore[misc]
Missing = Enum("Missing", {name: name for name in MISSING}, type=str)  # type: ignore[misc]
ALS, ERROR, AUTO = Method("als"), Missing("error"), Backend("auto")


def parse_rank(text: str | None) -> int | str | None:
    """``8`` as a number, ``auto:0.99`` as it is.

    Raises:
        ValueError: neither of the two.
    """
    rank = int(text) if text is not None and text.isdecimal() else text
    check_rank(rank)
    return rank


def _usage(text: str | None) -> str | None:
    try:
        parse_rank(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("rank: ")) from error
    return text


def _clip(text: str | None) -> str | None:
    try:
        check_screening(text, None)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("clip: ")) from error
    return text


RankOption = Annotated[
    str | None,
    typer.Option(
        "--rank",
        callback=_usage,
        metavar="R|auto:SHARE",
        help="Rank of the result; by default each module's largest rank. auto:0.99 is, per module, the smallest rank "
        "whose optimum keeps that share of ‖dW‖².",
    ),
]
ClipOption = Annotated[
    str | None,
    typer.Option(
        "--clip",
        callback=_clip,
        metavar="NORM|Kx",
        help="Scale down clients whose update is longer than this norm, or than K times the median norm (2x).",
    ),
]
MinCosineOption = Annotated[
    float | None,
    typer.Option(
        "--min-cosine", min=-1.0, max=1.0, help="Leave out clients of a smaller cosine to the mean of those that stay."
    ),
]

Directories = Annotated[list[Path], typer.Argument(metavar="DIRS", help="The clients' adapter directories.")]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", help="JSON: an object from directory name to sample count, or a list in order."),
]
BackendOption = Annotated[Backend, typer.Option(help="Which implementation of the operations runs.")]
MissingOption = Annotated[Missing, typer.Option(help="What to do about a module that a client lacks.")]
RankTimeoutOption = Annotated[
    float, typer.Option(min=1, help="Under torchrun: seconds without a sign of life until a rank is given up.")
]
ResumeOption = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="Go on where a run that was interrupted stopped, or start anew. By default it goes on, but for "
        "--rank-per-client and torchrun, which always start anew.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AdapterNameOption = Annotated[
    str | None, typer.Option("--adapter-name", help="Of several adapters in each directory, the one to read.")
]
AllowDoraOption = Annotated[
    bool, typer.Option("--allow-dora", help="Take DoRA: low-rank parts aggregated, magnitudes averaged by weight.")
]
InitOption = Annotated[
    Path | None,
    typer.Option(
        "--init", metavar="DIR", help="The adapter as initialised (PiSSA, OLoRA, CorDA, LoRA-GA): take B A - B0 A0."
    ),
]
RankPerClientOption = Annotated[
    bool, typer.Option("--rank-per-client", help="One adapter per client, of its own ranks, in OUTPUT/<its name>.")
]
