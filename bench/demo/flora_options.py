"""The sizes of the FLoRA-NA demo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

METHODS = ("fedavg", "flora-na", "als", "svd")
"""Those that send every client one pair of the clients' largest rank."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        out: directory of adapters, table, picture and figures.
        first_seed, seeds: the seeds are ``first_seed, first_seed + 1, ...``. A seed decides who holds which messages,
            the initial factors and the order of the batches; the test messages are the same for all.
        clients: how many.
        concentration: of the Dirichlet draw that deals each class to the clients; small is unequal.
        rounds: of the scene with a shared start.
        steps: a client's steps in one round of it.
        apart_steps: a client's steps in the scene with independent starts.
        rank: LoRA rank of the shared start.
        apart_ranks: ranks of the independent starts, client by client, repeated as needed.
        batch: messages a step.
        learning_rate: of AdamW.
        max_tokens: of a message; the rest is cut off.
        train_messages: how many training messages are dealt to the clients.
        test_messages: how many of the 7,528 test messages are judged.
        local_messages: how many of these, drawn by a client's own label mix, judge its model.
    """

    out: Path = Path("out/flora-na")
    first_seed: int = 0
    seeds: int = 1
    clients: int = 4
    concentration: float = 0.3
    rounds: int = 3
    steps: int = 12
    apart_steps: int = 40
    rank: int = 8
    apart_ranks: tuple[int, ...] = (8, 4)
    batch: int = 16
    learning_rate: float = 5e-3
    max_tokens: int = 32
    train_messages: int = 4000
    test_messages: int = 1000
    local_messages: int = 100

    def quick(self) -> Options:
        """The same, smaller: too small to judge the methods by."""
        return replace(
            self,
            rounds=min(self.rounds, 2),
            steps=4,
            apart_steps=8,
            train_messages=600,
            test_messages=200,
            local_messages=40,
        )

    @property
    def all_seeds(self) -> range:
        """The seeds to run."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def work(self) -> float:
        """Client steps and messages judged, in units of one step, for a progress bar."""
        trained = 1 + len(METHODS) * (self.rounds - 1)
        judged = self.rounds * len(METHODS) * self.test_messages + trained * self.clients * self.local_messages
        apart = (len(METHODS) + 1) * self.test_messages + self.clients * self.local_messages
        steps = self.clients * (trained * self.steps + self.apart_steps)
        return self.seeds * (steps + in_steps(judged + apart))


def in_steps(messages: int) -> float:
    """Judging this many messages takes about as long as so many steps."""
    return messages / 32
