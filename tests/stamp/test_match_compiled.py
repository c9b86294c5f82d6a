"""A whole match inside ``torch.compile(fullgraph=True)``: nothing of it depends on a look at the values."""

import pytest
import torch

from fedgram import stamp
from fedgram_testing.gradients import BACKENDS


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what torch.compile warns about depends on its version
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_a_whole_match_is_traced_in_one_graph(backend):
    torch.compiler.reset()
    random = torch.Generator().manual_seed(0)
    lists = [[torch.randn(5, 7, generator=random), torch.randn(3, generator=random)] for _ in range(3)]
    weights = torch.tensor([1.0, 2, 1])

    def run(lists, weights):
        m = stamp.match(lists, weights, c=0.4, backend=backend)
        return m.direction, m.coefficients

    direction, v = torch.compile(run, fullgraph=True, backend="eager")(lists, weights)
    plain = stamp.match(lists, weights, c=0.4, backend=backend)
    torch.testing.assert_close(v, plain.coefficients, rtol=1e-12, atol=1e-12)
    for x, y in zip(direction, plain.direction, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
