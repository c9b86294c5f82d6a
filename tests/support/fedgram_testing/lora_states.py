"""Clients' LoRA state dicts of two layers and a head, and what is to come out of them."""

import torch

from fedgram.flora_na import LoraLayer

SHAPES = {"layer.q": (12, 10), "layer.v": (9, 10)}
WEIGHTS = [3.0, 1.0, 2.0]


def states(count=3, rank=4, *, spelling="base_model.model.{module}.lora_{side}.weight", dtype=torch.float32, seed=0):
    """Clients around a common part, each with a head; ``rank`` is one number or one per client."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    ranks = [rank] * count if isinstance(rank, int) else rank
    common = {name: (draw(max(ranks), n), draw(m, max(ranks))) for name, (m, n) in SHAPES.items()}
    clients = []
    for r in ranks:
        state = {}
        for name, (A, B) in common.items():
            state[spelling.format(module=name, side="A")] = (A[:r] + 0.5 * draw(*A[:r].shape)).to(dtype)
            state[spelling.format(module=name, side="B")] = (B[:, :r] + 0.5 * draw(*B[:, :r].shape)).to(dtype)
        clients.append(state | {"base_model.model.head.weight": draw(3, 5).to(dtype)})
    return clients


def layers(state, spelling, scaling=1.0):
    def at(name, side):
        return state[spelling.format(module=name, side=side)]

    return {name: LoraLayer(A=at(name, "A"), B=at(name, "B"), scaling=scaling) for name in SHAPES}


def target(clients, module, scalings, weights, spelling):
    """sum w_u s_u B_u A_u in float64."""
    w = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return sum(
        c * s * (layer := layers(state, spelling)[module]).B.double() @ layer.A.double()
        for c, s, state in zip(w, scalings, clients, strict=True)
    )


SPELLINGS = [
    "base_model.model.{module}.lora_{side}.weight",
    "{module}.lora_{side}.weight",
    "base_model.model.{module}.lora_{side}.default.weight",
    "{module}.lora_{side}",
]
