"""What clients send: LoRA layers and adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor


def is_finite_number(value: object) -> bool:
    """Whether ``value`` is a number that a float holds."""
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):  # no number, or an integer beyond floats
        return False


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One adapted module of one client: the update ``scaling * B @ A``.

    Attributes:
        A: lora_A, shape (r, n), floating point.
        B: lora_B, shape (m, r), same dtype and device as ``A``.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Raises:
        ValueError: the shapes do not make a product, dtypes or devices differ, or the scaling is not finite.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.A, Tensor) and isinstance(self.B, Tensor)):
            raise ValueError(
                f"lora_A and lora_B: expected tensors, got {type(self.A).__name__}, {type(self.B).__name__}"
            )
        for name, t in (("lora_A", self.A), ("lora_B", self.B)):
            if hasattr(t, "__tensor_flatten__"):  # made of other tensors
                raise ValueError(
                    f"{name} is a {type(t).__name__}: expected a plain tensor (of a DTensor, its full_tensor())"
                )
        if self.A.ndim != 2 or self.B.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            shapes = f"lora_B {tuple(self.B.shape)} and lora_A {tuple(self.A.shape)}"
            raise ValueError(f"{shapes} do not multiply: expected (m, r) and (r, n)")
        if self.A.dtype != self.B.dtype or not self.A.dtype.is_floating_point:
            raise ValueError(
                f"lora_A is {self.A.dtype} and lora_B is {self.B.dtype}: expected one floating-point dtype"
            )
        if self.A.device != self.B.device:
            raise ValueError(f"lora_A is on {self.A.device} and lora_B on {self.B.device}")
        if not is_finite_number(self.scaling):
            raise ValueError(f"scaling: expected a finite number, got {self.scaling!r}")

    @property
    def rank(self) -> int:
        """The number of rows of lora_A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the weight that the update is added to."""
        return self.B.shape[0], self.A.shape[1]

    def trimmed(self) -> LoraLayer:
        """The layer without its last components that are zero on both sides: what pads a file to one rank."""
        used = ((self.A != 0).any(1) | (self.B != 0).any(0)).nonzero().flatten().tolist()
        rank = max(used, default=0) + 1
        return self if rank >= self.rank else LoraLayer(A=self.A[:rank], B=self.B[:, :rank], scaling=self.scaling)

    def delta(self) -> Tensor:
        """The dense update ``scaling * B @ A``, shape (m, n), for small layers and tests."""
        return (self.B @ self.A) * self.scaling


@runtime_checkable
class MergingConfig(Protocol):
    """A configuration that knows which clients' updates can be added up, and what describes the result."""

    def merged(self, configs: Sequence[Mapping[str, Any] | None], names: Sequence[str]) -> Mapping[str, Any] | None:
        """The configuration of the result.

        Args:
            configs: of all clients, this one included; None of a client without configuration.
            names: the clients' labels, for messages.

        Raises:
            ValueError: names two clients that do not go together, and why.
        """
        ...


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole adapter of one client, or the global one.

    Attributes:
        modules: module name -> LoraLayer. May be a lazy mapping that reads a layer when it is asked for.
        extras: tensor name -> full tensor trained beside the factors (``modules_to_save``, biases); averaged by weight.
        config: the adapter's configuration as its file states it (for PEFT, ``adapter_config.json``), or None. One that
            is a ``MergingConfig`` is checked and merged with the other clients'; of others the first client's is the
            result's.
        roles: tensor name -> what an extra is, where it is not a trained state to be averaged (``mean``):
            ``update``, added to a base tensor (a LoRA bias, its scaling multiplied in), so that a client without it
            can count as zero; ``frozen``, a base tensor that nobody trains, which must be the same in all clients.
    """

    modules: Mapping[str, LoraLayer]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


AdapterLike: TypeAlias = Adapter | Mapping[str, LoraLayer]


def as_adapter(adapter: AdapterLike, owner: str = "the adapter") -> Adapter:
    """Return ``adapter`` itself, or a plain mapping of layers wrapped as an Adapter.

    Raises:
        ValueError: it is neither; the message names the owner.
    """
    if isinstance(adapter, Adapter):
        return adapter
    if not isinstance(adapter, Mapping):
        kind = type(adapter).__name__
        raise ValueError(f"{owner}: expected an Adapter, or a mapping from module names to LoraLayers, got a {kind}")
    return Adapter(modules=adapter)
