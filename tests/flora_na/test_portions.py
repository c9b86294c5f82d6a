"""Adapters read lazily, a few modules at a time: once, in order, checked before, and held by nobody afterwards."""

import gc
import weakref

import pytest

from fedgram import flora_na
from fedgram.flora_na import LoraLayer, aggregation, portions
from fedgram_testing.cohorts import SHAPES, cohort
from fedgram_testing.recorded import Counted


def test_lazy_adapters_are_read_once_a_few_modules_at_a_time(monkeypatch):
    lazy = [Counted(a.modules) for a in cohort()]
    monkeypatch.setattr("fedgram.flora_na.portions.CHUNK_BYTES", 1)
    seen = []
    flora_na.aggregate(lazy, progress=lambda done, total, name: seen.append((done, total, name, list(lazy[0].reads))))
    assert [s[:3] for s in seen] == [(i + 1, 3, name) for i, name in enumerate(SHAPES)]
    assert seen[0][3] == ["layer.0.query"]
    assert all(adapter.reads == list(SHAPES) for adapter in lazy)


@pytest.mark.parametrize("aggregate", [flora_na.aggregate, flora_na.aggregate_for_clients])
def test_layers_that_were_read_are_not_held_by_the_report(aggregate, monkeypatch):
    monkeypatch.setattr("fedgram.flora_na.portions.CHUNK_BYTES", 1)
    known = []

    class Reader(Counted):
        def __getitem__(self, name):
            layer = super().__getitem__(name)
            read = LoraLayer(A=layer.A.clone(), B=layer.B.clone())
            known.append(weakref.ref(read.B))
            return read

    found = aggregate([Reader(a.modules) for a in cohort(ranks=[3, 4, 3, 3])], method="fedavg")
    gc.collect()
    assert found
    assert not any(ref() is not None for ref in known)


def test_a_layer_that_vanishes_is_no_missing_module():
    """``Mapping.get`` takes a KeyError from within the reader for one: the target would then be without the client."""

    class Vanished(Counted):
        def __getitem__(self, name):
            raise KeyError(name)

    adapters = [*cohort(3), Vanished(cohort()[0].modules)]
    for missing in ("error", "renormalize"):
        with pytest.raises(ValueError, match=r"layer\.0\.query: client 3 has no such module"):
            list(flora_na.iter_aggregate(adapters, missing=missing))


def test_what_a_stream_needs_is_checked_before_its_first_portion(monkeypatch):
    monkeypatch.setattr(portions, "CHUNK_BYTES", 1)
    adapters = cohort()
    short = {name: adapters[0].modules[name] for name in ("layer.0.query", "layer.0.value")}
    for options in ({"anchor": short}, {"align_to": short}):
        with pytest.raises(ValueError, match=r"has no module layer\.1\.query"):
            flora_na.iter_aggregate(adapters, **options)
    with pytest.raises(ValueError, match="method: expected one of"):
        flora_na.iter_aggregate(adapters, method="mean", clip="2x")


@pytest.mark.parametrize("argument", ["anchor", "align_to"])
def test_a_module_of_clients_that_are_left_out_need_not_be_in_the_anchor(argument):
    first = cohort(1)[0].modules
    against = {name: LoraLayer(A=layer.A, B=-layer.B, scaling=2.0) for name, layer in first.items()}
    adapters = [first, first, first, against | {"extra": first["layer.0.query"]}]
    parts = flora_na.iter_aggregate(adapters, missing="zero", min_cosine=0.0, **{argument: first})
    assert [name for part in parts for name in part.report.modules] == list(SHAPES)


def test_clipping_layers_in_memory_leaves_their_yardsticks_for_later(monkeypatch):
    settled = []
    monkeypatch.setattr(flora_na.ModuleReport, "settled", lambda report: settled.append(report) or report)
    modules = [adapter.modules for adapter in cohort()]
    flora_na.aggregate(modules, clip="0.5x")
    assert not settled
    flora_na.aggregate([Counted(own) for own in modules], clip="0.5x")
    assert len(settled) == len(SHAPES)


def test_progress_of_a_stream_counts_all_modules(monkeypatch):
    monkeypatch.setattr(portions, "CHUNK_BYTES", 1)
    seen = []
    list(flora_na.iter_aggregate(cohort(), progress=lambda *told: seen.append(told)))
    assert seen == [(i + 1, 3, name) for i, name in enumerate(SHAPES)]


@pytest.mark.parametrize(("lazy", "budget"), [(True, "CHUNK_BYTES"), (False, "HELD_BYTES")])
def test_portions_of_adapters_in_memory_have_a_budget_of_their_own(lazy, budget, monkeypatch):
    adapters, sizes = cohort(), []
    assert portions.CHUNK_BYTES < portions.HELD_BYTES
    given = [Counted(a.modules) if lazy else a.modules for a in adapters]
    whole = aggregation.estimate_targets
    monkeypatch.setattr(
        aggregation, "estimate_targets", lambda targets, **o: sizes.append(len(targets)) or whole(targets, **o)
    )
    flora_na.aggregate(given)
    monkeypatch.setattr(portions, budget, 1)
    flora_na.aggregate(given)
    assert sizes == [3, 1, 1, 1]
