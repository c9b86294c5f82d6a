"""The two scenes: rounds from a shared start, and one aggregation of adapters trained apart."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgram import flora_na
from fedgram.bindings import peft as fpeft

from .clients import draw_batches, new_adapter, right_answers, train
from .flora_options import METHODS, Options, in_steps
from .flora_results import Outcome
from .minilm import HiddenStates, MeanPoolClassifier
from .newsgroups import Messages, dirichlet_partition, draw_like

SHARED, APART = "shared-start", "independent-starts"
WEIGHTS_NAME = "adapter_model.safetensors"
STREAMS = {"deal": 0, "views": 1, "init": 2, SHARED: 3, APART: 4}

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Stage:
    """What stays the same for all seeds and scenes.

    Attributes:
        options: the sizes.
        model: the classifier.
        train, test: messages of the clients together, and those that judge.
        hidden_train, hidden_test: the same below the adapted layers.
        folder: where adapters are written.
        advance: told how much work is done, in steps.
        show: told of every outcome as it is there.
    """

    options: Options
    model: MeanPoolClassifier
    train: Messages
    test: Messages
    hidden_train: HiddenStates
    hidden_test: HiddenStates
    folder: Path
    advance: Advance
    show: Callable[[Outcome], None]


class Cast:
    """The clients of one seed: who holds which messages, and by which test messages each is judged."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.seed = stage, seed
        options, labels = stage.options, stage.train.labels
        at_least = min(32, options.train_messages // (4 * options.clients))
        self.parts = dirichlet_partition(labels, options.clients, options.concentration, self.rng("deal"), at_least)
        mixes = [np.bincount(labels[part], minlength=len(stage.train.classes)) / len(part) for part in self.parts]
        rng = self.rng("views")
        self.views = [draw_like(stage.test.labels, mix, options.local_messages, rng) for mix in mixes]

    @property
    def names(self) -> list[str]:
        """Names of the clients' directories."""
        return [f"client-{u}" for u in range(len(self.parts))]

    @property
    def sizes(self) -> list[int]:
        """Messages that each client holds: its weight in every aggregation."""
        return [len(part) for part in self.parts]

    def rng(self, stream: str, *keys: int) -> np.random.Generator:
        """A generator of its own for every purpose, so that no scene shifts the draws of another."""
        return np.random.default_rng([self.seed, STREAMS[stream], *keys])

    def train(self, scene: str, client: int, round_: int, start: Path, output: Path) -> None:
        """Let one client train; its batches depend on seed, scene, round and client only, never on the method."""
        options = self.stage.options
        steps = options.steps if scene == SHARED else options.apart_steps
        batches = draw_batches(self.parts[client], steps, options.batch, self.rng(scene, round_, client))
        train(
            self.stage.model,
            start,
            batches,
            self.stage.hidden_train,
            self.stage.train.labels,
            options.learning_rate,
            output,
            self.stage.advance,
        )

    def local_accuracy(self, adapters: Sequence[Path]) -> float:
        """The mean over the clients of their own models' accuracy, each on its own label mix."""
        scores = [self._right(path, view).mean() for path, view in zip(adapters, self.views, strict=True)]
        return float(np.mean(scores))

    def judge(self, adapter: Path) -> np.ndarray:
        """Which test messages the model with this adapter classifies right."""
        return self._right(adapter, np.arange(len(self.stage.test.labels)))

    def _right(self, adapter: Path, indices: np.ndarray) -> np.ndarray:
        stage = self.stage
        right = right_answers(stage.model, adapter, indices, stage.hidden_test, stage.test.labels)
        stage.advance(in_steps(len(indices)))
        return right

    def aggregate(
        self, scene: str, round_: int, method: str, clients: Sequence[Path], local: float, output: Path
    ) -> Outcome:
        """Aggregate the clients' adapters into ``output``, judge the result, and show it."""
        adapters = fpeft.load_adapters(clients)
        ladder = flora_na.inspect(adapters, self.sizes).ladder
        began = time.perf_counter()
        result = flora_na.aggregate(adapters, self.sizes, method=method)
        fpeft.save_adapter(result.adapter, output)
        seconds = time.perf_counter() - began
        outcome = Outcome(
            scene=scene,
            seed=self.seed,
            round=round_,
            method=method,
            rho=result.report.rho,
            ladder=ladder,
            local_accuracy=local,
            sent_bytes=[(path / WEIGHTS_NAME).stat().st_size for path in clients],
            received_bytes=(output / WEIGHTS_NAME).stat().st_size,
            right=self.judge(output),
            seconds=seconds,
        )
        self.stage.show(outcome)
        return outcome

    def write_weights(self, folder: Path) -> None:
        """The weights as ``fedgram aggregate --weights`` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.json").write_text(json.dumps(dict(zip(self.names, self.sizes, strict=True)), indent=2))


def shared_start(cast: Cast) -> list[Outcome]:
    """Rounds from one start: every method continues from its own global adapter, with the same batches."""
    options, folder = cast.stage.options, cast.stage.folder / SHARED / f"seed-{cast.seed}"
    cast.write_weights(folder)
    start = folder / "start"
    new_adapter(cast.stage.model, options.rank, cast.seed, start)
    outcomes = []
    latest = dict.fromkeys(METHODS, start)
    # All methods start from the same adapter, so their clients of the first round are the same.
    first, first_local = _clients_of_round(cast, 1, start, folder / "round-1" / "clients")
    for round_ in range(1, options.rounds + 1):
        for method in METHODS:
            here = folder / f"round-{round_}" / method
            clients, local = first, first_local
            if round_ > 1:
                clients, local = _clients_of_round(cast, round_, latest[method], here / "clients")
            latest[method] = here / "global"
            outcomes.append(cast.aggregate(SHARED, round_, method, clients, local, latest[method]))
    return outcomes


def _clients_of_round(cast: Cast, round_: int, start: Path, folder: Path) -> tuple[list[Path], float]:
    paths = [folder / name for name in cast.names]
    for client, path in enumerate(paths):
        cast.train(SHARED, client, round_, start, path)
    return paths, cast.local_accuracy(paths)


def independent_starts(cast: Cast) -> list[Outcome]:
    """Every client trains from its own initial factors, at its own rank; then one aggregation, by every method."""
    options, folder = cast.stage.options, cast.stage.folder / APART / f"seed-{cast.seed}"
    cast.write_weights(folder)
    clients = []
    for client, name in enumerate(cast.names):
        start = folder / "starts" / name
        rank = options.apart_ranks[client % len(options.apart_ranks)]
        seed = int(cast.rng("init", client).integers(2**62))
        new_adapter(cast.stage.model, rank, seed, start)
        clients.append(folder / "clients" / name)
        cast.train(APART, client, 1, start, clients[-1])
    local = cast.local_accuracy(clients)
    return [
        cast.aggregate(APART, 1, method, clients, local, folder / method / "global") for method in (*METHODS, "stack")
    ]
