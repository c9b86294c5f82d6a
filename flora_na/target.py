"""One module's problem: which sum of products the estimate must come near to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from operator import attrgetter

import torch
from torch import Tensor

from fedgram.kernels import FLOATS

from .weights import real_numbers

DTYPES_NAMED = "floating point (float64, float32, bfloat16 or float16)"
_FACTS = attrgetter("shape"), attrgetter("dtype"), attrgetter("device"), attrgetter("layout")


@dataclass(frozen=True, eq=False)
class Target:
    """``dW = sum_u w_u s_u B_u A_u`` of one module (docs/math.md 1.1), with an optional anchor pair.

    The members are the clients and, last, the anchor with weight zero. A scaling ``s_u`` is split evenly over the
    two factors (``sqrt|s_u|`` each, the sign to B), so that every later formula reads as if all scalings were 1.

    Attributes:
        B: one (m, r_u) tensor per member.
        A: one (r_u, n) tensor per member, all factors of one dtype and on one device.
        weights: (members,) float64, clients sum to 1, the anchor 0.
        scalings: (members,) float64.
        anchored: whether the last member is the anchor.
        name: the module, for messages.
        clients: labels of the clients, for messages.
    """

    B: tuple[Tensor, ...]
    A: tuple[Tensor, ...]
    weights: Tensor
    scalings: Tensor
    anchored: bool
    name: str
    clients: tuple[str, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every member."""
        return tuple(b.shape[1] for b in self.B)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors and of the result."""
        return self.B[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the factors and of the result."""
        return self.B[0].device

    @cached_property
    def unscaled(self) -> bool:
        """Whether all scalings are 1."""
        return self.scalings.tolist() == [1.0] * len(self.B)

    @property
    def coefficients(self) -> Tensor:
        """(members,) float64: ``w_u s_u``."""
        return self.weights * self.scalings

    @property
    def scale_A(self) -> Tensor:
        """(members,) float64: what each A_u is multiplied by, ``sqrt|s_u|``."""
        return self.scalings.abs().sqrt()

    @property
    def scale_B(self) -> Tensor:
        """(members,) float64: what each B_u is multiplied by, ``sign(s_u) sqrt|s_u|``."""
        return self.scalings.sign() * self.scale_A

    def label(self, member: int) -> str:
        """How a message names the member."""
        return "the anchor" if self.anchored and member == len(self.B) - 1 else self.clients[member]


def make_target(
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    weights: Tensor,
    scalings: Sequence[float] | Tensor | None = None,
    clients: Sequence[str] | None = None,
    *,
    anchor: tuple[Tensor, Tensor] | None = None,
    anchor_scaling: float = 1.0,
    name: str = "the module",
) -> Target:
    """Check the factors of one module and put them together.

    Raises:
        ValueError: numbers of factors differ, shapes do not fit, dtypes are not floating point, devices differ,
            scalings are not finite; the message names the module and the client.
    """
    labels = tuple(clients) if clients is not None else tuple(f"client {u}" for u in range(len(B)))
    check_counts(B, A, given := scaling_numbers(scalings, len(B)), name)
    for u, value in enumerate(given):
        if not abs(value) < float("inf"):
            raise ValueError(f"{name}: the scaling of {labels[u]} is {value}")
    s = _vector(given)
    if anchor is not None:
        B, A, labels = [*B, anchor[0]], [*A, anchor[1]], (*labels, "the anchor")
        s = torch.cat([s, s.new_tensor([anchor_scaling])])
        weights = torch.cat([weights, weights.new_zeros(1)])
    _check_factors(B, A, name, labels)
    dtype = reduce(torch.promote_types, {t.dtype for t in (*B, *A)})
    return Target(
        tuple(_plain(b, dtype) for b in B),
        tuple(_plain(a, dtype) for a in A),
        weights,
        s,
        anchor is not None,
        name,
        labels,
    )


def check_counts(B: Sequence[Tensor], A: Sequence[Tensor], scalings: Sequence[float], name: str = "the module") -> None:
    """Raise ValueError unless there are as many factors B as A and as scalings."""
    if len(B) != len(A):
        raise ValueError(f"{name}: {len(B)} factors B but {len(A)} factors A")
    if len(scalings) != len(B):
        raise ValueError(f"{name}: expected {len(B)} scalings (one per client), got {len(scalings)}")


def scaling_numbers(scalings: Sequence[float] | Tensor | None, count: int) -> tuple[float, ...]:
    """The scalings as numbers, ``count`` ones for None; ValueError where they are none."""
    if scalings is None:
        return (1.0,) * count
    if not isinstance(scalings, Tensor) and all(type(s) is float for s in scalings):  # as the layers have them
        return tuple(scalings)
    return tuple(real_numbers("scalings", scalings).tolist())


@lru_cache(maxsize=64)
def _vector(numbers: tuple[float, ...]) -> Tensor:
    """float64; most modules share one, which is not to be written to."""
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _plain(t: Tensor, dtype: torch.dtype) -> Tensor:
    if t.requires_grad:
        t = t.detach()
    return t if t.dtype == dtype else t.to(dtype)


def _check_factors(B: Sequence[Tensor], A: Sequence[Tensor], name: str, labels: Sequence[str]) -> None:
    for kind in set(map(type, (*B, *A))):
        if not issubclass(kind, Tensor):
            raise ValueError(f"{name}: a factor is a {kind.__name__}: expected a torch.Tensor")
    if B[0].device.type == "meta":
        raise ValueError(f"{name}: the factors are on the meta device, where there are no numbers")
    if _alike(B) and _alike(A):
        B, A = B[:1], A[:1]  # what holds for one pair holds for all
    m, n, device = B[0].shape[0] if B[0].ndim else -1, A[0].shape[-1] if A[0].ndim else -1, B[0].device
    for b, a, label in zip(B, A, labels, strict=False):
        fits = b.ndim == a.ndim == 2 and b.shape == (m, a.shape[0]) and a.shape[1] == n
        dense = b.layout == a.layout == torch.strided
        if fits and dense and {b.dtype, a.dtype} <= FLOATS and b.device == a.device == device:
            continue
        shapes = f"{name}: {label} has B {tuple(b.shape)} and A {tuple(a.shape)}"
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise ValueError(f"{shapes}: expected (m, r) and (r, n)")
        if (b.shape[0], a.shape[1]) != (m, n):
            raise ValueError(f"{shapes}: an update of {b.shape[0]} x {a.shape[1]} where {labels[0]} has {m} x {n}")
        if b.dtype not in FLOATS or a.dtype not in FLOATS:
            raise ValueError(f"{name}: {label} has dtypes {b.dtype} and {a.dtype}: expected {DTYPES_NAMED}")
        if not dense:
            raise ValueError(f"{name}: {label} has factors of layout {b.layout} and {a.layout}: expected dense ones")
        if b.device != device or a.device != device:
            raise ValueError(f"{name}: {label} is on {b.device} and {a.device}, {labels[0]} on {device}")


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all have one shape, dtype, device and layout."""
    count = len(tensors)
    return all(facts.count(facts[0]) == count for facts in (list(map(of, tensors)) for of in _FACTS))
