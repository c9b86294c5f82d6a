"""``demo`` and ``bench``, added to the app of ``bindings.cli``; what they need is imported when they are called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from fedgram.bindings.cli import app  # first: it says how to install typer

import typer  # isort: skip

DEMOS = {
    "flora-na": ("fedgram.bench.demo.flora", "flora_na_command", "Real clients fine-tune; every method aggregates."),
    "stamp": ("fedgram.bench.demo.stamp", "stamp_command", "Real tasks arrive one by one; gradients are matched."),
}
BENCH = ("fedgram.bench.run", "bench_command", "Peers side by side on this machine.")
FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}


def _add(group: typer.Typer, name: str, module: str, function: str, text: str, *, extra: str) -> None:
    """Add a command; all that follows its name, ``--help`` too, is read by the options of ``function`` itself."""

    @group.command(name, help=text, add_help_option=False, context_settings=FORWARD)
    def forward(context: typer.Context) -> None:
        inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        inner.command()(_load(module, function, extra))
        inner(args=context.args, prog_name=context.command_path)


def _load(module: str, function: str, extra: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "fedgram":
            raise
        hint = "" if "pip install" in str(error) else f"; pip install 'fedgram[{extra}]'"
        print(f"fedgram: {error}{hint}", file=sys.stderr)
        raise typer.Exit(1) from None


demo = typer.Typer(help="A real federated run on real data, with a table and a picture.", no_args_is_help=True)
for _name, _place in DEMOS.items():
    _add(demo, _name, *_place, extra="demo")
app.add_typer(demo, name="demo")
_add(app, "bench", *BENCH, extra="bench")
