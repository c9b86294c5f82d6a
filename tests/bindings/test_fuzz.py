"""A fixed part of the damaged adapters (``make fuzz`` runs many more): each is read right or refused in one line."""

import json
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedgram.bindings._cli.weights_file import read_weights
from fedgram.bindings.files.documents import MAX_BYTES, read_json
from fedgram.bindings.files.tensor_file import TensorFile
from fedgram.bindings.files.tensor_header import MAX_HEADER
from fedgram.bindings.peft import load_adapter
from fedgram_testing import fuzzing
from fedgram_testing.fuzzing import BrokenPromiseError, Fuzzer, Hang
from fedgram_testing.hostile import BASES, LOADABLE, build, write
from fedgram_testing.hostile_bases import CONFIG, WEIGHTS, Header, file_of
from fedgram_testing.hostile_mutations import STAGES, Bomb, replaced_by_pipe

CASES, WITH_CLI = 1200, 12


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
def test_every_damaged_adapter_is_read_right_or_refused_in_one_line(fuzzer):
    outcomes = [fuzzer.case(f"fixed-{i}", cli=i % WITH_CLI == 0) for i in range(CASES)]
    accepted = sum(outcome.accepted for outcome in outcomes)
    assert CASES // 20 < accepted < CASES // 2  # the corpus neither misses nor kills everything
    codes = [outcome.exit_code for outcome in outcomes if outcome.exit_code is not None]
    assert set(codes) == {0, 1}
    used = {word.split("(")[0] for outcome in outcomes for word in outcome.label.split()}
    assert {mutate.__name__ for _, mutations in STAGES.values() for mutate in mutations} <= used


def test_a_case_is_always_the_same(tmp_path):
    def contents(name):
        (tmp_path / name).mkdir()
        labels = []
        for i in range(40):
            (tmp_path / name / str(i)).mkdir()
            labels.append(build(f"again-{i}", tmp_path / name / str(i)))
        files = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        return labels, [(str(f.relative_to(tmp_path / name)), f.read_bytes()) for f in files if f.stat().st_size]

    assert contents("a") == contents("b")


@pytest.mark.parametrize("kind", LOADABLE)
def test_what_is_not_damaged_is_read(tmp_path, kind):
    [draft] = [draft for draft in BASES if draft.kind == kind]
    adapter = load_adapter(write(draft, tmp_path / kind))
    for key, (_, shape, values) in draft.tensors.items():
        module = key.removeprefix("base_model.model.").split(".lora_")[0]
        if "lora_" in key:
            layer = adapter.modules[module]
            tensor = layer.A if ".lora_A." in key else layer.B
        else:
            tensor = adapter.extras[key]
        torch.testing.assert_close(tensor.float(), torch.tensor(values).reshape(shape), rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("command", "name", "mutate", "reason"),
    [
        ("aggregate", WEIGHTS, lambda path: None, "not a whole safetensors file"),
        ("inspect", CONFIG, lambda path: replaced_by_pipe(random.Random(), path, path.parent), "not a regular file"),
    ],
)
def test_real_processes_refuse_in_one_line(tmp_path, command, name, mutate, reason):
    """What the other cases do inside the test's process, from outside: exit code, streams, files."""
    client = write(BASES[0], tmp_path / "client")
    (client / name).write_bytes(pickle.dumps(Bomb()))
    mutate(client / name)
    before = set(tmp_path.rglob("*"))
    place = ["-o", str(tmp_path / "out")] if command == "aggregate" else []
    arguments = [sys.executable, "-P", "-m", "fedgram.bench.cli", command, str(client), *place, "--quiet"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("fedgram: ")
    assert f"{client / name}: {reason}" in line
    assert set(tmp_path.rglob("*")) == before


# That the harness itself can fail.


def test_the_watch_sees_what_must_not_happen(fuzzer, tmp_path):
    inside = tmp_path / "root" / "case"
    inside.mkdir(parents=True)
    (tmp_path / "elsewhere").write_text("x")

    def act(action):
        with fuzzer.watch.over(inside):
            action()

    act(lambda: (inside / "fine").write_text("x"))
    for action, told in (
        (lambda: (tmp_path / "elsewhere").read_text(), "opened"),
        (lambda: (tmp_path / "new").write_text("x"), "for writing"),
        (lambda: (tmp_path / "folder").mkdir(), "os.mkdir"),
        (lambda: os.rename(inside / "fine", tmp_path / "moved"), "os.rename"),
        (lambda: subprocess.run(["true"], check=True), "subprocess.Popen"),
    ):
        with pytest.raises(BrokenPromiseError, match=told):
            act(action)


def test_pickles_hangs_crashes_and_other_readings_are_noticed(fuzzer, monkeypatch):
    def reader(instead):
        monkeypatch.setattr(fuzzing, "_read", instead)

    reader(lambda path, **_: torch.load(path))
    with pytest.raises(BrokenPromiseError, match="pickle"):
        fuzzer.case("x", cli=False)
    reader(lambda path, **_: time.sleep(60))
    monkeypatch.setattr(fuzzing, "SECONDS", 0.1)
    with pytest.raises(Hang):
        fuzzer.case("x", cli=False)
    reader(lambda path, **_: {}["crash"])
    with pytest.raises(KeyError):
        fuzzer.case("x", cli=False)
    reader(lambda path, **_: int("no file is named here"))
    with pytest.raises(BrokenPromiseError, match="does not name the file"):
        fuzzer.case("x", cli=False)


@pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")
def test_memory_beyond_the_files_is_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzzing, "_read", lambda path, **_: torch.ones(30 << 20))
    with pytest.raises(BrokenPromiseError, match="MiB of memory for files of"):
        fuzzer.case("x", cli=False)


# Single traps, by name.


def header_file(path: Path, text: bytes) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "its header is not valid: it does not begin with an object"),
        (b" {}", "its header is not valid: it does not begin with an object"),
        (b'{"a":{}}', "a: expected dtype, shape, data_offsets and nothing else"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', "'a' is there twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "'dtype' is there twice"),
        (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,0]}}', "not lists of sizes"),
        (b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', "not lists of sizes"),
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}}', "is not supported"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "end at byte 66 of 62"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":1}}', "nothing else"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "not Unicode"),
        (b'{"__metadata__":{"a":"\\udc00"}}', "__metadata__ is not an object of strings"),
        (b'{"__metadata__":{"a":1}}', "__metadata__ is not an object of strings"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":' * 3000, "its header is not valid"),
        (b'{"\xff":1}', "its header is not valid"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, text, reason):
    with pytest.raises(ValueError, match=r"not a whole safetensors file|is not supported") as caught:
        TensorFile(header_file(tmp_path / "x.safetensors", text))
    assert str(tmp_path / "x.safetensors") in str(caught.value)
    assert reason in str(caught.value)


def test_a_header_of_a_hundred_million_bytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((100_000_000).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)  # a sparse file
    with pytest.raises(ValueError, match="a header of more than 24 MiB"):
        TensorFile(path)


def test_tensors_that_overlap_or_leave_a_gap_are_refused(tmp_path):
    for second in ([0, 8], [12, 20]):
        entries = [
            (name, {"dtype": "F32", "shape": [2], "data_offsets": o}) for name, o in (("a", [0, 8]), ("b", second))
        ]
        (tmp_path / "x").write_bytes(file_of(Header(entries, bytes(20))))
        with pytest.raises(ValueError, match="b: its bytes do not follow"):
            TensorFile(tmp_path / "x")


def test_a_file_that_changes_or_shrinks_while_it_is_read_is_refused(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    with open(tmp_path / "x", "r+b") as other:
        other.truncate(200)
    with pytest.raises(ValueError, match="x: changed while it was being read"):
        file.read("a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_pipes_devices_and_loops_are_not_opened(tmp_path, name):
    client = write(BASES[0], tmp_path / "c")

    def put(make):
        (client / name).unlink(missing_ok=True)
        make(client / name)

    for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p.name)):
        put(make)
        with pytest.raises(ValueError, match=f"{name}: (not a regular file|no such file)|no {name}"):
            load_adapter(client)


def test_links_to_files_are_followed_as_model_caches_make_them(tmp_path):
    client = write(BASES[0], tmp_path / "c")
    for name in (CONFIG, WEIGHTS):
        (client / name).rename(tmp_path / f"blob-{name}")
        (client / name).symlink_to(f"../blob-{name}")
    assert len(load_adapter(client).modules) == 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"r": 1, "r": 2}', "'r' is there twice"),
        (b"[" * 40 + b"]" * 40, "nested more than 32 deep"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xef\xbb\xbf" * 2 + b'{"r": 1}', "not valid JSON"),  # one byte order mark is passed over
        ('{"r": 1}'.encode("utf-16"), "not valid JSON"),
        (b" " * (9 << 20), "larger than 8 MiB"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_documents_that_are_ambiguous_deep_or_large_are_refused(tmp_path, data, reason):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json: ") as caught:
        read_json(tmp_path / "x.json")
    assert reason in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")
@pytest.mark.parametrize(("trap", "factor"), [("metadata", 20), ("tensors", 20), ("json", 40)])
def test_parsing_takes_a_bounded_multiple_of_what_is_parsed(tmp_path, trap, factor):
    """Many small things cost most: entries of a few bytes become objects of a hundred. With headers of at most 24 MiB
    and documents of at most 8 MiB these factors keep every parse below half a gigabyte.
    """
    assert factor * (MAX_BYTES if trap == "json" else MAX_HEADER) < 512 << 20
    path, size = tmp_path / "file", 2 << 20
    if trap == "json":
        path.write_bytes(b"[" + b"[]," * (size // 3 - 2) + b"0]")
    else:
        entry = '"{:06x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},' if trap == "tensors" else '"{:06x}":"",'
        body = "".join(entry.format(i) for i in range(size // len(entry.format(0)) - 3))[:-1]
        header_file(path, (f"{{{body}}}" if trap == "tensors" else f'{{"__metadata__":{{{body}}}}}').encode())
    before = fuzzing.reset_peak()
    read_json(path) if trap == "json" else TensorFile(path)
    assert fuzzing.peak() - before < factor * size


def test_the_report_of_the_long_run(tmp_path):
    """The script of ``make fuzz``, on a few cases."""
    script, out = Path(__file__).parents[1] / "fuzz.py", tmp_path / "fuzz.json"
    environment = os.environ | {"PYTHONPATH": str(script.parent / "support")}
    arguments = ["--cases", "40", "--every", "10", "--seed", "report", "--json", str(out), "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-P", str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["cases"] == 40 == report["accepted"] + report["refused"]
    assert sum(report["command_line"].values()) >= 4
    assert report["broken"] == []


@pytest.mark.parametrize(("rank", "fits"), [(1024, True), (1025, False)])
def test_a_rank_far_above_the_matrix_is_refused(tmp_path, rank, fits):
    """A file of a few kilobytes would keep a server busy for hours: work grows with the cube of the rank."""
    draft = BASES[0].copy()
    draft.config |= {"r": rank}
    draft.tensors = {
        "base_model.model.q_proj.lora_A.weight": ("F32", [rank, 2], [0.0] * 2 * rank),
        "base_model.model.q_proj.lora_B.weight": ("F32", [3, rank], [0.0] * 3 * rank),
    }
    client = write(draft, tmp_path / "c")
    if fits:
        assert load_adapter(client).modules["q_proj"].rank == rank
    else:
        with pytest.raises(ValueError, match=f"{WEIGHTS}: q_proj: rank 1025 of a 3 x 2 matrix: at most 1024 is"):
            load_adapter(client)


def test_weights_of_one_client_twice_are_refused(tmp_path):
    (tmp_path / "w.json").write_text('{"c": 1, "c": 2}')
    with pytest.raises(ValueError, match=r"w\.json: not valid JSON \('c' is there twice\)"):
        read_weights(tmp_path / "w.json", [tmp_path / "c"])
