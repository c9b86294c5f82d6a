"""Factors checked and described once, for the operations of one computation on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from ._dispatch import resolve
from ._factor_inputs import Factors, check_factors, flat
from ._memory import check_memory
from ._prepared import PreparedSide, first
from ._stacks import RANK, WIDTH, Stacks


class Described:
    """``B`` and ``A``, to be passed wherever an operation takes factors. See ``described``."""

    def __init__(self, B: Factors, A: Factors) -> None:
        self.B, self.A = B, A

    def pick(self, modules: Sequence[int]) -> Described:
        """Some of the modules."""
        if list(modules) == list(range(len(self.B))):
            return self
        return Described(*(_pick(side, modules) for side in (self.B, self.A)))

    @staticmethod
    def joined(parts: Sequence[Described]) -> Described:
        """The modules of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Described(_joined([part.B for part in parts]), _joined([part.A for part in parts]))


def described(B: Factors, A: Factors) -> Described:
    """Check factors, and for the compiled loops describe them, once for several operations of one computation.

    The lighter sister of ``prepare``: nothing looks later whether a tensor's memory has moved, so the caller keeps the
    tensors as they are (their numbers may change) while it uses the result. On GPUs, where plans are cached, and where
    there are no compiled loops nothing happens here: the operations check as ever.

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``; any float type, any strides.
        A: ``A[l][u]`` (r_lu, n_l).

    Raises:
        ValueError: shapes, types or devices do not fit together; the message names the tensor.
    """
    if resolve("auto", first(B, A), native=True) != "native":
        return Described(B, A)
    left, right = stacks_of(B, A)
    assert left is not None
    assert right is not None
    return Described(left, right)


def stacks_of(B: Factors | None, A: Factors | None) -> tuple[Stacks | None, Stacks | None]:
    """Both sides for the compiled loops: described here, or as they were described before.

    Raises:
        ValueError: as ``described``.
    """
    if B is None and A is None:
        check_factors(B, A)
    left, right = (None if side is None else _stacks(side, turned) for side, turned in ((B, False), (A, True)))
    if left is not None and right is not None and not _fit(left, right):
        check_factors(B, A)
    if not all(side.on_cpu for side in (left, right) if side is not None):
        resolve("torch", flat(B, A))
    return left, right


def check_beside(others: Sequence[Tensor], B: Factors | None, A: Factors | None) -> None:
    """Raise ValueError unless other tensors lie on the CPU like the factors, and in memory."""
    if not all(t.is_cpu for t in others):
        resolve("torch", [*flat(B, A), *others])
    if not all(map(Tensor.data_ptr, others)):
        check_memory(others)


def _stacks(side: Factors, transposed: bool) -> Stacks:
    if isinstance(side, Stacks) and side.transposed == transposed:
        return side
    if isinstance(side, PreparedSide):
        side.check()
        return side.stacks(transposed)
    return Stacks(side, transposed=transposed)


def _fit(B: Stacks, A: Stacks) -> bool:
    """Whether both have the same clients in every module, of the same ranks."""
    return B.counts == A.counts and B.table[RANK::WIDTH] == A.table[RANK::WIDTH]


def _pick(side: Factors, modules: Sequence[int]) -> Factors:
    return side.pick(modules) if isinstance(side, Stacks) else [side[l] for l in modules]


def _joined(sides: Sequence[Factors]) -> Factors:
    if all(isinstance(side, Stacks) for side in sides):
        return sides[0].joined(sides[1:])  # type: ignore[attr-defined, arg-type]
    return list(chain.from_iterable(sides))
