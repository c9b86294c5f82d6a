"""Thin ``nn.Module`` for another codebase's server loop: clients' adapters in, the global adapter out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedgram import flora_na
from fedgram.flora_na import Adapter, AdapterLike, LoraLayer, Report

ALIGNED = ("als", "svd")


class LoraAggregator(nn.Module):
    """Aggregates one round after another with ``flora_na.aggregate`` (arXiv:2509.26399) and remembers the last result.

    The result of the last round is part of the ``state_dict``, so that a server's checkpoint holds it.

    Args:
        method: ``fedavg``, ``flora-na``, ``als``, ``svd`` or ``stack``.
        rank: of the result; None is, per module, the largest client rank.
        shared: ``flora-na`` with one pair of coefficients for all modules.
        missing: ``error``, ``renormalize`` or ``zero``, for a module that a client lacks.
        residual: also keep what the pair leaves out, in ``.residual``.
        anchor_previous: estimate the step from the last round's result (``anchor``), from the second round on.
        align_previous: rotate the result to the last round's (``align_to``, als and svd only), from the second round
            on, so that the clients' optimizer state stays meaningful.
        backend: ``auto``, ``triton`` or ``torch``.

    Attributes:
        report: of the last round, or None.
        residual: Adapter of the last round's residual, or None.
        previous: the last round's result, or None; set it to start from a given global adapter.

    Raises:
        ValueError: ``method`` is not one of these, or cannot be aligned.
    """

    def __init__(
        self,
        method: str = "als",
        rank: int | None = None,
        *,
        shared: bool = False,
        missing: str = "error",
        residual: bool = False,
        anchor_previous: bool = False,
        align_previous: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if method not in flora_na.METHODS:
            raise ValueError(f"method: expected one of {', '.join(flora_na.METHODS)}, got {method!r}")
        if align_previous and method not in ALIGNED:
            raise ValueError(f"align_previous: only {' and '.join(ALIGNED)} can be aligned, not {method!r}")
        self.method, self.rank, self.shared, self.missing = method, rank, shared, missing
        self.keeps_residual, self.backend = residual, backend
        self.anchor_previous, self.align_previous = anchor_previous, align_previous
        self.report: Report | None = None
        self.residual: Adapter | None = None
        self.previous: Adapter | None = None

    def forward(
        self,
        adapters: Sequence[AdapterLike],
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> Adapter:
        """Aggregate one round.

        Args:
            adapters: one Adapter, or mapping module name -> LoraLayer, per client of this round.
            weights: one per client (its sample count); uniform by default.
            names: the clients' labels in errors and in the report.

        Returns:
            The global adapter, every layer with scaling 1.

        Raises:
            ValueError: as ``flora_na.aggregate``; the state is then as before.
        """
        result = flora_na.aggregate(
            adapters,
            weights,
            method=self.method,
            rank=self.rank,
            shared=self.shared,
            anchor=self.previous if self.anchor_previous else None,
            align_to=self.previous if self.align_previous else None,
            missing=self.missing,
            residual=self.keeps_residual,
            backend=self.backend,
            names=names,
        )
        self.report, self.residual, self.previous = result.report, result.residual, result.adapter
        return result.adapter

    def get_extra_state(self) -> dict[str, Any]:
        """The last round's layers and extras, as tensors and numbers."""
        if self.previous is None:
            return {"layers": None}
        layers = {name: (layer.A, layer.B, layer.scaling) for name, layer in self.previous.modules.items()}
        return {"layers": layers, "extras": dict(self.previous.extras), "config": self.previous.config}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up from a checkpoint."""
        self.report, self.residual, self.previous = None, None, None
        if state["layers"] is not None:
            layers = {name: LoraLayer(A=A, B=B, scaling=s) for name, (A, B, s) in state["layers"].items()}
            self.previous = Adapter(layers, state["extras"], state["config"])

    def extra_repr(self) -> str:
        """The options, as ``print`` shows them."""
        options = ("method", "rank", "shared", "missing", "anchor_previous", "align_previous", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
