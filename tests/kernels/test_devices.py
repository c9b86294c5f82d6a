"""Kernels are launched on the device of their tensors, whichever is the current one."""

import contextlib
import sys

import pytest
import torch

pytest.importorskip("triton")

from fedgram.kernels import (
    _plan,
    factor_combine,
    factor_cross,
    factor_gram,
    ghost_gram,
    grad_combine,
    grad_gram,
    lowrank_sum,
    subset_select,
)
from fedgram_testing.factor_ops import draw
from fedgram_testing.gradients import gradients


def test_the_device_is_changed_only_where_it_must(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(device))
    entered = []
    for name in ("cpu", "cuda:0", "cuda:1"):
        with _plan.launching_on(torch.device(name)) as device:
            entered.append(device)
    assert entered == [None, None, torch.device("cuda", 1)]


class Launches:
    """Stands before a kernel and looks where it is launched."""

    def __init__(self, kernel, current, seen):
        self.kernel, self.current, self.seen = kernel, current, seen

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            assert self.current == [torch.device("cpu")]
            self.seen.append(self.kernel)
            return self.kernel[grid](*arguments, **options)

        return launch


@pytest.fixture
def seen(monkeypatch):
    """All launches, each of which must be made with the tensors' device as the current one."""
    current, seen = [], []

    @contextlib.contextmanager
    def entered(device):
        current.append(device)
        yield
        current.pop()

    real = _plan.launching_on
    for name, module in list(sys.modules.items()):
        if not name.startswith("fedgram.kernels"):
            continue
        if getattr(module, "launching_on", None) is real:
            monkeypatch.setattr(module, "launching_on", entered)
        if name.endswith("_triton"):
            for kernel in [k for k in vars(module) if k.endswith("_kernel")]:
                monkeypatch.setattr(module, kernel, Launches(getattr(module, kernel), current, seen))
    return seen


B, A = draw([2, 3], [(20, 12)], torch.float32)
LIKE = draw([2, 2], [(20, 12)], torch.float32)
P = [torch.ones(5, 2, dtype=torch.float64)]
SCALARS = [torch.ones(2, dtype=torch.float64)]
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
CALLS = {
    "factor_gram": lambda: factor_gram(B, A, backend="triton"),
    "factor_cross": lambda: factor_cross(B, A, [B[0][0]], [A[0][0]], backend="triton"),
    "factor_combine": lambda: factor_combine(B, A, P, [P[0].T], backend="triton"),
    "factor_combine of scalars": lambda: factor_combine(*LIKE, SCALARS, SCALARS, backend="triton"),
    "lowrank_sum": lambda: lowrank_sum(None, B[0], A[0], SCALARS[0], backend="triton"),
    "grad_gram": lambda: grad_gram(gradients(3), backend="triton"),
    "grad_gram of many": lambda: grad_gram(gradients(65, [(5,)]), backend="triton"),
    "grad_combine": lambda: grad_combine(gradients(3), torch.ones(3), backend="triton"),
    "ghost_gram": lambda: ghost_gram(X, X, [0, 5, 12], backend="triton"),
    "subset_select": lambda: subset_select(X, [0, 12], [3], backend="triton"),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_launch_is_on_the_device_of_the_tensors(name, request):
    CALLS[name]()  # imports the kernels
    seen = request.getfixturevalue("seen")
    CALLS[name]()
    assert seen
