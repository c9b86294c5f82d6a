"""Which runs take over what an interrupted one had finished: the same again, and no others."""

import json
import os

import pytest
import torch

from fedgram.bindings.files.tensor_file import TensorFile
from fedgram.bindings.peft import load_adapter, load_adapters
from fedgram.bindings.streaming import aggregate_directories, aggregate_to_directory
from fedgram.flora_na import Adapter, portions
from fedgram_testing.streaming import files_of, interrupt_after, interrupted, write_adapter, write_clients


@pytest.fixture(autouse=True)
def one_module_at_a_time(monkeypatch):
    """So small are the test's modules that portions must be made smaller for there to be several."""
    monkeypatch.setattr(portions, "CHUNK_BYTES", 1)


CHANGES = {
    "weights": lambda dirs: {"weights": [1, 1, 3]},
    "method": lambda dirs: {"method": "svd"},
    "rank": lambda dirs: {"rank": 2},
    "order": lambda dirs: dirs.reverse() or {},
    "one client less": lambda dirs: dirs.pop() and {},
    "other values": lambda dirs: write_adapter(dirs[1], seed=77, r=3, alpha=5) and {},
    "touched": lambda dirs: os.utime(dirs[0] / "adapter_model.safetensors", (1, 1)) or {},
    "configuration": lambda dirs: write_adapter(dirs[1], seed=1, r=3, alpha=9) and {},
    "not wanted": lambda dirs: {"resume": False},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_starts_anew(tmp_path, change):
    dirs = write_clients(tmp_path)
    interrupted(dirs, tmp_path / "out")
    options = CHANGES[change](dirs)
    expected = aggregate_directories(dirs, tmp_path / "expected", **options).report
    found = aggregate_directories(dirs, tmp_path / "out", **options)
    assert found.resumed == 0
    assert found.report.to_dict() == expected.to_dict()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


@pytest.fixture
def root(tmp_path):
    """Clients, links to them, a second adapter of each that lies elsewhere, and two global adapters of one layout."""
    for name, start in (("c", 0), ("store", 10), ("g", 20)):
        for i in range(2):
            head = {"head.weight": torch.full((3,), float(start + i))}
            write_adapter(tmp_path / f"{name}{i}", seed=start + i, saved=head, config={"init_lora_weights": True})
    for i in range(2):
        (tmp_path / f"l{i}").symlink_to(f"c{i}")
        (tmp_path / f"c{i}" / "other").symlink_to(f"../store{i}")
    return tmp_path


def clients(root, names=("c0", "c1"), **options):
    return load_adapters([root / name for name in names], **options)


def exchange(first, second):
    places = [os.readlink(first), os.readlink(second)]
    for link, place in zip((second, first), places, strict=True):
        link.unlink()
        link.symlink_to(place)


def bare(adapter):
    return Adapter(adapter.modules, {}, adapter.config)


def in_memory(path):
    return dict(load_adapter(path).modules)


RUNS = {
    "clients": lambda root: (clients(root), {}),
    "exchanged": lambda root: (clients(root, ("c1", "c0")), {}),
    "other adapter": lambda root: (clients(root, adapter_name="other"), {}),
    "since c0": lambda root: (clients(root, init=root / "c0"), {}),
    "without extras": lambda root: ([bare(adapter) for adapter in clients(root)], {}),
    "links": lambda root: (clients(root, ("l0", "l1")), {"names": "ab"}),
    "links exchanged": lambda root: (
        exchange(root / "l0", root / "l1") or (clients(root, ("l0", "l1")), {"names": "ab"})
    ),
    "anchored": lambda root: (
        clients(root),
        {"anchor": load_adapter(root / "g0"), "align_to": load_adapter(root / "g1")},
    ),
    "anchor and alignment exchanged": lambda root: (
        clients(root),
        {"anchor": load_adapter(root / "g1"), "align_to": load_adapter(root / "g0")},
    ),
    "anchored in memory": lambda root: (clients(root), {"anchor": in_memory(root / "g0")}),
    "another in memory": lambda root: (clients(root), {"anchor": in_memory(root / "g1")}),
}


def run(root, name, output, **options):
    adapters, more = RUNS[name](root)
    return aggregate_to_directory(adapters, output, [1, 9], **more, **options)


def stop(root, name, output):
    with pytest.raises(KeyboardInterrupt):
        run(root, name, output, progress=interrupt_after(2))


@pytest.mark.parametrize("name", [name for name in RUNS if "memory" not in name])
def test_the_same_again_is_taken_over(root, name):
    adapters, more = RUNS[name](root)
    with pytest.raises(KeyboardInterrupt):
        aggregate_to_directory(adapters, root / "out", [1, 9], **more, progress=interrupt_after(2))
    name = name.replace("links exchanged", "links")  # they are exchanged now
    assert run(root, name, root / "out").resumed == 2
    assert run(root, name, root / "expected").resumed == 0
    assert files_of(root / "out") == files_of(root / "expected")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("clients", "exchanged"),
        ("clients", "other adapter"),
        ("clients", "since c0"),
        ("clients", "without extras"),
        ("without extras", "clients"),
        ("links", "links exchanged"),
        ("anchored", "anchor and alignment exchanged"),
        ("anchored in memory", "another in memory"),
    ],
)
def test_another_run_on_the_same_files_starts_anew(root, first, second):
    stop(root, first, root / "out")
    adapters, more = RUNS[second](root)
    assert aggregate_to_directory(adapters, root / "out", [1, 9], **more).resumed == 0
    aggregate_to_directory(adapters, root / "expected", [1, 9], **more)
    assert files_of(root / "out") == files_of(root / "expected")


def test_an_adapter_in_a_linked_folder_is_told_from_what_it_was(root):
    stop(root, "other adapter", root / "out")
    write_adapter(root / "store0", seed=99, saved={"head.weight": torch.zeros(3)})
    assert run(root, "other adapter", root / "out").resumed == 0
    run(root, "other adapter", root / "expected")
    assert files_of(root / "out") == files_of(root / "expected")


def test_what_else_lies_in_a_clients_directory_counts_for_nothing(root):
    """Also not the journal, where the output is one of its folders."""
    (root / "c0" / "tokenizer.json").symlink_to("nowhere")
    out = root / "c0" / "global"
    stop(root, "clients", out)
    (root / "c1" / "notes.json").write_text("{}")
    assert run(root, "clients", out).resumed == 2
    run(root, "clients", root / "expected")
    assert files_of(out) == files_of(root / "expected")


def in_a_shard(folder):
    keys = TensorFile(folder / "adapter_model.safetensors").specs
    (folder / "adapter_model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "part.safetensors")}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


def test_every_shard_counts(root):
    in_a_shard(root / "c0")
    stop(root, "clients", root / "out")
    write_adapter(root / "new", seed=99, saved={"head.weight": torch.zeros(3)})
    (root / "new" / "adapter_model.safetensors").rename(root / "c0" / "part.safetensors")
    assert run(root, "clients", root / "out").resumed == 0
