"""What lies around an output: parents that were made for nothing, mount points, other people's outputs."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fedgram.bindings.files import output_folders, output_lock
from fedgram.bindings.files.staging import check_writable, reserved_output, staged_directory
from fedgram_testing.cli_clients import refused
from fedgram_testing.streaming import write_adapter

OWNED = frozenset({"a"})


def write(path, text):
    with staged_directory(path, OWNED) as stage:
        (stage / "a").write_text(text)


def test_parents_that_were_made_for_nothing_go_again(tmp_path):
    out = tmp_path / "new" / "deep" / "out"
    check_writable(out, OWNED)
    assert os.listdir(tmp_path) == []
    for kind in (staged_directory, reserved_output):
        with contextlib.suppress(ZeroDivisionError), kind(out, OWNED):
            1 / 0  # noqa: B018
        assert os.listdir(tmp_path) == []
    with reserved_output(out, OWNED):
        (tmp_path / "new" / "mine").write_text("kept")
    assert os.listdir(tmp_path / "new") == ["mine"]
    (tmp_path / "empty").mkdir()
    check_writable(tmp_path / "empty" / "out", OWNED)
    assert (tmp_path / "empty").is_dir()  # it was there before
    with reserved_output(out, OWNED):
        write(out, "1")
    assert (out / "a").read_text() == "1"


def test_parents_that_can_be_made_in_part_go_again(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        check_writable(tmp_path / "new" / "n" / ("o" * 300) / "out", OWNED)
    assert os.listdir(tmp_path) == []


def test_a_parent_that_another_run_takes_away_is_made_again(tmp_path, monkeypatch):
    acquire, calls = output_lock._acquire, []

    def late(path, target):
        calls.append(path)
        if len(calls) == 1:
            path.parent.rmdir()
        return acquire(path, target)

    monkeypatch.setattr(output_lock, "_acquire", late)
    write(tmp_path / "new" / "out", "1")
    assert len(calls) == 2
    assert (tmp_path / "new" / "out" / "a").read_text() == "1"


def test_a_refused_command_leaves_no_parents(tmp_path):
    write_adapter(tmp_path / "c")
    write_adapter(tmp_path / "damaged", changes={"layers.1.up.lora_A.weight": torch.full((3, 20), float("nan"))})
    for option in ([], ["--rank-per-client"]):
        line = refused("aggregate", tmp_path / "c", tmp_path / "damaged", "-o", tmp_path / "new" / "out", *option)
        assert "damaged" in line
        assert not (tmp_path / "new").exists()


@pytest.fixture
def mounted(tmp_path):
    """A folder of the same file system, mounted at another; its name has what the system's table writes otherwise."""
    place = tmp_path / "global \\ é\n"
    place.mkdir()
    (tmp_path / "source").mkdir()
    command = ["mount", "--bind", str(tmp_path / "source"), str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a folder")
    yield place
    subprocess.run(["umount", str(place)], check=True)


MESSAGE = "is a mount point, which cannot be replaced: choose a directory inside it"


@pytest.mark.skipif(sys.platform != "linux", reason="its table of mounts")
def test_a_mount_of_the_same_file_system_is_refused_at_once(mounted):
    for action in (check_writable, lambda path, owned: write(path, "1")):
        with pytest.raises(ValueError, match=MESSAGE):
            action(mounted, OWNED)
    with pytest.raises(ValueError, match=MESSAGE), reserved_output(mounted, OWNED):
        pass
    write(mounted / "inside", "1")


def test_mount_points_are_refused_at_once(tmp_path, monkeypatch):
    """As the system tells of them: by the device, or in its table."""
    (tmp_path / "a b").mkdir()
    table = tmp_path / "table"
    table.write_bytes(b"1 0 8:1 / %s\\040b rw - ext4 /dev/sda rw\n" % os.fsencode(tmp_path / "a"))
    check_writable(tmp_path / "a b", OWNED)
    monkeypatch.setattr(output_folders, "MOUNTS", str(table))
    with pytest.raises(ValueError, match=f"a b: {MESSAGE}"):
        check_writable(tmp_path / "a b", OWNED)
    monkeypatch.setattr(output_folders, "MOUNTS", str(tmp_path / "nowhere"))
    check_writable(tmp_path / "a b", OWNED)
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "a b")
    with pytest.raises(ValueError, match=f"a b: {MESSAGE}"):
        check_writable(tmp_path / "a b", OWNED)


@pytest.fixture
def open_place():
    """A folder that others reach, as those of ``tmp_path`` are not."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)


def as_nobody(path) -> int:
    """In a child process that gives its rights up: 0 if the output is refused and named, 1 if it was written."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            write(path, "2")
            os._exit(1)
        except PermissionError as error:
            os._exit(0 if (error.filename, "may not be replaced" in error.strerror) == (str(path), True) else 2)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("place", "output", "files", "outcome"),
    [
        (0o777, 0o755, True, 0),
        (0o777, 0o777, True, 1),
        (0o777, 0o755, False, 1),  # nothing in it has to be removed
        (0o1777, 0o777, True, 0),  # as in /tmp
    ],
)
def test_an_output_that_this_user_may_not_replace_is_refused_at_once(open_place, place, output, files, outcome):
    folder = open_place / "place"
    (folder / "out").mkdir(parents=True)
    if files:
        (folder / "out" / "a").write_text("1")
    (folder / "out").chmod(output)
    folder.chmod(place)
    assert as_nobody(folder / "out") == outcome
    assert os.listdir(folder) == ["out"]  # nothing beside it
    if outcome == 0:
        assert (folder / "out" / "a").read_text() == "1"
