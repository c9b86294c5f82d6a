"""The dual of gradient matching at several K: exact here, by cone programs and by gradient loops elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedgram import stamp

from .peers import conic, softmax_sgd
from .reference import dual_objective, matching_excess
from .registry import Build, Case, Contender, Size, Target, entry, with_peers
from .workloads import task_gramian

C = 0.25
CONIC = 1e-2  # interior points stop at 1e-8 of the largest numbers, which may be 1e-3 of the optimum
TYPICAL_SECONDS = {8: 0.005, 128: 0.02, 512: 0.05}


def _build(K: int) -> Build:
    def build(size: Size, device: torch.device) -> Case:
        """One matrix, on the CPU."""
        n = K if size != "tiny" else min(K, 6)
        G = task_gramian(n)
        upper = dual_objective(stamp.solve_dual(G, C).weights, G, C)

        def excess(result: Any) -> float:
            v = result.coefficients if isinstance(result, stamp.Dual) else result
            return matching_excess(v, G, upper, C)

        def sgd() -> Tensor:
            return softmax_sgd.coefficients(softmax_sgd.softmax_weights(G, C), G, C)

        def torchjd() -> Contender:
            return Contender(conic.TORCHJD, partial(conic.torchjd_cagrad(C), G), "peer", CONIC, slow=n > 200)

        def cvxpy() -> Contender:
            return Contender(conic.CVXPY, partial(conic.cvxpy_solver(C), G), "peer", CONIC, slow=n > 200)

        loop = Contender("100 softmax-SGD steps", sgd, "peer", float("inf"))
        # the gap that a result must certify, and room for the rounding of the check itself
        ours = Contender("solve_dual", partial(stamp.solve_dual, G, C), "ours", 2e-9)
        contenders, missing = with_peers([ours, loop], cvxpy, torchjd)
        targets = (Target("seconds", TYPICAL_SECONDS[K]),)
        return Case(f"K={n}, float64", contenders, excess, "below the optimum", None, targets, missing)

    return build


for _K in TYPICAL_SECONDS:
    entry(f"solve_dual-{_K}", "stamp")(_build(_K))
