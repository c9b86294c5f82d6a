"""What the demo found, and what can be said about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BASELINE = "fedavg"
# Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom: of two seeds a standard error says little.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Outcome:
    """One aggregation: what went in, what came out, and how the global model does.

    Attributes:
        scene, seed, round, method: which.
        rho: relative divergence of the aggregate as saved.
        ladder: rho of every method on the same clients' adapters.
        local_accuracy: mean over the clients of their own models' accuracy on their own label mixes.
        sent_bytes: size of each client's adapter file.
        received_bytes: size of the global adapter file.
        right: which test messages the global model classifies right, bool.
        seconds: reading the clients' files, aggregating and writing.
    """

    scene: str
    seed: int
    round: int
    method: str
    rho: float
    ladder: Mapping[str, float]
    local_accuracy: float
    sent_bytes: Sequence[int]
    received_bytes: int
    right: np.ndarray = field(repr=False)
    seconds: float

    @property
    def accuracy(self) -> float:
        """Of the global model on the test messages."""
        return float(self.right.mean())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without the times, which differ from run to run."""
        return {
            "scene": self.scene,
            "seed": self.seed,
            "round": self.round,
            "method": self.method,
            "accuracy": self.accuracy,
            "local_accuracy": self.local_accuracy,
            "rho": self.rho,
            "ladder": dict(self.ladder),
            "sent_bytes_per_client": list(self.sent_bytes),
            "received_bytes_per_client": self.received_bytes,
        }


@dataclass(frozen=True)
class Summary:
    """One method at the end of one scene, over all seeds.

    Attributes:
        method: its name.
        accuracy: mean over the seeds.
        rho: mean over the seeds.
        local_accuracy: mean over the seeds.
        gain: accuracy minus that of fedavg with the same seeds, mean.
        gain_error: standard error of ``gain``. From one seed: of the test messages, paired message by message.
            From several: of the seeds, which includes that of messages and training.
        sent_bytes, received_bytes: a client's, mean.
        least_errors: how many standard errors from zero a gain counts as a difference: two over the test messages;
            over seeds Student's 95 % quantile (for more than eleven that of eleven).
    """

    method: str
    accuracy: float
    rho: float
    local_accuracy: float
    gain: float
    gain_error: float
    sent_bytes: float
    received_bytes: float
    least_errors: float

    @property
    def differs(self) -> bool:
        """Whether the gain is more than ``least_errors`` standard errors from zero."""
        return abs(self.gain) > self.least_errors * self.gain_error


def last_round(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of the last round."""
    end = max(outcome.round for outcome in outcomes)
    return [outcome for outcome in outcomes if outcome.round == end]


def by_method(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of each method, in order of appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.method, []).append(outcome)
    return groups


def summarise(outcomes: Sequence[Outcome]) -> list[Summary]:
    """Each method at the end of one scene, compared with fedavg on the same messages and seeds."""
    groups = by_method(last_round(outcomes))
    base = groups[BASELINE]
    return [_summary(method, own, base) for method, own in groups.items()]


def _summary(method: str, own: Sequence[Outcome], base: Sequence[Outcome]) -> Summary:
    pairs = list(zip(own, base, strict=True))
    assert all(a.seed == b.seed for a, b in pairs)
    differences = [a.right.astype(float) - b.right.astype(float) for a, b in pairs]
    samples = differences[0] if len(differences) == 1 else np.array([d.mean() for d in differences])
    return Summary(
        method=method,
        accuracy=_mean(o.accuracy for o in own),
        rho=_mean(o.rho for o in own),
        local_accuracy=_mean(o.local_accuracy for o in own),
        gain=float(samples.mean()),
        gain_error=float(samples.std(ddof=1) / np.sqrt(len(samples))) if len(samples) > 1 else 0.0,
        sent_bytes=_mean(np.mean(o.sent_bytes) for o in own),
        received_bytes=_mean(o.received_bytes for o in own),
        least_errors=2.0 if len(pairs) == 1 else STUDENT[min(len(pairs) - 1, len(STUDENT)) - 1],
    )


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
