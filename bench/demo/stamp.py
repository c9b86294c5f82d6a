"""``fedgram demo stamp``: federated continual learning on real images, every method beside the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch

from .stamp_data import Images, load_images
from .stamp_methods import METHODS, Method
from .stamp_run import Run, Setting, run_one
from .stamp_summary import summary

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; the demos need: pip install 'fedgram[demo]'", name=error.name) from error

from fedgram.bindings.console import one_line_errors, progress_bar

from ..files import check_folder, written_whole
from .stamp_plot import save_curves, save_matrices
from .stamp_table import effects_lines, notes, table

WIDTH = 130  # of a line of the table; narrower would cut what tells its columns apart
Progress = Callable[[int, int, str], None]


class Dataset(StrEnum):
    """The images that can be asked for."""

    auto = "auto"
    fashion_mnist = "fashion-mnist"
    mnist = "mnist"


@dataclass(frozen=True, eq=False)
class StampDemo:
    """All runs of the demo.

    Attributes:
        data: name and source of the images.
        setting: what all methods shared.
        runs: one per method and seed, methods in the order of the table, seeds ascending.
    """

    data: str
    setting: Setting
    runs: list[Run]

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain numbers: setting, per method mean and deviation over the seeds, and each run."""
        return {
            "demo": "stamp",
            "data": self.data,
            "torch": torch.__version__,
            "setting": asdict(self.setting),
            **summary(self.runs),
            "runs": [run.to_dict() for run in self.runs],
        }


def run(
    *,
    dataset: str = "auto",
    seeds: Sequence[int] = (0, 1, 2),
    setting: Setting | None = None,
    methods: Sequence[Method] = METHODS,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> StampDemo:
    """Run every method with every seed.

    Args:
        dataset: "fashion-mnist", "mnist", or "auto": the first that can be had.
        seeds: distinct; each fixes the images, their shares, the first model and the batches for all methods.
        setting: sizes and strengths.
        methods: the rows of the table.
        jobs: processes side by side; default one per core, at most one per run. The figures do not depend on it.
        progress: called with (runs done, runs in all, what was done last).

    Raises:
        ValueError: no or repeated seeds or methods, an unknown data set, or images that cannot be dealt so.
        FetchError: the images cannot be had.
    """
    setting = setting or Setting()
    if not seeds or not methods or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds, methods: expected at least one of each, and distinct seeds, got {list(seeds)}")
    images = load_images(dataset)
    plan = [(method, seed) for seed in seeds for method in methods]
    jobs = min(jobs or os.cpu_count() or 1, len(plan))
    found: dict[tuple[str, int], Run] = {}
    for done in _finished(images, plan, setting, jobs):
        found[done.method, done.seed] = done
        if progress is not None:
            progress(len(found), len(plan), f"{done.method}, seed {done.seed}")
    ordered = [found[method.name, seed] for method in methods for seed in sorted(seeds)]
    return StampDemo(images.name, setting, ordered)


def stamp_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures and figures.")] = Path(
        "out/stamp"
    ),
    dataset: Annotated[Dataset, typer.Option(help="auto: Fashion-MNIST, or MNIST where it cannot be had.")] = (
        Dataset.auto
    ),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per task.")] = Setting.rounds,
    clients: Annotated[int, typer.Option(min=1, help="Clients.")] = Setting.clients,
    capacity: Annotated[int, typer.Option(min=10, help="Images that a client may keep.")] = Setting.capacity,
    c_temporal: Annotated[float, typer.Option(help="Strength of the clients' matching.")] = Setting.c_temporal,
    c_spatial: Annotated[float, typer.Option(help="Strength of the server's matching.")] = Setting.c_spatial,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side; by default one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Five tasks arrive one by one at clients with unlike data; what does the model remember, by which method?"""
    with one_line_errors():
        setting = Setting(clients=clients, rounds=rounds, capacity=capacity, c_temporal=c_temporal, c_spatial=c_spatial)
        check_folder(output)
        with progress_bar("runs", shown=not (as_json or quiet)) as progress:
            result = run(
                dataset=dataset.value,
                seeds=range(seeds),
                setting=setting,
                methods=METHODS,
                jobs=jobs,
                progress=progress,
            )
        paths = save(result, output)
        if as_json:
            print(json.dumps(result.to_dict(), indent=2, allow_nan=False))
        elif not quiet:
            _print(result, paths)


def save(result: StampDemo, folder: Path) -> list[Path]:
    """Write ``stamp.json``, ``stamp_matrices.png`` and ``stamp_curves.png``, each whole or not at all."""
    document = json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"
    writers: dict[str, Callable[[Path], Any]] = {
        "stamp.json": lambda path: path.write_text(document, encoding="utf-8"),
        "stamp_matrices.png": lambda path: save_matrices(result.runs, path),
        "stamp_curves.png": lambda path: save_curves(result.runs, path),
    }
    for name, write in writers.items():
        with written_whole(folder / name) as unfinished:
            write(unfinished)
    return [folder / name for name in writers]


def _print(result: StampDemo, paths: Sequence[Path]) -> None:
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(table(result.runs, result.data))
    for line in [*effects_lines(result.runs), *notes(result.runs), f"wrote {', '.join(map(str, paths))}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _finished(images: Images, plan: list[tuple[Method, int]], setting: Setting, jobs: int) -> Iterator[Run]:
    """The runs as they end, in this process or in several."""
    if jobs == 1:
        for method, seed in plan:
            yield run_one(images, method, setting, seed)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in an unknown state
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_keep, initargs=(images,)) as pool:
        # The longest runs, which are the last methods, first.
        others = multiprocessing.active_children()
        try:
            runs = [pool.submit(_run_kept, method, setting, seed) for method, seed in reversed(plan)]
            for done in as_completed(runs):
                yield done.result()
        except BaseException:  # nobody waits for the runs that have begun
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.terminate()
            raise


_kept: list[Images] = []


def _keep(images: Images) -> None:
    """Hold the images in a worker, so that they are sent to it once; it ends when, and only when, its parent says so
    or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _kept[:] = [images]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_kept(method: Method, setting: Setting, seed: int) -> Run:
    return run_one(_kept[0], method, setting, seed)
