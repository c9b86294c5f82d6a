"""Values of command-line options that are neither a number nor one of a few words."""

from __future__ import annotations

from typing import Annotated

import typer

from fedgram.flora_na.rank_choice import check_rank
from fedgram.flora_na.screening import check_screening


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
