"""The names of Flower that the bindings use, imported once; what is missing is said with the line to install it.

Only names that Flower documents are used, and no private method, so nothing else is tied to one version.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import inspect
from importlib.metadata import PackageNotFoundError, version

NEEDED = "flwr>=1.41"
INSTALL = "pip install 'fedgram[flower]'"

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
except ImportError as error:
    try:
        found = f"flwr {version('flwr')} lacks {error.name or 'a name'} that is needed"
    except PackageNotFoundError:
        found = "the package flwr is not installed"
    raise ImportError(f"fedgram.bindings.flower needs {NEEDED}, and {found}: {INSTALL}") from error

_EXPECTED = {
    "__init__": {"weighted_by_key", "train_metrics_aggr_fn"},
    "configure_train": {"server_round", "arrays", "config", "grid"},
    "aggregate_train": {"server_round", "replies"},
}
for _method, _parameters in _EXPECTED.items():
    _lacking = _parameters - set(inspect.signature(getattr(FedAvg, _method)).parameters)
    if _lacking:
        raise ImportError(
            f"fedgram.bindings.flower needs {NEEDED} and its message-based FedAvg: in flwr {version('flwr')}, "
            f"FedAvg.{_method} has no parameter {sorted(_lacking)[0]!r}: {INSTALL}"
        )

__all__ = ["Array", "ArrayRecord", "ConfigRecord", "FedAvg", "Grid", "Message", "MetricRecord", "RecordDict"]
