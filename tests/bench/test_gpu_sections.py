"""Sections of the GPU script as processes: what they wrote is kept, and none outlives its time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedgram.bench import gpu, gpu_sanitizers, gpu_support
from fedgram.bench.gpu_support import Journal

LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")


def test_a_journal_survives_errors_and_the_end_of_time(tmp_path):
    journal = Journal(tmp_path / "part.json", deadline=time.monotonic() + 60)
    journal.guard("bad", lambda: 1 / 0)
    journal.guard("good", lambda: {"ok": True})
    journal.guard("long", lambda: pytest.fail("ran"), need_s=3600)
    rows = json.loads((tmp_path / "part.json").read_text())
    assert [row["ok"] for row in rows] == [False, True, None]
    assert "ZeroDivisionError" in rows[0]["error"]
    assert "1 / 0" in rows[0]["traceback"]


def finished(section, seconds):
    return dict(gpu.finish({"one": section}, seconds))["one"]


def test_a_section_that_dies_leaves_what_it_wrote(tmp_path, monkeypatch):
    script = tmp_path / "dies.py"
    script.write_text(
        "import json, os, sys\n"
        "part = sys.argv[sys.argv.index('--part') + 1]\n"
        "open(part, 'w').write(json.dumps([{'name': 'first', 'ok': True}]))\n"
        "print('about to die', flush=True)\n"
        "os.abort()\n"
    )
    monkeypatch.setattr(gpu, "SCRIPT", script)
    section = finished(gpu.start("correctness", tmp_path, 30), 30)
    assert section["rows"] == [{"name": "first", "ok": True}]
    assert section["exit"] < 0
    assert "about to die" in section["log"]
    report = {"environment": {"device": "x", "versions": {"torch": "2"}}, "sections": {"correctness": section}}
    assert "ended: -6" in gpu.summary(report)


def test_a_section_that_hangs_is_ended(tmp_path, monkeypatch):
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(gpu, "SCRIPT", script)
    section = finished(gpu.start("repeats", tmp_path, 1), 1)
    assert section["exit"] == "out of time"
    assert section["rows"] == []


class Stuck:
    """A process that no signal ends; with ``ends_by`` it ends by itself."""

    waited = 0.0

    def __init__(self, ends_by=None):
        self.pid, self.returncode, self.ends_by = 0, None, ends_by

    def poll(self):
        if self.ends_by is not None and time.monotonic() > self.ends_by:
            self.returncode = 0
        return self.returncode

    def wait(self, timeout=None):
        assert timeout is not None, "without limit"
        Stuck.waited += timeout
        time.sleep(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("stuck", timeout)


def test_sections_that_overrun_are_ended_together_and_one_that_cannot_be_keeps_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_support.os, "killpg", lambda pid, number: None)
    monkeypatch.setattr(gpu_support, "UNKILLED", 0.1)
    monkeypatch.setattr(gpu_support.end_groups, "__defaults__", (0.1,))
    log = tmp_path / "log"
    log.write_text("")
    part = tmp_path / "part"
    stuck = {str(i): gpu.Section(Stuck(), part, log) for i in range(4)}
    begin = time.monotonic()
    done = {"done": gpu.Section(Stuck(begin), part, log), **stuck, "also": gpu.Section(Stuck(begin + 0.5), part, log)}
    found = dict(gpu.finish(done, 1))
    assert Stuck.waited <= 1 + 2 * 0.1
    assert list(found) == list(done)
    assert [found[name]["exit"] for name in ("done", "also")] == [0, 0]
    assert {found[name]["exit"] for name in stuck} == {"out of time, and could not be ended"}
    report = {"environment": {"device": "x", "versions": {"torch": "2"}}, "sections": found}
    assert "ended: out of time, and could not be ended" in gpu.summary(report)


CHILD = """import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
"""


def ended(pid, patience=5.0):
    """Whether a process is gone, or dead and only not waited for."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@LINUX
def test_what_a_section_has_started_is_ended_with_it(tmp_path, monkeypatch):
    script = tmp_path / "hangs.py"
    script.write_text(
        CHILD + "import json\nopen(sys.argv[sys.argv.index('--part') + 1], 'w').write(json.dumps([child.pid]))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "SCRIPT", script)
    section = finished(gpu.start("repeats", tmp_path, 1), 1.5)
    assert section["exit"] == "out of time"
    assert ended(*section["rows"])


@LINUX
def test_what_a_checker_has_started_is_ended_with_it(tmp_path, monkeypatch):
    tool = tmp_path / "tool"
    tool.write_text(f"#!{sys.executable}\n{CHILD}print(child.pid, flush=True)\ntime.sleep(600)\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_sanitizers, "SHORTEST", 1.5)
    row = gpu_sanitizers._run(str(tool), "memcheck", tmp_path / "script", time.monotonic())
    assert row["skipped"] == "not done in 2 s"
    assert ended(row["output"].strip())


@LINUX
def test_an_interrupted_run_tells_what_its_sections_have_found(tmp_path, monkeypatch):
    """Their parts lie beside the JSON, for a run that is killed; a section that was done is told as such."""
    script, out, seen = tmp_path / "writes.py", tmp_path / "out" / "gpu.json", {}
    script.write_text(
        "import json, os, sys, time\nname, part = (sys.argv[sys.argv.index(x) + 1] for x in ('--section', '--part'))\n"
        "open(part + '~', 'w').write(json.dumps([{'name': name, 'ok': True, 'pid': os.getpid()}]))\n"
        "os.rename(part + '~', part)\ntime.sleep(600 if name == 'hangs' else 0)\n"
    )

    def interrupted(sections, seconds):
        seen.update(sections)
        sections["done"].process.wait(10)
        while not sections["hangs"].part.exists():
            time.sleep(0.01)
        raise SystemExit(143)

    for name, value in {
        "SCRIPT": script, "CHECKS": ("done", "hangs"), "finish": interrupted,
        "new_report": lambda dry_run: {"sections": {}},
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu, name, value)
    with pytest.raises(SystemExit):
        gpu.run_all(out, 60.0, time.monotonic())
    found = json.loads(out.read_text())["sections"]
    assert {name: section["exit"] for name, section in found.items()} == {"done": 0, "hangs": "interrupted"}
    assert [section["rows"][0]["name"] for section in found.values()] == ["done", "hangs"]
    assert ended(found["hangs"]["rows"][0]["pid"])
    assert seen["hangs"].part.parent.parent == out.parent
    assert list(out.parent.iterdir()) == [out]


def test_a_slow_import_is_part_of_the_time_that_a_section_has(monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "use_checkout", lambda: time.sleep(0.3))
    monkeypatch.setattr(gpu, "run_section", lambda name, part, deadline: given.append(deadline))
    begin = time.monotonic()
    assert gpu.main(["--section", "repeats", "--limit", "5"]) == 0
    assert given[0] - begin < 5.2
