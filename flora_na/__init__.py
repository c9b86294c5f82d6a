"""FLoRA-NA (arXiv:2509.26399): one pair of LoRA factors nearest to the clients' weighted sum of products.

``estimate`` does one module, ``aggregate`` whole adapters, ``estimate_modules`` many modules on a device without
making the host wait, ``inspect`` compares the methods and the clients, and
``client_gramian`` gives the inner products of the clients' whole updates in weight space.

The files, in the order to read them:

- the problem: ``layer`` (what clients send), ``weights``, ``cohort`` (which clients have which module), ``target``
  (the ``dW`` of one module), ``finite``, ``parts`` (of full tensors);
- its Grams: ``members``, ``group`` (modules of equal ranks, and what estimators see of them), ``grouping`` (the one
  read that makes them), ``energies`` (``||dW||^2``, and what rounding hides), ``coefficients`` (pairs, small algebra);
- the estimators, each from the one below (``methods``): ``fedavg``; ``scalar``, which is ``flora-na``
  (``_scalar_problem`` on ``pair_products``, ``_scalar_newton``); ``als``; ``svd`` (``krylov`` without Grams);
  ``stack``; with ``rank_choice`` and ``gauge``. Compiled twins: ``_scalar_solver``, ``_block_solver``,
  ``_spectrum_solver`` (``_compiled``, ``native/``);
- the solution and its evidence: ``combination`` (the factors), ``divergence`` (rho), ``yardsticks``, ``estimation``;
- whole adapters: ``portions``, ``aggregation``, ``per_client``, ``streamed`` (``_read_ahead``, ``_in_order``),
  ``report``;
- the clients compared: ``inner_products``, ``weight_space``, ``screening``; ``inspection`` makes a ``diagnosis``
  (``rank_collapse``);
- all modules at once on a device: ``batched`` (``_batched_group``, ``_batched_solvers``, ``_batched_algebra``).
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
