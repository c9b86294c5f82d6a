"""What the host plans promise the kernels: addresses, alignment hints, and work lists that cover everything once."""

import ctypes
import gc
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgram.kernels import _factor_gram_plan, _plan
from fedgram.kernels._factor_combine_plan import CombinePlan
from fedgram.kernels._factor_combine_plan import Task as CombineTask
from fedgram.kernels._factor_gram_plan import GramPlan, Task
from fedgram.kernels._factor_plan import ColumnTable, Piece, is_wide, tile_of
from fedgram.kernels._plan import AddressTable, PlanCache, addresses, place, power_of_two_divisor, survey

CPU = torch.device("cpu")
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {8: ctypes.c_int64, 4: ctypes.c_int32, 2: ctypes.c_int16}


@st.composite
def columns(draw):
    """Tall tensors (length, rank) of one length and type in odd places and strides of memory."""
    length, dtype = draw(st.integers(0, 40)), draw(st.sampled_from(TYPES))
    out = []
    for _ in range(draw(st.integers(1, 4))):
        rank = draw(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24]))
        gap, step = draw(st.sampled_from([0, 1, 2, 8])), draw(st.sampled_from([1, 1, 1, 2]))
        skip = draw(st.sampled_from([0, 0, 1, 2, 4, 8]))
        wide = draw(st.booleans())
        rows, across = (rank, length) if wide else (length, rank)
        row = across * step + gap
        memory = torch.randn(skip + rows * row + 8, dtype=torch.float64).to(dtype)
        t = memory.as_strided((rows, across), (row, step), skip)
        out.append(t.T if wide else t)
    return out


def pieces(tensors):
    return [Piece.of(i, t, transposed=False) for i, t in enumerate(tensors)]


def bits(t):
    """The numbers as integers, which compare exactly."""
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.dtype.itemsize])


@settings(max_examples=150, deadline=None)
@given(columns(), st.sampled_from([16, 32]))
def test_every_table_row_finds_its_column_and_every_hint_is_true(tensors, tile):
    table = ColumnTable()
    x = table.add(pieces(tensors), tile)
    width, length, size = sum(t.shape[1] for t in tensors), tensors[0].shape[0], tensors[0].dtype.itemsize
    where, strides = table.addresses(CPU).of(addresses(tensors)), table.strides()
    assert len(where) == len(strides) == -(-width // tile) * tile
    assert (x.first, x.columns, x.length) == (0, width, length)
    if not width or not length:
        return
    # every row of a column, padding included, is where address + k * stride says
    k = np.arange(length)
    stacked = bits(torch.cat(tensors, 1))
    places = where.numpy()[None, :] + k[:, None] * size * (1 if x.wide else strides[None, :])
    found = [[INTEGERS[size].from_address(p).value for p in row] for row in places[:, :width].tolist()]
    assert torch.equal(torch.tensor(found), stacked.to(torch.int64))
    readable = set(places[:, :width].flatten().tolist())
    assert set(places.flatten().tolist()) <= readable  # padding reads nothing that is not a factor
    # the hint: whole vectors are contiguous and aligned to their own size
    v = x.vector
    assert v * size <= 16
    groups = (
        places.reshape(length, -1, v) if not x.wide else places[: length // v * v].T.reshape(places.shape[1], -1, v)
    )
    assert not groups.size or bool((np.diff(groups, axis=-1) == size).all())
    assert bool((groups[..., 0] % (v * size) == 0).all())
    if x.wide:
        assert length % v == 0  # so that the mask of the tail never cuts a vector


@settings(max_examples=50, deadline=None)
@given(columns())
def test_reading_along_the_length_is_chosen_only_where_it_is_contiguous(tensors):
    expected = all(t.stride(0) == 1 or t.shape[0] <= 1 for t in tensors if t.shape[1])
    assert is_wide(pieces(tensors)) is expected


def test_wide_loads_are_found_where_they_exist():
    """The usual adapters get 16 bytes a load on both sides; a hint of one element would be true, and slow."""
    for dtype, v in ((torch.bfloat16, 8), (torch.float32, 4), (torch.float64, 2)):
        B, A = [torch.zeros(64, 8, dtype=dtype)] * 2, [torch.zeros(8, 64, dtype=dtype)] * 2
        table = ColumnTable()
        tall = table.add(pieces(B), 16)
        wide = table.add([Piece.of(i, a, transposed=True) for i, a in enumerate(A)], 16)
        assert (tall.wide, tall.vector) == (False, v)
        assert (wide.wide, wide.vector) == (True, v)


def test_an_address_between_elements_is_refused():
    memory = bytearray(64)
    t = torch.frombuffer(memory, dtype=torch.float32, count=4, offset=2)
    with pytest.raises(ValueError, match="tensor 0: its address is not a multiple of its element size"):
        Piece.of(0, t.view(2, 2), transposed=False)


def test_a_stride_beyond_32_bits_is_refused():
    piece = Piece(0, 2, 1, 2**31, 1, torch.float32, 16)
    with pytest.raises(ValueError, match="row stride of 2147483648 elements does not fit 32 bits"):
        ColumnTable().add([piece], 16)


ranks = st.lists(st.sampled_from([0, 1, 3, 8, 16, 64]), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(ranks, st.integers(0, 3000), ranks, st.booleans(), st.sampled_from(["native", "tf32x3", "fp64"]), st.booleans())
def test_gram_work_covers_every_entry_and_row_once(i, length, j, symmetric, precision, small):
    """Replay the lists: slots are disjoint, a reduction sums exactly its own, all rows and entries are covered."""
    dtype = {"native": torch.bfloat16, "tf32x3": torch.float32, "fp64": torch.float64}[precision]
    operand = [[Piece(u, length, r, max(r, 1), 1, dtype, 16) for u, r in enumerate(rs)] for rs in (i, j)]
    limit, _factor_gram_plan.PARTIAL_BYTES = _factor_gram_plan.PARTIAL_BYTES, 1 if small else 1 << 26
    try:
        plan = GramPlan([Task(operand[0], None if symmetric else operand[1], precision)] * 2, CPU)
    finally:
        _factor_gram_plan.PARTIAL_BYTES = limit
    rows, cols = plan.shapes[0]
    assert (rows, cols) == (sum(i), sum(i) if symmetric else sum(j))
    entries = Counter()
    for batch in plan.batches:
        slots = {}
        for variant, work in batch.launches:
            for _, first_i, first_j, k0, k1, slot, _, _ in work.tolist():
                assert slot not in slots
                assert slot + variant.tile_i * variant.tile_j <= batch.elements
                slots[slot] = (k0, k1, first_i, first_j, variant)
        for r in batch.reductions:
            for slot, n, out, n_rows, n_columns, row, column, _ in r.tiles.tolist():
                used = [slots.pop(slot + s * r.tile_i * r.tile_j) for s in range(n)]
                assert [u[0] for u in used] == [0] + [u[1] for u in used[:-1]]
                assert used[-1][1] == length
                assert len({u[2:4] for u in used}) == 1
                assert all((u[4].tile_i, u[4].tile_j) == (r.tile_i, r.tile_j) for u in used)
                assert all(u[4].diagonal == (symmetric and n_rows <= r.tile_i) for u in used)
                for a in range(row, min(row + r.tile_i, n_rows)):
                    for b in range(column, min(column + r.tile_j, n_columns)):
                        if not symmetric or a <= b:
                            entries[out + a * n_columns + b] += 1
                            if symmetric and a < b:
                                entries[out + b * n_columns + a] += 1
        assert not slots
    assert entries == Counter(range(plan.numel))


@settings(max_examples=60, deadline=None)
@given(ranks, st.integers(0, 700), st.integers(0, 90), st.booleans(), st.booleans())
def test_combine_work_covers_every_output_once(rs, length, rank, scalars, transposed):
    operand = [Piece(u, length, r, max(r, 1), 1, torch.float32, 16) for u, r in enumerate(rs)]
    rank = max(rs) if scalars else rank
    plan = CombinePlan([CombineTask(operand, rank, scalars, transposed, torch.float32, "tf32x3")] * 2, CPU)
    written = Counter()
    for variant, work in plan.launches:
        for _, _, first, n_columns, k0, n, j0, r, out, index in work.tolist():
            assert (n_columns, n, r) == (sum(rs), length, rank)
            assert first % 32 == 0
            assert out == plan.outputs[index].offset
            for k in range(k0, min(k0 + variant.tile_k, n)):
                for j in range(j0, min(j0 + variant.tile_r, r)):
                    written[out, k, j] += 1
    places = {(o.offset, k, j) for o in plan.outputs for k in range(length) for j in range(rank)}
    assert set(written) == places
    assert set(written.values()) <= {1}
    if length * rank:
        first, second = plan.outputs
        assert second.offset >= first.offset + length * rank
        assert second.offset % 64 == 0


@given(st.integers(0, 2**40), st.sampled_from([1, 2, 4, 8, 16]))
def test_power_of_two_divisor(number, cap):
    d = power_of_two_divisor(number, cap)
    assert number % d == 0
    assert d == cap or number % (2 * d)


@given(st.integers(0, 500), st.sampled_from([16, 64, 128]))
def test_tile_of(columns, largest):
    tile = tile_of(columns, largest)
    assert 16 <= tile <= largest
    assert tile == largest or columns <= tile
    assert tile == 16 or columns > tile // 2


def test_survey_tells_layouts_apart():
    """Same memory, other shape, stride, type, order or alignment: another layout; other memory alone: the same."""
    memory = torch.zeros(64)
    base = [memory[:12].view(3, 4)]
    key, pointers = survey(base)
    assert pointers.tolist() == [memory.data_ptr()]
    assert survey([torch.zeros(3, 4)])[0] == key
    others = [
        [memory[:12].view(4, 3)],
        [memory.as_strided((3, 4), (1, 3))],
        [memory.as_strided((3, 4), (5, 1))],
        [memory.view(torch.int32)[:12].view(3, 4)],
        [memory[1:13].view(3, 4)],
        [memory[:12].view(3, 4), memory[:12].view(3, 4)],
        [torch.zeros(3, 4, 1)],
    ]
    assert all(survey(other)[0] != key for other in others)
    assert len({survey(other)[0] for other in others}) == len(others)


def test_the_cache_keeps_the_latest_plans():
    cache, built = PlanCache[int](size=2), []

    def build(number):
        return cache.get((place(CPU), number), lambda: built.append(number) or number)

    assert [build(k) for k in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert built == [1, 2, 3, 2]


def test_nothing_made_within_a_capture_is_kept(monkeypatch):
    """Its memory is the graph's, and only replays fill it; plans of other streams serve instead."""
    cache, table = PlanCache[str](), AddressTable(np.array([0]), np.array([0]), CPU)
    cache.get(((CPU, 1), "layout"), lambda: "warm")
    warm = table.of(np.array([100]))
    monkeypatch.setattr(_plan, "capturing", lambda device: True)
    monkeypatch.setattr(_plan, "READ_BY_GRAPHS", {})
    assert cache.get(((CPU, 2), "layout"), lambda: "built within") == "warm"
    assert cache.get(((CPU, 2), "other"), lambda: "built within") == "built within"
    assert cache.get(((torch.device("meta"), 1), "layout"), lambda: "elsewhere") == "elsewhere"
    assert list(cache.plans) == [((CPU, 1), "layout")]
    assert table.of(np.array([200])).tolist() == [200]
    assert table.of(np.array([100])) is warm


def test_graphs_keep_what_they_read(monkeypatch):
    """Once each, when other tensors of the layout, or other layouts, have come after them."""
    monkeypatch.setattr(_plan, "READ_BY_GRAPHS", {})
    cache, key = PlanCache[AddressTable](size=1), ((CPU, None), "layout")
    plan = cache.get(key, lambda: AddressTable(np.array([0]), np.array([0]), CPU))
    plan.of(np.array([100]))
    with monkeypatch.context() as capture:
        capture.setattr(_plan, "capturing", lambda device: True)
        for _ in range(3):
            captured = cache.get(key, lambda: None).of(np.array([100]))
        cache.get(key, lambda: None).of(np.array([300]))  # made within, where the memory is the graph's own
    plan.of(np.array([200]))
    cache.get(((CPU, None), "other"), lambda: None)
    alive = weakref.ref(plan), weakref.ref(captured)
    del plan, captured
    gc.collect()
    assert all(one() is not None for one in alive)
    assert len(_plan.READ_BY_GRAPHS) == 2


def test_addresses_are_copied_only_when_tensors_move():
    table = AddressTable(np.array([0, 0, 1]), np.array([0, 8, 0]), CPU)
    first = table.of(np.array([100, 200]))
    assert first.tolist() == [100, 108, 200]
    assert table.of(np.array([100, 200])) is first
    assert table.of(np.array([100, 300])).tolist() == [100, 108, 300]
    assert first.tolist() == [100, 108, 200]  # a kernel may still be reading it
