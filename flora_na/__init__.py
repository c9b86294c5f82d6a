"""FLoRA-NA (arXiv:2509.26399): one pair of LoRA factors nearest to the clients' weighted sum of products.

``estimate`` does one module, ``aggregate`` whole adapters, ``inspect`` compares the methods and the clients, and
``client_gramian`` gives the inner products of the clients' whole updates in weight space.
"""

from .aggregation import Aggregation, aggregate
from .als import AlternatingLeastSquares
from .estimation import Estimate, estimate
from .inner_products import client_gramian
from .inspection import Inspection, ModuleInspection, inspect
from .layer import Adapter, AdapterLike, LoraLayer
from .methods import METHODS
from .report import ModuleReport, Report
from .scalar import ScalarLeastSquares

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterLike",
    "Aggregation",
    "AlternatingLeastSquares",
    "Estimate",
    "Inspection",
    "LoraLayer",
    "ModuleInspection",
    "ModuleReport",
    "Report",
    "ScalarLeastSquares",
    "aggregate",
    "client_gramian",
    "estimate",
    "inspect",
]
