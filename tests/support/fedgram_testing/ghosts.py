"""The ghost Gramian held against gradients that were really computed."""

import copy

import pytest
import torch

from fedgram import stamp
from fedgram.stamp._ghost_trace import Trace

from .models import gradients

# Float64 models: rows, products and sums are float64 on both sides, a few hundred terms each, and cancel by at most
# the ratio of ||g_k|| ||g_l|| to the entry, which the comparison is relative to.
EXACT = 1e-12


def assert_same_gram(model, loss_fn, tasks, tolerance=EXACT, warns=None):
    g = gradients(copy.deepcopy(model), loss_fn, tasks)
    if warns is None:
        found = stamp.ghost_gramian(model, loss_fn, tasks)
    else:
        with pytest.warns(UserWarning, match=warns):
            found = stamp.ghost_gramian(model, loss_fn, tasks)
    G, norms = g @ g.T, g.norm(dim=1)
    assert (norms > 0).all()
    assert ((found.dense() - G).abs() / torch.outer(norms, norms)).max() < tolerance
    e = g - g.mean(0)
    assert (found.H - e @ e.T).abs().max() < tolerance * G.diagonal().max()


def kept_as_ghosts(model, loss_fn, tasks):
    trace = Trace(model, loss_fn, len(tasks))
    for k, task in enumerate(tasks):
        trace.add(task, k)
    return {g.name for g in trace.ghosts.values() if g.is_ghost}
