"""Compile-time choices that are not shipped: right, compiled by the gate, and gone after their block."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from fedgram.kernels import ghost_gram, lowrank_sum
from fedgram.kernels.trials import FILES, _file, trials, trying

TYPES = (torch.float32, torch.bfloat16)
TRIALS = [(op, dtype, name) for op in FILES for dtype in TYPES for name in trials(op, dtype)]
OFFSETS = {
    "several in a tile": [0, 3, 3, 40, 47, 100],
    "single rows": list(range(101)),
    "one": [0, 100],
    "empty ones": [0] + [0] * 70 + [5, 100],
}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", TYPES)
def test_ghost_gram_in_other_tiles(dtype, offsets):
    a, d = draw(100, 37, dtype=dtype), draw(100, 64, dtype=dtype, seed=1)
    parts = list(itertools.pairwise(OFFSETS[offsets]))
    g = torch.stack([(d[s:e].double().T @ a[s:e].double()).flatten() for s, e in parts])
    for name in ("", *trials("ghost_gram", dtype), ""):
        if name:
            with trying("ghost_gram", dtype, name):
                found = ghost_gram(a, d, OFFSETS[offsets], backend="triton")
        else:
            found = ghost_gram(a, d, OFFSETS[offsets], backend="triton")
        assert torch.equal(found, found.T)
        assert float((found - g @ g.T).norm() / (g @ g.T).norm()) < 2e-6


@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_lowrank_sum_gives_the_same_bits(beta):
    B, A = [draw(70, 4, dtype=torch.bfloat16)] * 2, [draw(4, 90, dtype=torch.bfloat16, seed=1)] * 2
    W, c = draw(70, 90, dtype=torch.bfloat16, seed=2), torch.tensor([0.25, -1.5], dtype=torch.float64)
    for w in (W, None):
        shipped = lowrank_sum(w, B, A, c, beta=beta, backend="triton")
        assert trials("lowrank_sum", torch.bfloat16)
        for name in trials("lowrank_sum", torch.bfloat16):
            with trying("lowrank_sum", torch.bfloat16, name):
                assert torch.equal(lowrank_sum(w, B, A, c, beta=beta, backend="triton"), shipped)
                in_place = W.clone()
                lowrank_sum(in_place, B, A, c, beta=beta, out=in_place, backend="triton")
            assert w is None or torch.equal(in_place, shipped)


@pytest.mark.parametrize(("op", "dtype", "name"), TRIALS)
def test_a_trial_is_launched_as_the_gate_compiles_it_and_let_go_of(op, dtype, name, monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: launched.append(options)

    monkeypatch.setattr(_file(op), f"{op}_kernel", Kernel())
    calls = {
        "ghost_gram": lambda: ghost_gram(x, x, [0, 16, 32, 48], backend="triton"),
        "lowrank_sum": lambda: lowrank_sum(x[:, :16] @ x[:, :16].T, [x], [x.T.contiguous()], one, backend="triton"),
    }
    x, one = draw(48, 16, dtype=dtype), torch.ones(1, dtype=torch.float64)
    shipped = _file(op).CHOICE
    with trying(op, dtype, name):
        calls[op]()
    with pytest.raises(ZeroDivisionError), trying(op, dtype, name):
        raise ZeroDivisionError
    assert _file(op).CHOICE is shipped
    calls[op]()
    compiled = [c for c in _file(op).aot_configs("sm90") if c.name.endswith(f", {name}")]
    key = {"ghost_gram": "TILE", "lowrank_sum": "W_FIRST"}[op]
    tried, usual = ((options[key], options["num_warps"]) for options in (launched[0], launched[-1]))
    assert {(c.constexprs[key], c.num_warps) for c in compiled} == {tried}
    assert tried != usual
