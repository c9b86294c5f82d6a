"""One federated continual run: tasks one by one, rounds, clients, steps; the accuracies after every task."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgram.stamp import SpatialMatcher, continual_metrics

from .stamp_data import Images, deal, split_tasks
from .stamp_methods import Client, Method
from .stamp_model import Batch, accuracies, new_model


@dataclass(frozen=True)
class Setting:
    """What all methods share.

    Attributes:
        clients: number of clients; all take part in every round.
        rounds: rounds per task.
        steps: local steps per round.
        batch: images of the current task per step.
        lr: learning rate of the clients' plain gradient descent.
        capacity: images that a client may keep of earlier tasks, in all.
        c_temporal, c_spatial: strengths of the two matchings. ``c_temporal`` was chosen on seeds 100 to 102,
            which the table does not use; ``c_spatial`` is the library's default.
        alpha: Dirichlet concentration of the classes over the clients.
        train_per_class, test_per_class: images per class, over all clients.
    """

    clients: int = 5
    rounds: int = 4
    steps: int = 10
    batch: int = 32
    lr: float = 0.05
    capacity: int = 50
    c_temporal: float = 0.5
    c_spatial: float = 0.25
    alpha: float = 0.3
    train_per_class: int = 1000
    test_per_class: int = 300


@dataclass(frozen=True, eq=False)
class Run:
    """One method with one seed.

    Attributes:
        method, seed: which.
        class_incremental, task_incremental: accuracy matrices (T, T), NaN above the diagonal.
        curve: mean class-incremental accuracy over the tasks seen so far, after every round.
        sample_gradients: images whose gradient was computed, over all clients and steps.
        memory_bytes: bytes of images that one client keeps at the end, the largest of the clients.
        upload_bytes: bytes that one client sends in the whole run.
        worst_gap: the largest certificate of the server's matchings, relative to the terms it is a difference of.
        seconds: wall clock.
    """

    method: str
    seed: int
    class_incremental: np.ndarray
    task_incremental: np.ndarray
    curve: list[float]
    sample_gradients: int
    memory_bytes: int
    upload_bytes: int
    worst_gap: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, with the figures of both accuracy matrices."""
        matrices = {"class_incremental": self.class_incremental, "task_incremental": self.task_incremental}
        figures = {
            name: {"accuracy": [row[: t + 1].tolist() for t, row in enumerate(a)], **vars(continual_metrics(a))}
            for name, a in matrices.items()
        }
        return {name: value for name, value in vars(self).items() if name not in matrices} | figures


def run_one(images: Images, method: Method, setting: Setting, seed: int) -> Run:
    """Run one method. The split, the shares, the first model and the batches depend on the seed alone.

    It runs on one thread, so that the figures do not depend on how many runs go on side by side.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(images, method, setting, seed)
    finally:
        torch.set_num_threads(threads)


def _run(images: Images, method: Method, setting: Setting, seed: int) -> Run:
    started = time.perf_counter()
    train = split_tasks(images.train, setting.train_per_class, seed)
    test = split_tasks(images.test, setting.test_per_class, seed)
    model = new_model(seed)
    server = SpatialMatcher(model.state_dict(), c=setting.c_spatial if method.spatial else 0.0)
    clients = [Client(model, method, setting.capacity, setting.c_temporal, seed) for _ in range(setting.clients)]
    by_class, by_task = (np.full((len(train), len(train)), np.nan) for _ in range(2))
    curve, gaps = [], []
    for t, task in enumerate(train):
        shares = deal(task, setting.clients, setting.alpha, 1000 * seed + t)
        for r in range(setting.rounds):
            states = []
            for u, (client, share) in enumerate(zip(clients, shares, strict=True)):
                model.load_state_dict(server.state)
                _train_locally(model, client, share, setting, (seed, t, r, u))
                states.append({name: p.detach().clone() for name, p in model.state_dict().items()})
            gaps.append(float(server.step(states, [len(y) for _, y in shares]).dual.relative_gap))
            model.load_state_dict(server.state)
            by_class[t, : t + 1], by_task[t, : t + 1] = accuracies(model, test[: t + 1])
            curve.append(float(by_class[t, : t + 1].mean()))
        for client, share in zip(clients, shares, strict=True):
            client.remember(share, t)
    rounds = setting.rounds * len(train)
    return Run(
        method=method.name,
        seed=seed,
        class_incremental=by_class,
        task_incremental=by_task,
        curve=curve,
        sample_gradients=sum(client.sample_gradients for client in clients),
        memory_bytes=max(client.memory.nbytes for client in clients),
        upload_bytes=rounds * sum(p.nbytes for p in model.state_dict().values()),
        worst_gap=max(gaps),
        seconds=time.perf_counter() - started,
    )


def _train_locally(
    model: nn.Module, client: Client, share: Batch, setting: Setting, key: tuple[int, int, int, int]
) -> None:
    """A client's steps of one round, by plain gradient descent; its batches depend on the key alone."""
    X, y = share
    parameters: list[Tensor] = list(model.parameters())
    draw = np.random.default_rng(key)
    for _ in range(setting.steps):
        rows = torch.from_numpy(draw.choice(len(y), min(setting.batch, len(y)), replace=False))
        client.fill_grad((X[rows], y[rows]))
        with torch.no_grad():
            torch._foreach_add_(parameters, [p.grad for p in parameters if p.grad is not None], alpha=-setting.lr)
