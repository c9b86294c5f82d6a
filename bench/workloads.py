"""Seeded inputs of stated sizes: clients' factors, whole adapters, gradients with a common part, Gram matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgram.flora_na import LoraLayer


@dataclass(frozen=True)
class Lora:
    """Sizes of a set of clients' adapters: ``modules`` of (m, n), all of rank ``rank``."""

    modules: int
    clients: int
    m: int
    n: int
    rank: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        many = f"{self.modules} x " if self.modules > 1 else ""
        return f"U={self.clients}, {many}{self.m} x {self.n}, r={self.rank}, {name_of(self.dtype)}"

    @property
    def bytes(self) -> int:
        """Of all clients' factors."""
        return self.modules * self.clients * (self.m + self.n) * self.rank * self.dtype.itemsize

    @property
    def total_rank(self) -> int:
        """R, the stacked rank of one module."""
        return self.clients * self.rank


# RoBERTa-large, query and value, rank 8, 10 clients; and what of a 7B Llama (all linear layers, rank 16, 100 clients)
# fits any machine: one layer's shapes are all alike here, its sizes are those of the attention.
W1 = Lora(48, 10, 1024, 1024, 8)
W2_MODULE = Lora(1, 100, 4096, 4096, 16, torch.bfloat16)
TINY = Lora(2, 3, 24, 20, 2)
LLAMA_BLOCK = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
"""(m, n) of the linear layers of one of the 32 blocks of a 7B Llama."""


def name_of(dtype: torch.dtype) -> str:
    """``float32`` as ``fp32``, ``bfloat16`` as ``bf16``."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def factors(
    size: Lora, device: torch.device, *, own: float = 1.5, seed: int = 0
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """``B[l][u]`` (m, r) and ``A[l][u]`` (r, n): clients that drifted from a common start by a part of their own.

    With ``own`` at 1.5 averaged factors miss about half of the update, more than after a round from a shared start and
    less than between adapters trained apart.
    """
    random = torch.Generator().manual_seed(seed)
    B: list[list[Tensor]] = []
    A: list[list[Tensor]] = []
    for _ in range(size.modules):
        for side, shape in ((B, (size.m, size.rank)), (A, (size.rank, size.n))):
            common = torch.randn(shape, generator=random)
            drifted = [common + own * torch.randn(shape, generator=random) for _ in range(size.clients)]
            side.append([(x / math.sqrt(max(shape))).to(device, size.dtype) for x in drifted])
    return B, A


def adapters(size: Lora, device: torch.device, *, seed: int = 0) -> list[dict[str, LoraLayer]]:
    """The same factors as one mapping of layers per client."""
    B, A = factors(size, device, seed=seed)
    return [{f"layer{l}": LoraLayer(A=A[l][u], B=B[l][u]) for l in range(size.modules)} for u in range(size.clients)]


def sample_weights(clients: int) -> Tensor:
    """Client weights as sample counts give them: falling as 1/u, sum 1, float64."""
    w = 1 / torch.arange(1, clients + 1, dtype=torch.float64)
    return w / w.sum()


def parameter_shapes(d: int) -> list[tuple[int, ...]]:
    """Shapes of a network of d parameters: matrices, and the small vectors between them."""
    width = max(2, math.isqrt(d // 6))
    shapes: list[tuple[int, ...]] = []
    left = d
    while left >= width * width + 2 * width:
        shapes += [(width, width), (width,), (width,)]
        left -= width * width + 2 * width
    return shapes + ([(left,)] if left else [])


def gradients(
    K: int, d: int, device: torch.device, *, dtype: torch.dtype = torch.float32, spread: float = 0.5, seed: int = 0
) -> list[list[Tensor]]:
    """K lists of parameter tensors, d numbers in each: a common part and one of its own, ``spread`` times as large."""
    random = torch.Generator(device=device).manual_seed(seed)
    shapes = parameter_shapes(d)
    common = [torch.randn(s, generator=random, device=device) for s in shapes]
    return [
        [(c + spread * (1 + k % 5) * torch.randn(c.shape, generator=random, device=device)).to(dtype) for c in common]
        for k in range(K)
    ]


def task_gramian(K: int, *, seed: int = 0) -> Tensor:
    """(K, K) float64 Gram matrix of conflicting tasks: 2 K random directions, norms over two decades, a common part."""
    random = torch.Generator().manual_seed(seed)
    X = torch.randn(K, 2 * K, dtype=torch.float64, generator=random)
    X += 0.5 * torch.randn(2 * K, dtype=torch.float64, generator=random)
    X *= 10 ** torch.linspace(-1, 1, K, dtype=torch.float64)[torch.randperm(K, generator=random)].unsqueeze(1)
    return X @ X.T


def layer_rows(tasks: int, rows: int, p: int, q: int, device: torch.device, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (rows, p) and output gradients (rows, q) of a linear layer; rows divide evenly over the tasks."""
    random = torch.Generator(device=device).manual_seed(seed)
    a = torch.randn(rows, p, generator=random, device=device)
    d = torch.randn(rows, q, generator=random, device=device)
    task = torch.arange(rows, device=device) * tasks // rows
    own = torch.randn(tasks, q, generator=random, device=device)
    return a, d + own[task]


def even_offsets(tasks: int, rows: int) -> list[int]:
    """Boundaries of ``rows`` rows in equal tasks."""
    return [-(-k * rows // tasks) for k in range(tasks + 1)]


def clustered_samples(classes: int, per_class: int, p: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples of classes with a few clusters each, (N, p), and their labels."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 4, p, generator=random) * 2
    X, y = [], []
    for label in range(classes):
        which = torch.randint(4, (per_class,), generator=random)
        X.append(centres[label][which] + torch.randn(per_class, p, generator=random))
        y.append(torch.full((per_class,), label))
    return torch.cat(X), torch.cat(y)
