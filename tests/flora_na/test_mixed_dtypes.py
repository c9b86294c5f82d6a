"""Modules of several dtypes in one adapter: each is judged by its own."""

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import LoraLayer

NARROW = [torch.bfloat16, torch.float16]
WEIGHTS = [1.0, 5e-4]  # one client dominates, so that rho is as small as the rounding of the narrow types
RANK, M, N = 2, 40, 30


def clients(dtypes, size=1.0, scaling=1.0):
    """Two adapters with a module of each dtype, named by its place."""
    random = torch.Generator().manual_seed(0)
    layers = {
        f"{i}": [
            LoraLayer(*((size * torch.randn(s, generator=random)).to(d) for s in ((RANK, N), (M, RANK))), scaling)
            for _ in WEIGHTS
        ]
        for i, d in enumerate(dtypes)
    }
    return [{name: both[u] for name, both in layers.items()} for u in range(len(WEIGHTS))]


def dense(layer):
    return layer.scaling * layer.B.double() @ layer.A.double()


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd"])
@pytest.mark.parametrize("order", [1, -1])
def test_rho_is_that_of_the_factors_as_rounded_whichever_module_comes_first(narrow, method, order):
    adapters = clients([torch.float32, narrow][::order])
    done = flora_na.aggregate(adapters, WEIGHTS, method=method)
    for name, module in done.report.modules.items():
        target = sum(w * dense(a[name]) for w, a in zip(WEIGHTS, adapters, strict=True)) / sum(WEIGHTS)
        rho = float((target - dense(done.adapter.modules[name])).norm() / target.norm())
        assert module.rho == pytest.approx(rho, rel=1e-3)


@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd"])
@pytest.mark.parametrize("order", [1, -1])
def test_an_overflow_of_the_narrow_module_is_refused_whichever_comes_first(method, order):
    adapters = clients([torch.float32, torch.float16][::order], size=100.0, scaling=1e7)
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        flora_na.aggregate(adapters, method=method)
