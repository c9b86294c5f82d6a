"""Operations on the big tensors: each a public function with a torch twin and, where it pays, a Triton kernel."""

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
