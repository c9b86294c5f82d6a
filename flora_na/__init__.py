"""FLoRA-NA (arXiv:2509.26399): one pair of LoRA factors nearest to the clients' weighted sum of products.

``estimate`` does one module, ``aggregate`` whole adapters, ``estimate_modules`` many modules on a device without
making the host wait, ``inspect`` compares the methods and the clients, and
``client_gramian`` gives the inner products of the clients' whole updates in weight space.
"""

from .aggregation import Aggregation, aggregate
from .als import AlternatingLeastSquares
from .batched import BatchedEstimate, estimate_modules
from .diagnosis import Inspection, ModuleInspection
from .estimation import Estimate, estimate
from .inner_products import client_gramian
from .inspection import inspect
from .layer import Adapter, AdapterLike, LoraLayer
from .methods import METHODS
from .per_client import aggregate_for_clients
from .rank_collapse import RankCollapse
from .report import ModuleReport, Report
from .scalar import ScalarLeastSquares
from .screening import Screening
from .streamed import iter_aggregate

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterLike",
    "Aggregation",
    "AlternatingLeastSquares",
    "BatchedEstimate",
    "Estimate",
    "Inspection",
    "LoraLayer",
    "ModuleInspection",
    "ModuleReport",
    "RankCollapse",
    "Report",
    "ScalarLeastSquares",
    "Screening",
    "aggregate",
    "aggregate_for_clients",
    "client_gramian",
    "estimate",
    "estimate_modules",
    "inspect",
    "iter_aggregate",
]
