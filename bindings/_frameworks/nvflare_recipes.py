"""FLARE's FedAvg recipe with the aggregators of this package, which the server imports from where it is installed."""

from __future__ import annotations

import inspect
import os
from typing import Any

import nvflare
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

if not hasattr(FedAvgRecipe, "_get_model_aggregator"):  # FLARE's own recipes are derived by such methods
    raise ImportError(
        f"fedgram.bindings.nvflare was made for NVIDIA FLARE 2.9; {nvflare.__version__} lets a recipe choose its "
        "aggregator in another way"
    )

WEIGHTS_NAME = "adapter_model.safetensors"
MODULE = "fedgram.bindings.nvflare"

NOT_HEEDED = {
    "aggregation_weights": "weights come in the models' meta, under the key that the aggregator's weighted_by names",
    "exclude_vars": "let the clients leave out what is not to be aggregated",
}
"""Options of FLARE's recipe that it does not hand to an aggregator, and what to do instead."""

_aggregators: dict[str, type] = {}


def register(*aggregators: type) -> None:
    """Tell the recipes their aggregators, which import this module."""
    _aggregators.update({aggregator.__name__: aggregator for aggregator in aggregators})


class AdapterModel(nn.Module):
    """The first global model of a job: an adapter directory of PEFT as a module of its names, without the base model.

    Args:
        path: the directory, or a safetensors file, on the server.

    Raises:
        OSError: it cannot be read, or is not a safetensors file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        file = os.path.join(path, WEIGHTS_NAME) if os.path.isdir(path) else path
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise OSError(f"{file}: not a safetensors file ({error})") from error
        for name, tensor in tensors.items():
            *parts, leaf = name.split(".")
            parent: nn.Module = self
            for part in parts:
                child = parent._modules.get(part)
                if child is None:
                    child = parent._modules[part] = nn.Module()
                parent = child
            parent._buffers[leaf] = tensor  # register_buffer refuses names that a module has as attributes

    def forward(self) -> None:
        """Not a model to run: it only holds tensors.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("AdapterModel holds an adapter's tensors; clients run the model")


class _InstalledRecipe(FedAvgRecipe):
    """FedAvg whose aggregator is named by its import path and options, not shipped as source with every job."""

    def __init__(self, *, aggregator: Any, **recipe: Any) -> None:
        for option, instead in NOT_HEEDED.items():
            if recipe.get(option):
                raise ValueError(f"{option}: FLARE heeds it in its own weighted mean only; {instead}")
        super().__init__(aggregator=aggregator, **{"server_expected_format": ExchangeFormat.PYTORCH, **recipe})

    def _get_model_aggregator(self) -> Any:
        aggregator = super()._get_model_aggregator()
        if not type(aggregator).__module__.startswith("fedgram."):
            return aggregator  # a user's own subclass travels with the job, as FLARE does it
        return {"path": f"{MODULE}.{type(aggregator).__name__}", "args": _options(aggregator)}


class FloraNARecipe(_InstalledRecipe):
    """``FedAvgRecipe`` with a ``FloraNAAggregator``; the exchange is in torch tensors, so that bfloat16 survives.

    Args:
        aggregator: a configured one; the default is ``FloraNAAggregator()``.
        adapter: the PEFT adapter directory that all clients start from, on the server; or give ``model`` or
            ``model_persistor``.
        recipe: everything else that ``nvflare.app_opt.pt.recipes.fedavg.FedAvgRecipe`` takes (``name``,
            ``min_clients``, ``num_rounds``, ``train_script``, ...), but ``aggregation_weights`` and ``exclude_vars``.

    Raises:
        ValueError: ``adapter`` and another first model are given, or none; or one of the two options.
    """

    def __init__(self, *, aggregator: Any = None, adapter: str | os.PathLike[str] | None = None, **recipe: Any) -> None:
        others = [option for option in ("model", "model_persistor") if recipe.get(option) is not None]
        if adapter is None and not others:
            raise ValueError("adapter: give this, model or model_persistor, what the clients start from")
        if adapter is not None and others:
            raise ValueError(f"adapter: give this or {others[0]}, not both")
        if adapter is not None:
            model = {"class_path": f"{MODULE}.AdapterModel", "args": {"path": os.path.abspath(adapter)}}
            recipe = {**recipe, "model": model}
        super().__init__(aggregator=aggregator or _aggregators["FloraNAAggregator"](), **recipe)


class StampRecipe(_InstalledRecipe):
    """``FedAvgRecipe`` with a ``StampAggregator``; the exchange is in torch tensors, so that bfloat16 survives.

    Args:
        aggregator: a configured one; the default is ``StampAggregator()``.
        recipe: everything else that ``nvflare.app_opt.pt.recipes.fedavg.FedAvgRecipe`` takes, but
            ``aggregation_weights`` and ``exclude_vars``.

    Raises:
        ValueError: one of the two is given.
    """

    def __init__(self, *, aggregator: Any = None, **recipe: Any) -> None:
        super().__init__(aggregator=aggregator or _aggregators["StampAggregator"](), **recipe)


def _options(component: Any) -> dict[str, Any]:
    """The constructor's arguments that are not at their defaults."""
    parameters = inspect.signature(type(component).__init__).parameters
    given = {name: getattr(component, name) for name in list(parameters)[1:]}
    return {name: value for name, value in given.items() if value != parameters[name].default}
