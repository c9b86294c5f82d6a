"""Checks shared by the factor operations, and a module's stacked factors as blocks that fit the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._floats import FLOATS

Factors = Sequence[Sequence[Tensor]]
Pairs = tuple[list[Tensor], list[Tensor]]  # of every module a matrix of B's side, and one of A's
CACHE_BYTES = 1 << 20  # one float64 block: an L2 cache of today's servers
CACHE_BYTES_GPU = 1 << 26  # enough to fill a GPU, small beside its memory


def check_factors(B: Factors | None, A: Factors | None) -> None:
    """Raise ValueError, naming the tensor, unless ``B[l][u]`` (m_l, r_lu) and ``A[l][u]`` (r_lu, n_l) fit together."""
    if B is None and A is None:
        raise ValueError("B and A are both None: nothing to do")
    tracing = torch.compiler.is_compiling()
    for name, factors, shared in (("B", B, 0), ("A", A, 1)):
        for l, clients in enumerate(factors or ()):
            if isinstance(clients, Tensor) or not len(clients):
                raise ValueError(f"{name}[{l}]: expected a sequence of at least one client's tensor")
            length = clients[0].shape[shared] if clients[0].ndim == 2 else None
            fits = [t.ndim == 2 and t.dtype in FLOATS and t.shape[shared] == length for t in clients]
            if all(fits) and (tracing or not any(map(Tensor.is_neg, clients))):
                continue
            for u, t in enumerate(clients):
                if t.ndim != 2 or t.dtype not in FLOATS:
                    raise ValueError(f"{name}[{l}][{u}]: expected a float matrix, got {tuple(t.shape)} {t.dtype}")
                if t.shape[shared] != length:
                    raise ValueError(
                        f"{name}[{l}][{u}]: dimension {shared} is {t.shape[shared]}, client 0 has {length}"
                    )
                if t.is_neg():  # loops and kernels read memory
                    raise ValueError(f"{name}[{l}][{u}]: a view that negates its memory; pass its resolve_neg()")
    if B is not None and A is not None:
        _check_pairs(B, A)


def _check_pairs(B: Factors, A: Factors) -> None:
    if len(B) != len(A):
        raise ValueError(f"A: {len(A)} modules, B has {len(B)}")
    for l, (bs, as_) in enumerate(zip(B, A, strict=True)):
        if len(bs) != len(as_):
            raise ValueError(f"A[{l}]: {len(as_)} clients, B[{l}] has {len(bs)}")
        if [b.shape[1] for b in bs] == [a.shape[0] for a in as_]:
            continue
        for u, (b, a) in enumerate(zip(bs, as_, strict=True)):
            if b.shape[1] != a.shape[0]:
                raise ValueError(f"A[{l}][{u}]: rank {a.shape[0]}, B[{l}][{u}] has rank {b.shape[1]}")


def flat(*sides: Factors | Sequence[Tensor] | None) -> list[Tensor]:
    """All tensors of the given sides in one list."""
    out: list[Tensor] = []
    for side in sides:
        for item in () if side is None else side:
            if isinstance(item, Tensor):
                out.append(item)
            else:
                out.extend(item)
    return out


def stored(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    """The tensors as their memory reads: copied where one is a view that negates it (``z.conj().imag`` is one)."""
    return None if tensors is None else [t.resolve_neg() for t in tensors]


def counts(side: Factors | None) -> list[int]:
    """The number of clients of every module; empty for a skipped side."""
    return [] if side is None else [len(clients) for clients in side]


def nest(tensors: Sequence[Tensor], clients: Sequence[int]) -> list[list[Tensor]]:
    """Undo ``flat`` for one side of ``clients[l]`` tensors in module ``l``."""
    rest = iter(tensors)
    return [[next(rest) for _ in range(n)] for n in clients]


def cut(matrices: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The matrices of these shapes that lie one after the other in a flat tensor."""
    parts = matrices.split([rows * columns for rows, columns in shapes]) if shapes else ()
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def mixed_types(factors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take factors of one module, or None: they read one type."""
    types = {t.dtype for t in factors}
    if len(types) <= 1:
        return None
    return (
        f"the clients' factors have several types ({', '.join(sorted(map(str, types)))}); the Triton kernels read one"
    )


def module_of_mixed_types(*sides: Factors | None) -> str | None:
    """The same of many modules, where a side may have another type than the other: the first that they cannot take."""
    for side in sides:
        for l, clients in enumerate(side or ()):
            if (reason := mixed_types(clients)) is not None:
                return f"module {l}: {reason}"
    return None


@dataclass(frozen=True)
class TallColumns:
    """One module's factors of one side as the columns of a tall matrix (length, R), never concatenated.

    ``columns[u]`` is ``B_u``, or the view ``A_u^T``: with it one implementation serves both sides.
    """

    columns: tuple[Tensor, ...]
    length: int
    width: int
    wide: bool  # the long dimension is the contiguous one (the A side): buffers follow, so that copies run straight

    @staticmethod
    def of(columns: Sequence[Tensor]) -> TallColumns:
        """Wrap tall columns (length, r_u)."""
        wide = sum(t.stride(0) == 1 and t.stride(1) != 1 for t in columns) * 2 > len(columns)
        return TallColumns(tuple(columns), columns[0].shape[0], sum(t.shape[1] for t in columns), wide)

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.columns[0].device

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A tall matrix (rows, columns) in the memory order of this stack."""
        if self.wide:
            return torch.empty(columns, rows, dtype=dtype, device=self.device).T
        return torch.empty(rows, columns, dtype=dtype, device=self.device)

    def rows_per_block(self) -> int:
        """Rows of a float64 block that fits the cache; never so few that calls cost more than arithmetic."""
        cache = CACHE_BYTES if self.device.type == "cpu" else CACHE_BYTES_GPU
        return max(128, cache // (8 * max(self.width, 1)))

    def blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ``(start, stop, block)``: rows ``start:stop`` of the stack as ``dtype``, in one reused buffer."""
        if not self.width:
            return
        step = min(self.rows_per_block(), self.length)
        buffer = self.empty(step, self.width, dtype)
        narrow = self.columns[0].dtype
        one_dtype = all(t.dtype == narrow for t in self.columns)
        staging = self.empty(step, self.width, narrow) if one_dtype and narrow != dtype else buffer
        for start in range(0, self.length, max(step, 1)):
            stop = min(start + step, self.length)
            rows = self.columns if step == self.length else [t[start:stop] for t in self.columns]
            # torch.cat copies fastest between equal types, so the widening is one more copy inside the cache
            part = staging[: stop - start]
            if self.wide:
                torch.cat([t.T for t in rows], 0, out=part.T)
            else:
                torch.cat(list(rows), 1, out=part)
            block = buffer[: stop - start]
            if staging is not buffer:
                block.copy_(part)
            yield start, stop, block


def tall_B(clients: Sequence[Tensor]) -> TallColumns:
    """The stack ``[B_1 .. B_U]`` (m, R)."""
    return TallColumns.of(clients)


def tall_A(clients: Sequence[Tensor]) -> TallColumns:
    """The stack ``[A_1; ..; A_U]^T`` (n, R)."""
    return TallColumns.of([t.T for t in clients])
