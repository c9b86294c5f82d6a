"""``factor_combine`` with one scalar per client, where all clients' factors have one shape: a sum of whole tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import _grad_combine_triton as kernels
from ._factor_combine_plan import ALIGN
from ._grad_work import column_chunks
from ._plan import WIDEST, AddressTable, to_device
from ._triton_common import interpret_flag, options


def is_sum(clients: Sequence[Tensor], coefficients: Tensor) -> bool:
    """Whether a module's combination is a weighted sum of tensors that lie alike in memory."""
    first = clients[0].shape
    return coefficients.ndim == 1 and all(t.shape == first and t.is_contiguous() for t in clients)


class ScalarPlan:
    """Everything a call needs beside the addresses: the kernel of ``grad_combine``, with scalars of each module."""

    def __init__(self, sides: Sequence[Sequence[Tensor]], dtypes: Sequence[torch.dtype], pointers: np.ndarray) -> None:
        self.device = sides[0][0].device
        self.sizes: dict[torch.dtype, int] = defaultdict(int)
        self.outputs: list[tuple[torch.dtype, int, torch.Size]] = []
        kinds: dict[tuple, list[tuple[int, int]]] = defaultdict(list)  # (module, its first tensor)
        first = 0
        for l, (clients, dtype) in enumerate(zip(sides, dtypes, strict=True)):
            self.outputs.append((dtype, self.sizes[dtype], clients[0].shape))
            self.sizes[dtype] += -(-clients[0].numel() // ALIGN) * ALIGN
            aligned = bool((pointers[first : first + len(clients)] % WIDEST == 0).all())
            kinds[clients[0].dtype, dtype, aligned, len(clients)].append((l, first))
            first += len(clients)
        self.launches = [self._launch(kind, members) for kind, members in kinds.items()]
        self.launches = [launch for launch in self.launches if len(launch[-1])]

    def _launch(self, kind: tuple, members: Sequence[tuple[int, int]]) -> tuple:
        """The kind, tables of sources, coefficients and offsets, and the chunks, of modules alike in all but size."""
        modules, firsts = np.array(members, np.int64).T
        source = firsts[:, None] + np.arange(kind[3])
        offsets = np.array([self.outputs[l][1] * kind[1].itemsize for l in modules], np.int64)
        numels = tuple(self.outputs[l][2].numel() for l in modules)
        chunks = column_chunks(list(range(len(modules))), numels, kernels.BLOCK)
        sources, scalars = (AddressTable(a, np.zeros_like(a), self.device) for a in (source, modules))
        return kind, sources, scalars, *(to_device(a, self.device) for a in (offsets, chunks))

    def combine(self, pointers: np.ndarray, coefficients: np.ndarray) -> list[Tensor]:
        """The outputs, for factors at ``pointers`` and scalars at ``coefficients``."""
        buffers = {t: torch.empty(n, dtype=t, device=self.device) for t, n in self.sizes.items()}
        for (dtype, out, aligned, clients), sources, scalars, offsets, chunks in self.launches:
            kernels.grad_combine_kernel[(len(chunks),)](
                sources.of(pointers), offsets, chunks, scalars.of(coefficients), buffers[out].data_ptr(), clients,
                **kernels.configuration(dtype, out, aligned), MANY=True, INTERPRET=interpret_flag(), **options(4, 2),
            )  # fmt: skip
        return [buffers[t][o : o + shape.numel()].view(shape) for t, o, shape in self.outputs]
