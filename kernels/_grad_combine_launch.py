"""Plans and launches of ``grad_combine`` on Triton."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import _grad_combine_triton as kernels
from ._grad_inputs import Gradients, check_gradients, flatten, memory_order
from ._grad_work import aligned_parameters, column_chunks, gathered
from ._plan import (
    AddressTable,
    PlanCache,
    addresses,
    alignments,
    check_runnable,
    describe,
    place,
    to_device,
)
from ._triton_common import interpret_flag, options
from .grad_combine import check_coefficients, check_out, outputs


class GradCombinePlan:
    """What depends on the layout alone: which parameters go through copies, and the work lists."""

    def __init__(self, gradients: Gradients, out: Sequence[Tensor], pointers: np.ndarray, device: torch.device) -> None:
        check_gradients(gradients)
        check_runnable(device)
        K, P = len(gradients), len(out)
        columns = [[*tensors] for tensors in zip(*gradients, out, strict=True)]
        self.copied = [p for p, tensors in enumerate(columns) if memory_order(tensors) is None]
        aligned = aligned_parameters([*gradients, out], pointers, self.copied)
        kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
        for p, tensors in enumerate(columns):
            kinds.setdefault((tensors[0].dtype, out[p].dtype, bool(aligned[p])), []).append(p)
        numels = tuple(t.numel() for t in out)
        lists = {kind: column_chunks(members, numels, kernels.BLOCK) for kind, members in kinds.items()}
        self.launches = [(kind, to_device(chunks, device)) for kind, chunks in lists.items() if len(chunks)]
        source = np.arange(K * P).reshape(K, P).T
        self.sources = AddressTable(source, np.zeros_like(source), device)
        self.targets = AddressTable(np.arange(P), np.zeros(P, dtype=np.int64), device)

    def run(self, gradients: Gradients, v: Tensor, out: Sequence[Tensor], pointers: np.ndarray) -> None:
        """Write the combination to ``out``; ``pointers`` are those of the gradients, then of the outputs."""
        copies = {p: torch.empty_like(out[p], memory_format=torch.contiguous_format) for p in self.copied}
        if copies:
            gradients = gathered(gradients, self.copied)
            pointers = addresses([*flatten(gradients), *(copies.get(p, t) for p, t in enumerate(out))])
        K, P = len(gradients), len(out)
        sources, targets = self.sources.of(pointers[: K * P]), self.targets.of(pointers[K * P :])
        for kind, chunks in self.launches:
            kernels.grad_combine_kernel[(len(chunks),)](
                sources, targets, chunks, v, 0, K, **kernels.configuration(*kind), MANY=False,
                INTERPRET=interpret_flag(), **options(4, 2),
            )  # fmt: skip
        with torch.no_grad():  # an output may be a parameter
            for p, copy in copies.items():
                out[p].copy_(copy)


PLANS: PlanCache[GradCombinePlan] = PlanCache()


def combine_triton(gradients: Gradients, coefficients: Tensor, out: Sequence[Tensor] | None) -> list[Tensor]:
    """``grad_combine``; the gradients are checked when their layout is new."""
    given = flatten(gradients)
    device = given[0].device
    if out is not None:
        check_out(out, [t.shape for t in gradients[0]], device)
    v = check_coefficients(coefficients, len(gradients), device)
    targets = outputs(gradients, out)
    tensors = [*given, *targets]
    pointers = addresses(tensors)
    key = (place(device), tuple(len(g) for g in gradients), describe(tensors), alignments(pointers))
    plan = PLANS.get(key, lambda: GradCombinePlan(gradients, targets, pointers, device))
    plan.run(gradients, v, targets, pointers)
    if out is not None:
        torch.autograd.graph.increment_version(targets)  # as every write of torch does: autograd must see it
    return targets
