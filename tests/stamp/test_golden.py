"""Parity with the authors' weights on real parameter differences (tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedgram import stamp

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "stamp"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def deltas():
    return load_file(GOLDEN / "deltas.safetensors")


@pytest.mark.parametrize("case", EXPECTED)
def test_the_objective_is_the_optimum_and_below_the_authors(case, deltas):
    X, expected = deltas[f"{case}.deltas"], EXPECTED[case]
    assert X.shape == (expected["K"], expected["d"])
    double = X.double()
    for gramian in (double @ double.T, stamp.gramian(list(X), precise=True)):
        dual = stamp.solve_dual(gramian, expected["c"])
        assert dual.objective == pytest.approx(expected["objective_optimal"], rel=1e-9)
        assert dual.objective <= expected["objective_authors"]
        assert dual.gap <= 1e-9 * dual.objective


@pytest.mark.parametrize("case", EXPECTED)
def test_match_reaches_it_from_the_float32_deltas(case, deltas):
    X, expected = deltas[f"{case}.deltas"], EXPECTED[case]
    found = stamp.match(list(X), c=expected["c"])
    # The Gram matrix of float32 products is right to 2e-6; an optimum moves by no more than the data.
    assert found.objective == pytest.approx(expected["objective_optimal"], rel=1e-5)
    double = X.double()
    d, g0 = found.coefficients @ double, double.mean(0)
    assert float((double @ d).min()) >= expected["objective_optimal"] * (1 - 1e-5)
    assert float((d - g0).norm()) <= expected["c"] * float(g0.norm()) * (1 + 1e-6)
    assert torch.allclose(found.direction.double(), d, atol=1e-7 * float(d.abs().max()))


def smoothed(G):
    """The authors' problem: gradients in units of their mean length, 1e-4 added to every inner product."""
    sigma = np.sqrt(np.diag(G) + 1e-4).mean()
    return G / sigma**2 + 1e-4, sigma


@pytest.mark.parametrize("case", EXPECTED)
def test_the_authors_smoothed_problem_is_a_dual_of_this_form(case, deltas):
    # Their loss as their code states it, on our solution against their kind of search: softmax weights, Adam.
    X, expected = deltas[f"{case}.deltas"].double(), EXPECTED[case]
    G, c = X @ X.T, expected["c"]
    S, sigma = smoothed(G.numpy())
    dual = stamp.solve_dual(S, c)
    GG = G / sigma**2
    radius = c * torch.sqrt(GG.mean() + 1e-4)

    def loss(w):
        return w @ GG.mean(1) + radius * torch.sqrt(w @ GG @ w + 1e-4)

    # The shift adds 1e-4 to <g_w, g0> for every w: the two differ by that constant.
    ours = float(loss(dual.weights))
    assert dual.objective == pytest.approx(ours + 1e-4, rel=1e-12)
    logits = torch.zeros(len(X), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        loss(torch.softmax(logits, 0)).backward()
        optimizer.step()
    theirs = float(loss(torch.softmax(logits.detach(), 0)))
    assert ours <= theirs + 1e-12
    assert theirs - ours <= 1e-3 * abs(ours)
