"""Outputs are whole or not there: exceptions, kills, full disks, two writers at once, other people's files."""

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from fedgram.bindings.files import staging
from fedgram.bindings.files.staging import check_writable, reserved_output, staged_directory
from fedgram.bindings.peft import load_adapter, save_adapter
from fedgram.flora_na import Adapter, LoraLayer

OWNED = frozenset({"a", "b"})


def write(path, text):
    with staged_directory(path, OWNED) as stage:
        (stage / "a").write_text(text)
        (stage / "b").write_text(text)


def write_and_stop(path):
    with staged_directory(path, OWNED) as stage:
        (stage / "a").write_text("2")
        raise KeyboardInterrupt


def content(path):
    return {entry.name: entry.read_text() for entry in path.iterdir()}


def adapter(value: float, size: int = 4) -> Adapter:
    return Adapter({"m": LoraLayer(A=torch.full((2, size), value), B=torch.full((size, 2), value))})


def test_a_new_directory_appears_with_its_parents_and_ordinary_permissions(tmp_path):
    write(tmp_path / "x" / "y" / "out", "1")
    assert content(tmp_path / "x" / "y" / "out") == {"a": "1", "b": "1"}
    os.mkdir(tmp_path / "ordinary")
    assert (tmp_path / "x" / "y" / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o555])
def test_a_directory_that_is_replaced_keeps_its_mode(tmp_path, mode):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(mode)
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode | 0o700


def test_an_earlier_output_and_an_empty_directory_are_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "1")
    write(tmp_path / "out", "2")
    assert content(tmp_path / "out") == {"a": "2", "b": "2"}
    assert os.listdir(tmp_path) == ["out"]


def test_owned_directories_are_replaced_with_what_they_hold_and_no_others(tmp_path):
    owned = frozenset({"a", "deep/"})
    for text in ("1", "2"):
        with staged_directory(tmp_path / "out", owned) as stage:
            (stage / "a").write_text(text)
            (stage / "deep" / "er").mkdir(parents=True)
            (stage / "deep" / "er" / text).write_text(text)
    assert [path.name for path in (tmp_path / "out" / "deep" / "er").iterdir()] == ["2"]
    for name, make in (("a", os.mkdir), ("deep", lambda path: path.write_text("3"))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / name)  # the kind that this name has not
        with pytest.raises(ValueError, match=f"holds '{name}', which would be lost"):
            check_writable(tmp_path / name, owned)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_an_exception_leaves_the_previous_output(tmp_path, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda stage, target: False)
    write(tmp_path / "out", "1")
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(tmp_path / "out")
    assert content(tmp_path / "out") == {"a": "1", "b": "1"}
    write(tmp_path / "out", "3")
    assert content(tmp_path / "out") == {"a": "3", "b": "3"}
    assert os.listdir(tmp_path) == ["out"]


def test_where_the_second_of_two_renames_fails_the_previous_output_comes_back(tmp_path, monkeypatch):
    write(tmp_path / "out", "1")
    monkeypatch.setattr(staging, "_exchange", lambda stage, target: False)
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise PermissionError(13, "Permission denied", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(PermissionError):
        write(tmp_path / "out", "2")
    assert content(tmp_path / "out") == {"a": "1", "b": "1"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_linux_exchanges_in_one_step(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert staging._exchange(tmp_path / "x", tmp_path / "y")
    assert os.listdir(tmp_path / "x") == ["y"]
    assert os.listdir(tmp_path / "y") == ["x"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_on_linux_an_output_is_replaced_without_a_second_step(tmp_path, monkeypatch):
    write(tmp_path / "out", "1")
    seen = []
    monkeypatch.setattr(os, "rename", lambda *names: pytest.fail("there was a moment without an output"))
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **k: (seen.append(content(tmp_path / "out")), remove(path, **k)))
    write(tmp_path / "out", "2")
    assert seen == [{"a": "2", "b": "2"}]  # the previous files went after the new ones were in place


def test_directories_with_other_files_are_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    for action in (lambda: write(tmp_path / "out", "1"), lambda: check_writable(tmp_path / "out", OWNED)):
        with pytest.raises(ValueError, match=r"out: holds 'thesis.txt', which would be lost"):
            action()
    assert content(tmp_path / "out") == {"thesis.txt": "years"}


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="out: not a directory"):
        write(tmp_path / "out", "1")
    with pytest.raises(OSError, match="out"):
        write(tmp_path / "out" / "below", "1")


def test_a_link_to_a_directory_is_followed(tmp_path):
    write(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "2")
    assert content(tmp_path / "real") == {"a": "2", "b": "2"}
    assert (tmp_path / "link").is_symlink()


def test_two_writers_of_one_output_are_told_apart(tmp_path):
    write(tmp_path / "out", "0")
    with staged_directory(tmp_path / "out", OWNED) as stage:
        (stage / "a").write_text("1")
        with pytest.raises(OSError, match="another run is writing this output"):
            write(tmp_path / "out", "2")
        write(tmp_path / "other", "3")
    assert content(tmp_path / "out") == {"a": "1"}


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".out.0123.partial").mkdir()
    (tmp_path / ".out.0123.partial" / "a").write_text("half")
    (tmp_path / ".outer.0123.partial").mkdir()
    write(tmp_path / "out", "1")
    assert sorted(os.listdir(tmp_path)) == [".outer.0123.partial", "out"]


def test_names_with_glob_characters_match_only_themselves(tmp_path):
    (tmp_path / ".outx.0123.partial").mkdir()
    write(tmp_path / "out[x]", "1")
    write(tmp_path / "*", "1")
    assert sorted(os.listdir(tmp_path)) == ["*", ".outx.0123.partial", "out[x]"]


def rewrite_for_ever(out, start: int, done: int, size: int = 50_000) -> None:
    """In a child process: write the output with one value after another, a byte into ``done`` after each."""
    torch.set_num_threads(1)  # the parent's threads do not live on in a fork
    try:
        for value in range(start, start + 100_000):
            save_adapter(adapter(float(value), size), out)
            os.write(done, b".")
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on: the child sets one thread
def test_kill_at_any_moment_leaves_a_whole_output(tmp_path):
    """A process rewrites the output over and over and is killed (SIGKILL) at twenty different moments."""
    out, seen = tmp_path / "out", set()
    save_adapter(adapter(0.0, 50_000), out)
    for i in range(20):
        written, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            rewrite_for_ever(out, (i + 1) * 100_000, done)
        os.close(done)
        assert os.read(written, 1) == b"."
        time.sleep(0.0007 * i)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(written)
        layer = load_adapter(out).modules["m"]
        value = layer.A[0, 0]
        assert bool((value == layer.A).all())
        assert bool((value == layer.B).all())
        seen.add(float(value) // 100_000)
    assert seen == set(range(1, 21))
    save_adapter(adapter(0.0), out)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the swap is two renames")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_at_no_moment_is_there_no_output(tmp_path):
    """While a process rewrites the output 50 times, every look finds it."""
    out = tmp_path / "out"
    save_adapter(adapter(0.0, 100), out)
    written, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        rewrite_for_ever(out, 1, done, 100)
    os.close(done)
    try:
        assert os.read(written, 1) == b"."
        swaps, last = 0, 0
        while swaps < 50:
            now = out.stat().st_ino
            swaps, last = swaps + (now != last), now
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(written)


FULL_DISK = """
import resource, signal, sys, torch
from fedgram.bindings.peft import save_adapter
from fedgram.flora_na import Adapter, LoraLayer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
layer = LoraLayer(A=torch.ones(2, 50_000), B=torch.ones(50_000, 2))
try:
    save_adapter(Adapter({"m": layer}), sys.argv[1])
except OSError as error:
    print("OSError", error.strerror)
"""


def test_a_file_that_cannot_grow_leaves_the_previous_output(tmp_path):
    save_adapter(adapter(1.0), tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-P", "-c", FULL_DISK, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "OSError File too large\n"
    assert float(load_adapter(tmp_path / "out").modules["m"].A[0, 0]) == 1.0
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users and rights")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_place_of_somebody_else_is_named(tmp_path):
    """Root may write anywhere, so a child process gives its rights up first."""
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    pid = os.fork()
    if pid == 0:
        os.chdir(place)  # the folders above may be closed to others
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        try:
            check_writable("out", OWNED)
        except PermissionError as error:
            os._exit(0 if str(error.filename) == str(place / "out") else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.listdir(place) == []


def test_files_that_came_while_it_was_written_are_not_lost(tmp_path):
    write(tmp_path / "out", "1")
    writing = contextlib.ExitStack()
    (writing.enter_context(staged_directory(tmp_path / "out", OWNED)) / "a").write_text("2")
    (tmp_path / "out" / "thesis").write_text("years")
    with pytest.raises(ValueError, match="holds 'thesis'"):
        writing.close()
    assert content(tmp_path / "out") == {"a": "1", "b": "1", "thesis": "years"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_directory_of_an_owned_name_is_kept(tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds 'a'"):
        write(tmp_path / "out", "1")


def test_a_run_that_died_between_two_renames_is_made_good(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_exchange", lambda stage, target: False)
    write(tmp_path / "out", "1")
    (tmp_path / "out").rename(tmp_path / ".out.0123456789abcdef.previous")
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(tmp_path / "out")
    assert content(tmp_path / "out") == {"a": "1", "b": "1"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_is_reserved_for_one_thread_until_it_is_given_back(tmp_path):
    told = []

    def other():
        with pytest.raises(OSError, match=r"another run is writing this output \(process \d+\)") as caught:
            write(tmp_path / "out", "other")
        told.append(caught.value.filename)

    with reserved_output(tmp_path / "out", OWNED):
        for text in ("1", "2"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            write(tmp_path / "out", text)
            assert content(tmp_path / "out") == {"a": text, "b": text}
        with pytest.raises(OSError, match="another run"), staged_directory(tmp_path / "out", OWNED):
            write(tmp_path / "out", "3")
    assert told == [str(tmp_path / "out")] * 2
    write(tmp_path / "out", "4")
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_that_a_killed_run_left_does_not_bar(tmp_path):
    (tmp_path / ".out.lock").write_text("4711")
    write(tmp_path / "out", "1")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["o" * 200, "名" * 80])
def test_long_names_have_stages_and_locks_of_their_own(tmp_path, name):
    with staged_directory(tmp_path / name, OWNED) as stage:
        (stage / "a").write_text("1")
        write(tmp_path / (name[:-1] + "x"), "2")
    assert content(tmp_path / name) == {"a": "1"}
    assert sorted(os.listdir(tmp_path)) == sorted([name, name[:-1] + "x"])


def test_errors_name_the_output_and_not_its_stage(tmp_path):
    def fail():
        with staged_directory(tmp_path / "out", OWNED) as stage:
            (stage / "a" / "b").write_text("x")

    with pytest.raises(FileNotFoundError) as caught:
        fail()
    assert caught.value.filename == str(tmp_path / "out" / "a" / "b")


def failing_syncs(monkeypatch, code, which):
    """Have the syncs of directories fail that ``which`` takes the number of, counted from 1."""
    real, count = os.fsync, iter(range(1, 100))

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and which(next(count)):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_file_systems_that_do_not_sync_directories_are_written_to(tmp_path, monkeypatch):
    failing_syncs(monkeypatch, errno.EINVAL, lambda number: True)
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "new"


def test_a_disk_that_fails_before_the_swap_keeps_the_previous_output_and_is_named(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    failing_syncs(monkeypatch, errno.EIO, lambda number: number == 1)
    with pytest.raises(OSError, match="error") as caught:
        write(tmp_path / "out", "new")
    assert "out" in str(caught.value.filename)
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_disk_that_fails_after_the_swap_is_a_warning(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    failing_syncs(monkeypatch, errno.EIO, lambda number: number == 2)
    with pytest.warns(UserWarning, match=r"out: written, but a power cut may still undo it \(.*error\)"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
