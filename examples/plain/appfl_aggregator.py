"""APPFL (1.12): an aggregator of the user's own, named in the server's configuration file:

server_configs:
  aggregator_path: ./appfl_aggregator.py
  aggregator: FloraNAAggregator
  aggregator_kwargs: {method: als, lora_alpha: 16}

The clients' trainers send ``get_peft_model_state_dict(model)``. Without APPFL installed the class works all the same.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedgram.bindings.modules import StateDictAggregator

try:
    from appfl.algorithm.aggregator import BaseAggregator
except ImportError:  # it only keeps the clients' sample sizes
    BaseAggregator = object


SCALING = ("lora_alpha", "scalings", "config")


class FloraNAAggregator(BaseAggregator):
    """FLoRA-NA as APPFL's synchronous scheduler calls it.

    ``aggregator_kwargs`` are the options of ``StateDictAggregator`` and one way to tell the clients' scalings. Wrong
    ones are a ValueError when the server starts.
    """

    def __init__(self, aggregator_configs: Mapping[str, Any] | None = None, logger: Any = None) -> None:
        options = dict(aggregator_configs or {})
        options.pop("num_clients", None)  # APPFL's server adds it, and whether clients send differences
        if options.pop("gradient_based", False):
            raise ValueError("gradient_based: the clients' whole state is needed; send it, not differences")
        self.scaling = {name: options.pop(name) for name in SCALING if name in options}
        try:
            self.server = StateDictAggregator(**options)
        except TypeError as error:
            raise ValueError(f"aggregator_kwargs: {error}") from error
        self.logger = logger
        self.client_sample_size: dict[str | int, int] = {}

    def aggregate(self, local_models: Mapping[str | int, Mapping[str, Tensor]], **_: Any) -> dict[str, Tensor]:
        """The clients' state dicts, by client, to the global one."""
        clients = sorted(local_models, key=str)  # the same result whoever answered first
        counts = [self.client_sample_size.get(client, 1) for client in clients]
        states = [local_models[client] for client in clients]
        state = self.server(states, counts, names=[str(client) for client in clients], **self.scaling)
        if self.logger is not None:
            report = self.server.report
            self.logger.info(f"rho {report.rho:.4f}, averaged factors {report.rho_fedavg:.4f}")
        return state

    def get_parameters(self, **_: Any) -> dict[str, Tensor]:
        """The global state; before the first round clients keep what they have."""
        return dict(self.server.previous or {})

    def set_client_sample_size(self, client_id: str | int, sample_size: int) -> None:
        """Called by APPFL with every client's number of samples."""
        self.client_sample_size[client_id] = sample_size
