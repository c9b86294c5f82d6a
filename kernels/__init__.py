"""Operations on the big tensors: each a public function with a torch twin and, where it pays, a Triton kernel.

A file ``OP.py`` holds an operation: its checks, its torch twin, what ``torch.compile`` sees of it; ``_dispatch`` says
which way it runs. Beside it, for the Triton way, ``_OP_triton`` holds the kernels with the configurations that are
compiled ahead of time, and ``_OP_plan`` or ``_OP_launch`` what is worked out once per layout: work lists, a row per
program, and the place of every address. What they share:

- all operations: ``_plan`` (layouts, the cache of plans, tables of addresses, streams and graphs), ``_triton_common``,
  ``_triton_split``, ``_memory``, ``_floats``;
- on the clients' factors (``factor_*``, ``lowrank_*``, and both in one read: ``gram_combine``, ``combine_products``):
  ``_factor_inputs``, ``_factor_plan``; checked for many calls ``_prepared``, for one computation ``_described``;
- on gradients (``grad_*``, and ``ghost_gram`` without them): ``_grad_inputs``, ``_grad_work``, ``_offsets``;
- on rows of classes: ``subset_select`` with ``_subset_swaps``.

On a CPU the compiled loops run: ``native/`` in C, called by ``native_calls`` from ``_native_factors``, which takes
factors as ``_stacks`` describes them, ``_native_sums`` and ``_native_gradients``.
"""

from ._described import Described, described
from ._dispatch import BACKENDS
from ._floats import FLOATS
from ._plan import moved
from ._prepared import FactorSlab, PreparedFactors, PreparedSide, prepare
from .combine_products import combine_products
from .factor_combine import factor_combine
from .factor_cross import factor_cross
from .factor_gram import factor_gram
from .factor_traces import factor_traces
from .factor_triangle import factor_triangle
from .ghost_gram import ghost_gram
from .grad_combine import grad_combine
from .grad_gram import GradGram, grad_gram
from .gram_combine import gram_combine
from .lowrank_norm import lowrank_norm
from .lowrank_sum import lowrank_sum
from .native_calls import spread_over_jobs
from .subset_select import SubsetSelection, subset_select

__all__ = [
    "BACKENDS",
    "FLOATS",
    "Described",
    "FactorSlab",
    "GradGram",
    "PreparedFactors",
    "PreparedSide",
    "SubsetSelection",
    "combine_products",
    "described",
    "factor_combine",
    "factor_cross",
    "factor_gram",
    "factor_traces",
    "factor_triangle",
    "ghost_gram",
    "grad_combine",
    "grad_gram",
    "gram_combine",
    "lowrank_norm",
    "lowrank_sum",
    "moved",
    "prepare",
    "spread_over_jobs",
    "subset_select",
]
