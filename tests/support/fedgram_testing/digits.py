"""A small bfloat16 network for scikit-learn's digits, with a normalisation layer's statistics in its state."""

import torch
from torch import nn


class Digits(nn.Module):
    """64 pixels -> 10 classes, bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.norm, self.out = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.hidden(x))))
