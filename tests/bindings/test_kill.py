"""The command line killed (SIGKILL) at many moments, two at a time, on full disks and in places that are read-only."""

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from fedgram.bindings.peft import load_adapter
from fedgram_testing.hostile import BASES, write
from fedgram_testing.killing import FINISHED, at_change, contents, die, finish, start

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """Two clients, and two weights files: their results are told apart by every byte of lora_B."""
    root = tmp_path_factory.mktemp("clients")
    draft = BASES[3]  # layers and a saved head
    folders = [write(draft.copy(), root / name) for name in ("a", "b")]
    other = draft.copy()
    other.tensors = {
        key: (dtype, shape, [v * 3 for v in values]) for key, (dtype, shape, values) in other.tensors.items()
    }
    write(other, folders[1])
    (root / "first.json").write_text("[1, 2]")
    (root / "second.json").write_text("[5, 1]")
    return root


def command(clients, out, weights, *options):
    folders = [str(clients / name) for name in "ab"]
    return ["aggregate", *folders, "-o", str(out), "--quiet", "--weights", str(clients / f"{weights}.json"), *options]


@pytest.fixture(scope="module")
def results(clients, tmp_path_factory):
    """What two runs write that nobody disturbs."""
    place, made = tmp_path_factory.mktemp("undisturbed"), {}
    for weights in ("first", "second"):
        assert finish(start(command(clients, place / weights, weights), place / "errors")) == FINISHED
        made[weights] = contents(place / weights)
    assert made["first"] != made["second"]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("previous", [True, False], ids=["replaced", "new"])
def test_a_kill_at_any_change_of_the_file_system_leaves_a_whole_output(clients, results, tmp_path, previous):
    """One moment after the other: before each file that is made, opened, exchanged or removed."""
    out, errors = tmp_path / "work" / "out", tmp_path / "errors"
    out.parent.mkdir()
    for number in itertools.count(1, 1 if previous else 2):
        restore(out, results["first"] if previous else None)
        code = finish(start(command(clients, out, "second"), errors, at_change(number, die)))
        assert code in (-signal.SIGKILL, FINISHED), errors.read_text()
        found = contents(out)
        assert found in ((results["first"] if previous else None), results["second"])
        assert all(name == "out" or name.startswith(".out.") for name in os.listdir(out.parent))
        if number % 6 == 1 or code == FINISHED:
            assert finish(start(command(clients, out, "second"), errors)) == FINISHED, errors.read_text()
            assert contents(out) == results["second"]
            assert os.listdir(out.parent) == ["out"]  # what the killed run left is gone
        if code == FINISHED:
            assert found == results["second"]
            break
    assert number > 10


def restore(out, files):
    """The place as it was before a run."""
    shutil.rmtree(out.parent)
    out.parent.mkdir()
    if files is not None:
        out.mkdir()
        for name, data in files.items():
            (out / name).write_bytes(data)


def seconds_of_a_run(clients, out, errors):
    begin = time.perf_counter()
    assert finish(start(command(clients, out, "first"), errors)) == FINISHED
    return time.perf_counter() - begin


def test_a_kill_after_any_time_leaves_a_whole_output(clients, results, tmp_path):
    out, errors = tmp_path / "work" / "out", tmp_path / "errors"
    out.parent.mkdir()
    whole = min(seconds_of_a_run(clients, out, errors) for _ in range(3))  # one may be slowed down by other work
    killed, current = 0, "first"
    for i in range(20):
        aim = "second" if current == "first" else "first"
        pid = start(command(clients, out, aim), errors)
        time.sleep(whole * i / 16)
        os.kill(pid, signal.SIGKILL)
        killed += finish(pid) == -signal.SIGKILL
        found = contents(out)
        assert found in (results[current], results[aim])
        current = aim if found == results[aim] else current
    assert killed >= 5
    assert finish(start(command(clients, out, "first"), errors)) == FINISHED
    assert contents(out) == results["first"]
    assert os.listdir(out.parent) == ["out"]


def test_a_real_process_is_killed_while_it_writes(clients, results, tmp_path):
    """Not forked: the console script, killed as soon as anything appears beside the output."""
    out, errors = tmp_path / "work" / "out", tmp_path / "errors"
    assert finish(start(command(clients, out, "first"), errors)) == FINISHED
    arguments = [sys.executable, "-P", "-m", "fedgram.bench.cli", *command(clients, out, "second")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while len(os.listdir(out.parent)) == 1 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.kill()
    assert contents(out) in (results["first"], results["second"])
    assert finish(start(command(clients, out, "second"), errors)) == FINISHED
    assert contents(out) == results["second"]
    assert os.listdir(out.parent) == ["out"]


def test_two_runs_into_one_output_are_told_apart(clients, results, tmp_path):
    """One run is held in the middle; a second is refused at once; when the first is killed, nothing bars a third."""
    out, errors = tmp_path / "work" / "out", tmp_path / "errors"
    assert finish(start(command(clients, out, "first"), errors)) == FINISHED
    reader, writer = os.pipe()

    def hold():
        os.write(writer, b".")
        time.sleep(300)

    holder = start(command(clients, out, "second"), tmp_path / "holder", at_change(4, hold))
    try:
        assert os.read(reader, 1) == b"."
        link = tmp_path / "link"
        link.symlink_to(out.parent)
        for name in (out, link / "out"):  # by whatever name
            assert finish(start(command(clients, name, "second"), errors)) == 1
            [line] = errors.read_text().splitlines()
            assert line == f"fedgram: {out}: another run is writing this output (process {holder})"
        other = out.parent / "other"
        assert finish(start(command(clients, other, "second"), errors)) == FINISHED
        assert contents(out) == results["first"]
    finally:
        os.kill(holder, signal.SIGKILL)
        finish(holder)
    assert finish(start(command(clients, out, "second"), errors)) == FINISHED, errors.read_text()
    assert contents(out) == results["second"]
    assert sorted(os.listdir(out.parent)) == ["other", "out"]


def one_refusal(arguments, errors, before=lambda: None) -> str:
    assert finish(start(arguments, errors, before)) == 1
    [line] = errors.read_text().splitlines()
    assert line.startswith("fedgram: ")
    return line


def test_a_file_that_may_not_grow_is_reported_and_the_previous_output_stays(clients, results, tmp_path):
    out, errors = tmp_path / "work" / "out", tmp_path / "errors"
    assert finish(start(command(clients, out, "first"), errors)) == FINISHED
    for limit in (700, 1500):  # what is to be said fits
        limits = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        line = one_refusal(command(clients, out, "second"), errors, limits)
        assert str(out.parent) in line
        assert "File too large" in line
        assert contents(out) == results["first"]
        assert os.listdir(out.parent) == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = sys.platform == "linux" and shutil.which("mount") is not None
    if (
        not mounted
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_reported_and_the_previous_output_stays(clients, results, tmp_path, small_disk):
    out, errors = small_disk / "out", tmp_path / "errors"
    assert finish(start(command(clients, out, "first"), errors)) == FINISHED
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            try:
                filler.write(bytes(1024))
            except OSError:
                break
    line = one_refusal(command(clients, out, "second"), errors)
    assert str(small_disk) in line
    assert "No space left on device" in line
    assert contents(out) == results["first"]
    assert sorted(os.listdir(small_disk)) == ["filler", "out"]
    (small_disk / "filler").unlink()
    assert finish(start(command(clients, out, "second"), errors)) == FINISHED
    assert contents(out) == results["second"]


@pytest.mark.skipif(sys.platform != "linux", reason="a place that not even root may write")
def test_a_place_that_cannot_be_written_is_reported(clients, tmp_path):
    for out in ("/sys/out", "/proc/out"):
        line = one_refusal(command(clients, out, "first"), tmp_path / "errors")
        assert out in line


def test_the_output_of_a_killed_run_can_be_loaded(clients, tmp_path):
    """Even a first run that dies leaves nothing that could be taken for an output."""
    out = tmp_path / "out"
    for number in (1, 3, 5, 8):
        finish(start(command(clients, out, "first"), tmp_path / "errors", at_change(number, die)))
        if out.exists():
            assert load_adapter(out).modules
