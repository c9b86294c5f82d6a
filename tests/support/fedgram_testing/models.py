"""Small models, losses and tasks, and the tasks' gradients computed the plain way."""

import torch
from torch import nn
from torch.nn import functional as F


def gradients(model, loss_fn, tasks):
    """One flat float64 gradient per task, the plain way."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for task in tasks:
        grads = torch.autograd.grad(loss_fn(model, task), parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(grads, parameters, strict=True)]
        rows.append(torch.cat([g.reshape(-1).double() for g in filled]))
    return torch.stack(rows)


def squares(model, batch):
    return (model(batch) ** 2).mean()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def normal(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def built(make):
    torch.manual_seed(3)
    return make().double()


class Mixed(nn.Module):
    """A convolutional network with every kind of normalisation, in-place activations and a free parameter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.batch = nn.BatchNorm2d(8)
        self.group = nn.GroupNorm(2, 8)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.head = nn.Linear(8 * 9, 40)
        self.out = nn.Linear(40, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = F.relu_(self.group(self.batch(self.stem(x))))
        x = F.relu_(self.deep(x)).flatten(1)
        return self.out(F.relu_(self.head(x))) * self.scale


def image_tasks():
    return [(x, torch.arange(len(x)) % 4) for x in normal((3, 1, 7, 7), (2, 1, 7, 7), (4, 1, 7, 7))]
