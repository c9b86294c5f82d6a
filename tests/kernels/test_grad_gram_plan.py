"""What the plan of the Triton path promises the kernel, and when it may be used again."""

import numpy as np
import pytest
import torch

from fedgram_testing.gradients import errors, gradients

pytest.importorskip("triton")

from fedgram.kernels import _grad_gram_launch as launch
from fedgram.kernels import grad_gram
from fedgram.kernels._grad_inputs import check_gradients, flatten
from fedgram.kernels._grad_work import CHUNK, column_chunks
from fedgram.kernels._plan import addresses


def plan_of(G):
    return launch.GradGramPlan(G, addresses(flatten(G)), False)


@pytest.mark.parametrize("numels", [(), (0,), (1,), (CHUNK,), (CHUNK + 1, 0, 5 * CHUNK, 3)])
def test_chunks_cover_every_column_once(numels):
    rows = column_chunks(list(range(len(numels))), numels)
    columns = [(p, c) for p, start, n in rows for c in range(start, start + n)]
    assert columns == [(p, c) for p, n in enumerate(numels) for c in range(n)]
    assert all(start % CHUNK == 0 and 0 < n <= CHUNK for _, start, n in rows)


def test_wide_loads_are_planned_only_where_every_address_allows_them():
    base = torch.randn(4, 200)
    aligned, misaligned = [b[:100] for b in base], [b[1:101] for b in base]
    G = [[a, a, m] for a, m in zip(aligned, misaligned, strict=True)]
    G[1][1] = base[1][2:102]
    wide = {group.wide: {int(p) for p in group.chunks[:, 0]} for group in plan_of(G).groups}
    assert wide == {True: {0}, False: {1, 2}}
    for group in plan_of(G).groups:
        if group.wide:
            tensors = [g[int(p)] for g in G for p in group.chunks[:, 0]]
            assert all(t.data_ptr() % 16 == 0 for t in tensors)


def test_table_holds_addresses_by_parameter_and_task_and_zeros_beyond():
    G = gradients(5)
    plan = plan_of(G)
    table = plan.addresses.of(np.append(addresses(flatten(G)), 0))
    assert table.shape == (len(G[0]), 16)
    assert [[int(a) for a in row[:5]] for row in table] == [[g[p].data_ptr() for g in G] for p in range(len(G[0]))]
    assert not table[:, 5:].any()


def test_a_plan_serves_other_tensors_of_its_layout_and_no_others(monkeypatch):
    built = []
    monkeypatch.setattr(launch, "PLANS", launch.PlanCache())
    original = launch.GradGramPlan
    monkeypatch.setattr(launch, "GradGramPlan", lambda *a: built.append(a) or original(*a))
    for seed in range(3):
        G = gradients(3, [(40,), (8, 5)], seed=seed)
        assert max(errors(grad_gram(G, backend="triton"), G)) < 2e-6
    assert len(built) == 1
    transposed = [[g[0], g[1].T.contiguous().T] for g in G]
    assert max(errors(grad_gram(transposed, backend="triton"), G)) < 2e-6
    assert len(built) == 2
    with pytest.raises(ValueError, match="expected shape"):
        grad_gram([G[0], G[1], [G[2][1].view(-1), G[2][0]]], backend="triton")


def test_several_segments_add_up(monkeypatch):
    monkeypatch.setattr(launch, "SEGMENT", 2)
    monkeypatch.setattr(launch, "PLANS", launch.PlanCache())
    G = gradients(65, [(60,), (30,), (7,)])
    assert check_gradients(G).tasks > 64
    assert max(errors(grad_gram(G, backend="triton"), G)) < 2e-6


def test_pairs_of_tiles_may_take_several_launches(monkeypatch):
    """As those of more than 16,000 tasks do, for the sake of the grid's limits."""
    G = gradients(65, [(30,), (7,)])
    whole = grad_gram(G, backend="triton")
    monkeypatch.setattr(launch, "PAIRS", 1)
    monkeypatch.setattr(launch, "PLANS", launch.PlanCache())
    parts = grad_gram(G, backend="triton")
    assert [len(pairs) for _, _, pairs in next(iter(launch.PLANS.plans.values())).pairs] == [1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
