"""A federated loop without a framework: state dicts go to four clients and come back. Scikit-learn's digits.

python loop.py

What another framework's server must call is the one line with ``server(...)`` in each of the two functions.
"""

import copy

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.datasets import load_digits
from torch import nn

from fedgram.bench.demo.newsgroups import dirichlet_partition
from fedgram.bindings.modules import StateDictAggregator, StateDictMatcher

ROUNDS, CLIENTS, TEST = 3, 4, 400
digits = load_digits()
X, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
SHARES = dirichlet_partition(digits.target[TEST:], CLIENTS, 0.3, np.random.default_rng(0), at_least=50)
SHARES = [torch.from_numpy(share + TEST) for share in SHARES]  # the first 400 are for testing


def network() -> nn.Module:
    """The same start for everyone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def train(model: nn.Module, share: torch.Tensor) -> None:
    """What a client does between receiving and sending."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[share]), y[share]).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    """On the test digits."""
    with torch.no_grad():
        return float((model(X[:TEST]).argmax(1) == y[:TEST]).double().mean())


def adapters() -> float:
    """LoRA on a frozen network: FLoRA-NA aggregates what ``get_peft_model_state_dict`` gives."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"], modules_to_save=["4"])
    model = get_peft_model(network(), config)
    state = get_peft_model_state_dict(model)
    server = StateDictAggregator("als", align_previous=True)
    for number in range(ROUNDS):
        sent = []
        for share in SHARES:
            set_peft_model_state_dict(model, state)
            train(model, share)
            sent.append({name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()})
        state = server(sent, [len(share) for share in SHARES], config=config)
        set_peft_model_state_dict(model, state)
        rho, averaged = server.report.rho, server.report.rho_fedavg
        print(f"LoRA round {number}: accuracy {accuracy(model):.3f}, rho {rho:.4f} (averaged factors {averaged:.4f})")
    return accuracy(model)


def whole_models() -> float:
    """All parameters: STAMP matches what ``state_dict()`` gives."""
    model = network()
    server = StateDictMatcher(model.state_dict(), c=0.25)
    for number in range(ROUNDS):
        sent = []
        for share in SHARES:
            model.load_state_dict(server.state)
            train(model, share)
            sent.append(copy.deepcopy(model.state_dict()))
        model.load_state_dict(server(sent, [len(share) for share in SHARES]))
        gap = abs(server.dual.relative_gap)
        print(f"whole round {number}: accuracy {accuracy(model):.3f}, {server.dual.status}, relative gap {gap:.1e}")
    return accuracy(model)


if __name__ == "__main__":
    adapters()
    whole_models()
