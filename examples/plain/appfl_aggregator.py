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

from fedgram.bindings.plain import aggregate_state_dicts

try:
    from appfl.algorithm.aggregator import BaseAggregator
except ImportError:  # it only keeps the clients' sample sizes
    BaseAggregator = object


class FloraNAAggregator(BaseAggregator):
    """FLoRA-NA as APPFL's synchronous scheduler calls it; ``aggregator_kwargs`` are options of the library."""

    def __init__(self, aggregator_configs: Mapping[str, Any] | None = None, logger: Any = None) -> None:
        self.options, self.logger = dict(aggregator_configs or {}), logger
        self.options.pop("num_clients", None)  # APPFL's server adds it
        self.client_sample_size: dict[str | int, int] = {}
        self.global_state: dict[str, Tensor] | None = None

    def aggregate(self, local_models: Mapping[str | int, Mapping[str, Tensor]], **_: Any) -> dict[str, Tensor]:
        """The clients' state dicts, by client, to the global one."""
        clients = sorted(local_models, key=str)  # the same result whoever answered first
        counts = [self.client_sample_size.get(client, 1) for client in clients]
        states = [local_models[client] for client in clients]
        result = aggregate_state_dicts(states, counts, names=[str(c) for c in clients], **self.options)
        if self.logger is not None:
            self.logger.info(f"rho {result.report.rho:.4f}, averaged factors {result.report.rho_fedavg:.4f}")
        self.global_state = result.state_dict
        return dict(result.state_dict)

    def get_parameters(self, **_: Any) -> dict[str, Tensor]:
        """The global state; before the first round clients keep what they have."""
        return dict(self.global_state or {})

    def set_client_sample_size(self, client_id: str | int, sample_size: int) -> None:
        """Called by APPFL with every client's number of samples."""
        self.client_sample_size[client_id] = sample_size
