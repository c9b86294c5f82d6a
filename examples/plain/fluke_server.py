"""fluke (0.8): a server of the user's own; an algorithm's ``get_server_class`` returns it.

``fluke`` hands the server whole models. Those with LoRA layers aggregate their factors by FLoRA-NA, any other model
moves along STAMP's matched direction. fluke's learning rate of the server is not used. Without fluke installed
``aggregate_into`` works all the same.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fedgram.bindings.plain import aggregate_state_dicts, match_state_dicts

try:
    from fluke.server import Server
except ImportError:
    Server = object


def aggregate_into(model: nn.Module, client_models: Iterable[nn.Module], weights: Sequence[float]) -> dict[str, Any]:
    """Write the aggregate of the clients' models into the server's; returns the evidence."""
    states = [client.state_dict() for client in client_models]
    server_state = model.state_dict()
    if any("lora_" in name for name in server_state):
        names = _learnt(model)
        result = aggregate_state_dicts([{name: state[name] for name in names} for state in states], weights)
        model.load_state_dict(result.state_dict, strict=False)
        return {"rho": result.report.rho, "rho_fedavg": result.report.rho_fedavg}
    matched = match_state_dicts(server_state, states, weights, c=0.25)
    model.load_state_dict(matched.state_dict)
    return {"status": matched.dual.status, "relative_gap": matched.dual.relative_gap}


def _learnt(model: nn.Module) -> list[str]:
    """What training changes: trained parameters and running statistics. Counts of batches stay those of the server."""
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    learnt |= {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return [name for name in model.state_dict() if name in learnt]


class FedgramServer(Server):
    """fluke's server with its ``aggregate`` replaced."""

    def aggregate(self, eligible: Sequence[Any], client_models: Iterable[nn.Module]) -> None:
        """Called by fluke at the end of every round."""
        self.evidence = aggregate_into(self.model, client_models, self._get_client_weights(eligible))
