"""The alignment that a gradient kernel is told of holds for every address that it is launched with."""

import pytest
import torch

from fedgram_testing.gradients import errors

pytest.importorskip("triton")

from fedgram.kernels import _grad_combine_launch, _grad_gram_launch, grad_combine, grad_gram

LAYOUTS = ("plain", "misaligned", "gaps", "transposed", "channels last", "expanded")


class Spy:
    """Stands before a kernel and looks at the addresses in its tables."""

    def __init__(self, kernel, chunks_at, tables):
        self.kernel, self.chunks_at, self.tables, self.wide = kernel, chunks_at, tables, 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            parameters = arguments[self.chunks_at][:, 0].unique()
            for at, vector, kind in self.tables:
                step = options[vector] * options[kind].primitive_bitwidth // 8
                assert not (arguments[at][parameters] % step).any()
                self.wide += options[vector] > 1
            return self.kernel[grid](*arguments, **options)

        return launch


@pytest.fixture
def spies(monkeypatch):
    """On the launches of both operations, which make their plans anew."""
    found = []
    for module, name, *what in (
        (_grad_gram_launch, "grad_gram_kernel", 1, [(0, "VECTOR", "TYPE")]),
        (_grad_gram_launch, "grad_centre_kernel", 1, [(0, "VECTOR", "TYPE")]),
        (_grad_combine_launch, "grad_combine_kernel", 2, [(0, "VECTOR", "TYPE"), (1, "OUT_VECTOR", "OUT")]),
    ):
        found.append(Spy(getattr(module.kernels, name), *what))
        monkeypatch.setattr(module.kernels, name, found[-1])
        monkeypatch.setattr(module, "PLANS", module.PlanCache())
    return found


def laid(t, layout):
    """The same numbers, where they may be kept, elsewhere in memory."""
    if layout == "misaligned":
        return torch.empty(t.numel() + 8, dtype=t.dtype)[1 : 1 + t.numel()].view(t.shape).copy_(t)
    if layout == "gaps":
        return torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2].copy_(t)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels last" and t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t[:1].expand(t.shape) if layout == "expanded" else t.clone()


@pytest.mark.parametrize("seed", range(25))
def test_addresses_are_aligned_as_the_kernels_are_told(spies, seed):
    random = torch.Generator().manual_seed(seed)

    def one_of(items):
        return items[int(torch.randint(len(items), (), generator=random))]

    K, dtype = one_of((1, 2, 3, 66) if seed < 3 else (1, 2, 3)), one_of((torch.float32, torch.bfloat16, torch.float64))
    shapes = [(33, 64), (7,), (2, 3, 4, 5), (1, 9)]
    # by parameter, so that some have one layout for all tasks
    usual = [one_of(LAYOUTS) for _ in shapes]
    lists = []
    for _ in range(K):
        places = [one_of((u, u, one_of(LAYOUTS))) for u in usual]
        values = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
        lists.append([laid(t, place) for t, place in zip(values, places, strict=True)])
    assert max(errors(grad_gram(lists, backend="triton"), lists)) < 4e-6
    out = [laid(torch.empty(s, dtype=dtype), one_of(LAYOUTS[:-1])) for s in shapes]
    v = torch.randn(K, dtype=torch.float64, generator=random)
    grad_combine(lists, v, out=out, backend="triton")
    for p, got in enumerate(out):
        want = sum(v[k] * g[p].double() for k, g in enumerate(lists))
        assert torch.allclose(got.double(), want, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-3)


def test_wide_loads_are_kept_where_only_copies_are_scattered(spies):
    G = [[torch.randn(64, 64)], [torch.randn(64, 64).T]]
    grad_gram(G, backend="triton")
    grad_combine(G, torch.ones(2), out=[torch.empty(64, 70)[:, 3:67]], backend="triton")
    assert [spy.wide for spy in spies] == [1, 0, 2]
