"""A default device other than that of the tensors given changes nothing: every tensor is made where it belongs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedgram import stamp


@pytest.fixture
def elsewhere():
    """The meta device as the default, after what the tests are given has been made on the CPU."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 20, generator=g)
    batch = torch.randn(8, 3, generator=g), torch.arange(8) % 2
    model = nn.Linear(3, 2)
    torch.set_default_device("meta")
    yield rows, batch, model
    torch.set_default_device(None)


def test_matching_of_every_kind(elsewhere):
    rows, _, _ = elsewhere
    short = [rows[0], 1e-9 * rows[1], rows[2]]
    opposing = [rows[0], -rows[0], rows[1]]
    assert stamp.match(list(rows), [1, 2, 3, 4]).status == "optimal"
    assert stamp.match(short).status == "optimal"
    assert stamp.match(opposing).status == "degenerate"
    G = rows.double() @ rows.double().T
    assert stamp.solve_dual(stamp.Gramian.from_dense(G), 0.3, method="batched").status == "optimal"
    assert set(stamp.solve_dual(G.expand(70, 4, 4), 0.3).status) == {"optimal"}
    server = stamp.SpatialMatcher({"w": rows[0], "n": rows[0].to(torch.int64)})
    assert server.step([{"w": x, "n": x.to(torch.int64)} for x in short]).state["w"].device.type == "cpu"


def test_a_clients_steps(elsewhere):
    _, batch, model = elsewhere

    class Memory:
        tasks = ("old",)

        def task(self, name):
            return batch

    def loss(m, b):
        return F.cross_entropy(m(b[0]), b[1])

    matcher = stamp.TemporalMatcher(model, loss, Memory())
    assert matcher.step(batch).match.direction["weight"].device.type == "cpu"
    matcher.multi_step([batch], steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert stamp.ghost_match(model, loss, [batch, batch]).losses.device.type == "cpu"
