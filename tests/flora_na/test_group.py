"""Groups of modules: their Grams in one memory, shared scalars of the members, averages from the read of the Grams."""

import pytest
import torch

from fedgram import kernels
from fedgram.flora_na.estimation import estimate_targets
from fedgram.flora_na.grouping import make_groups, stacked
from fedgram.flora_na.target import make_target
from fedgram.kernels import native_calls


def memory(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(*shape)


@pytest.mark.parametrize(
    ("matrices", "shared"),
    [
        (list(memory(3, 4, 2).unbind()), True),
        (list(memory(1, 4, 2).unbind()), True),
        (list(memory(5, 4, 2).unbind())[1:4], True),
        (list(memory(3, 4, 2).flip(0).unbind()), True),
        (list(memory(3, 4, 2).unbind())[::-1], False),
        (list(memory(3, 4, 2).unbind())[::2], False),
        ([memory(4, 2), memory(4, 2)], False),
        (list(memory(3, 4, 3)[:, :, :2].unbind()), False),
        (list(memory(3, 2, 4).mT.unbind()), False),
        (list(memory(2, 0, 3).unbind()), False),
        ([memory(2, 2, 3)[0], memory(2, 2, 3)[1]], False),
    ],
)
def test_matrices_that_lie_behind_each_other_are_not_copied(matrices, shared):
    found = stacked(matrices)
    assert torch.equal(found, torch.stack(matrices))
    assert shared == (found.numel() > 0 and found.data_ptr() == matrices[0].data_ptr())


def targets(dtype, scalings, seed=0):
    """One module for each tuple of scalings."""
    g = torch.Generator().manual_seed(seed)
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    return [
        make_target(
            [torch.randn(50 + i, 4, generator=g).to(dtype) for _ in own],
            [torch.randn(4, 40 + i, generator=g).to(dtype) for _ in own],
            w,
            own,
            name=f"module {i}",
        )
        for i, own in enumerate(scalings)
    ]


def true_rho(target, e):
    B, A = ([x.double() for x in side] for side in (target.B, target.A))
    dW = sum(c * b @ a for c, b, a in zip(target.coefficients.tolist(), B, A, strict=True))
    return float((dW - e.B.double() @ e.A.double()).norm() / dW.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "scalings", [[(1.0, 1.0, 1.0)] * 3, [(2.0, 2.0, 2.0)] * 3, [(2.0, -0.5, 1.0), (1.0, 1.0, 1.0), (0.25, 3.0, 1.0)]]
)
def test_averages_are_measured_as_they_are_returned(dtype, scalings):
    every = targets(dtype, scalings)
    for target, e in zip(every, estimate_targets(every, method="fedavg"), strict=True):
        exact = [
            sum(w * s * x.double() for w, s, x in zip(target.weights.tolist(), scale.tolist(), side, strict=True))
            for side, scale in ((target.B, target.scale_B), (target.A, target.scale_A))
        ]
        for got, want in zip((e.B, e.A), exact, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert e.rho == pytest.approx(true_rho(target, e), rel=1e-9 if dtype != torch.float32 else 5e-4)


@pytest.mark.skipif(native_calls.missing() is not None, reason=str(native_calls.missing()))
def test_the_factors_are_read_once(monkeypatch):
    """16-bit averages too, whose rounding shows in rho."""

    def refuse(*args, **kwargs):
        raise AssertionError("a second read of the factors")

    for name in ("factor_combine", "combine_products", "factor_cross", "factor_gram", "lowrank_norm"):
        monkeypatch.setattr(kernels, name, refuse)
    for dtype in (torch.bfloat16, torch.float32):
        estimate_targets(targets(dtype, [(1.0, 2.0, 1.0)] * 2), method="fedavg")
    with pytest.raises(AssertionError, match="a second read"):
        estimate_targets(targets(torch.bfloat16, [(1.0, 2.0, 1.0)] * 2), method="flora-na")


def test_modules_of_one_scaling_share_it():
    every = targets(torch.float32, [(2.0, 2.0, 0.5)] * 3)
    assert len({id(target.scalings) for target in every}) == 1
    [(group, ids)] = make_groups(every)
    assert ids == [0, 1, 2]
    assert group.weights.shape == group.members.scale["B"].shape == (3, 3)
    [(mixed, _)] = make_groups([*every[:2], *targets(torch.float32, [(1.0, 3.0, 1.0)])])
    assert mixed.members.scale["A"][2].square().tolist() == pytest.approx([1.0, 3.0, 1.0])
