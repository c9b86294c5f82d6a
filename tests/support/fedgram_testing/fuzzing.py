"""Runs one damaged adapter through the reader and the command line, and holds the outcome to what was promised."""

import contextlib
import io
import os
import pickle
import random
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from safetensors import SafetensorError, safe_open

from fedgram.bench._commands import app
from fedgram.bindings.console import describe, one_line
from fedgram.bindings.files.tensor_file import TensorFile
from fedgram.bindings.peft import load_adapter

from .hostile import LOADABLE, build, write
from .hostile_bases import bases

BOUND = 64 << 20
"""Memory that reading one of these small adapters may take beyond the size of its files."""
LONGEST_LINE = 12_000
"""A thousand characters, escaped."""
STRICTER = ("not supported", "is there twice", "a name of", "nothing else", "lists of sizes")
"""Why a file that safetensors reads may be refused."""
OF_THE_RESULT = (": the aggregate overflows ", " holds NaN or Inf (scaling ")
"""Faults of no single client: they name the module."""
SECONDS = 20.0
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.truncate": 2,
    "shutil.rmtree": 1,
}  # fmt: skip
"""Events, and after how many arguments descriptors of directories follow."""
FORBIDDEN = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}


class BrokenPromiseError(AssertionError):
    """A promise was not kept."""


class Hang(BaseException):
    """A case took too long; not an Exception, so that nothing takes it for bad input."""


@dataclass
class Outcome:
    """What became of a case."""

    label: str
    accepted: bool
    line: str
    seconds: float
    memory: int
    exit_code: int | None = None


@dataclass
class Run:
    """What the command line did."""

    command: str
    exit_code: int
    stdout: str
    stderr: str


class Watch:
    """Sees, by Python's audit events, which files are opened and changed, and what must never happen."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.faults: list[str] = []
        libraries = {sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), os.path.dirname(torch.__file__)}
        repository = str(Path(__file__).resolve().parents[3])
        self._readable = (*libraries, repository, "/proc/self/", "/proc/meminfo", "/sys/devices/", "/etc/localtime")
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def over(self, root: Path) -> Iterator[None]:
        """Watch the block; only files under ``root`` may be changed, and only its siblings and libraries read."""
        self.faults.clear()
        self.root = str(root)
        try:
            yield
        finally:
            self.root = None
        if self.faults:
            raise BrokenPromiseError("; ".join(self.faults[:3]))

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.root is None:
            return
        if event == "open":
            self._opened(*arguments)
        elif event in CHANGES:
            self._changed(event, arguments)
        elif event in FORBIDDEN:
            self.faults.append(f"{event} {arguments!r}")

    def _opened(self, path: object, mode: object, flags: int) -> None:
        if not isinstance(path, str | bytes):
            return
        place = os.path.abspath(os.fsdecode(path))
        inside = place == self.root or place.startswith(f"{self.root}/")
        if flags & WRITING and not inside:
            self.faults.append(f"opened {place} for writing")
        elif not place.startswith((os.path.dirname(self.root), *self._readable)):
            self.faults.append(f"opened {place}")

    def _changed(self, event: str, arguments: tuple) -> None:
        if any(isinstance(x, int) and x >= 0 for x in arguments[CHANGES[event] :]):
            return  # relative to a directory that was opened, and so was seen
        for path in (x for x in arguments[:2] if isinstance(x, str | bytes | os.PathLike)):
            place = os.path.abspath(os.fsdecode(path))
            if place != self.root and not place.startswith(f"{self.root}/"):
                self.faults.append(f"{event} {path!r}")


@contextlib.contextmanager
def no_pickles() -> Iterator[None]:
    """Whoever unpickles, with Python's or torch's reader, fails."""

    def refuse(*_: object, **__: object) -> None:
        raise BrokenPromiseError("a pickle was read")

    kept = pickle.load, pickle.loads, pickle.Unpickler, torch.load
    pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
    try:
        yield
    finally:
        pickle.load, pickle.loads, pickle.Unpickler, torch.load = kept


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise ``Hang`` in the block when it takes longer."""

    def ring(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Fuzzer:
    """Damaged adapters in a folder of its own, one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.watch = Watch()
        self._command = typer.main.get_command(app)
        self.good = {d.kind: write(d, folder / "good" / d.kind) for d in bases() if d.kind in LOADABLE}
        for path in self.good.values():  # whatever is imported or made on first use is not a case's doing
            _read(path)
            self._run_cli("aggregate", [path], path.parent / "warm", "--json")
            shutil.rmtree(path.parent / "warm")

    def case(self, seed: str, *, cli: bool) -> Outcome:
        """Make a case, read it, perhaps aggregate it (always with ``cli``), and check what came of it.

        Raises:
            BrokenPromiseError: a promise was not kept; Hang: it took too long; anything else is a crash.
        """
        root = self.folder / "case"
        shutil.rmtree(root, ignore_errors=True)
        client = root / "client"
        client.mkdir(parents=True)
        label = build(seed, client)
        options = _options(client, seed)
        size = sum(os.lstat(path).st_size for path in client.rglob("*"))
        before = reset_peak()
        begin = time.perf_counter()
        with no_pickles(), self.watch.over(root), deadline(SECONDS):
            line = self._refusal(client, options)
            seconds = time.perf_counter() - begin
            memory = max(peak() - before, 0)
            _agree_with_safetensors(client)
            cli = cli or (line == "" and zlib.crc32(seed.encode()) % 4 == 0)  # few are accepted: more of those
            exit_code = self._cli(seed, client, root, options, readable=line == "") if cli else None
        if memory > size + BOUND:
            raise BrokenPromiseError(f"{memory >> 20} MiB of memory for files of {size} bytes")
        return Outcome(label, line == "", line, seconds, memory, exit_code)

    def _refusal(self, client: Path, options: dict) -> str:
        """The line with which the reader refuses the adapter; empty if it reads it all."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", ".*: DoRA: ")  # what allow_dora is to say
                _read(client, **options)
        except (ValueError, OSError) as error:
            line = one_line(describe(error))
            if str(client) not in line:
                raise BrokenPromiseError(f"does not name the file: {type(error).__name__}: {line[:300]}") from error
            return line
        return ""

    def _cli(self, seed: str, client: Path, root: Path, options: dict, *, readable: bool) -> int:
        rng = random.Random(f"command {seed}")
        others = list(self.good.values())[: rng.choice([0, 0, 1, 2])]  # good clients beside it
        command = rng.choice(["aggregate", "aggregate", "inspect"])
        flags = [flag for flag in ("--json", "--quiet") if rng.random() < 0.4]
        flags += ["--missing", rng.choice(["error", "renormalize", "zero"])]
        if command == "aggregate":
            flags += ["--method", rng.choice(["als", "svd", "fedavg", "flora-na", "stack"])]
        flags += ["--allow-dora"] if options.get("allow_dora") else []
        flags += ["--adapter-name", options["adapter_name"]] if options.get("adapter_name") else []
        out = root / "out"
        before = _listing(root)
        result = self._run_cli(command, [client, *others], out, *flags)
        if result.exit_code not in (0, 1):
            raise BrokenPromiseError(f"{command}: exit code {result.exit_code}, {result.stderr[:300]!r}")
        if result.exit_code == 1:
            _check_line(result, root)
            if out.exists():
                raise BrokenPromiseError("an output of a refused run")
        elif command == "aggregate":
            _check_output(out, options.get("allow_dora", False))
            shutil.rmtree(out)
        if _listing(root) != before:
            raise BrokenPromiseError(f"files appeared or went: {sorted(_listing(root) ^ before)[:3]}")
        if result.exit_code == 0 and not readable:
            raise BrokenPromiseError("the command line took what the reader refuses")
        return result.exit_code

    def _run_cli(self, command: str, clients: list[Path], out: Path, *options: str) -> Run:
        place = ["-o", str(out)] if command == "aggregate" else []
        arguments = [command, *map(str, clients), *place, *options]
        with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
            try:
                self._command.main(args=arguments, prog_name="fedgram")
                code = 0
            except SystemExit as end:
                code = end.code
        return Run(command, code or 0, stdout.getvalue(), stderr.getvalue())


def _read(client: Path, **options) -> None:
    adapter = load_adapter(client, **options)
    for name in adapter.modules:
        adapter.modules[name]
    for name in adapter.extras:
        adapter.extras[name]


def _options(client: Path, seed: str) -> dict:
    """What an operator might ask for who has looked at the directory."""
    rng = random.Random(f"options {seed}")
    names = [path.parent.name for path in client.glob("*/adapter_config.json")]
    named = {"adapter_name": rng.choice(sorted(names))} if names and rng.random() < 0.8 else {}
    return {"allow_dora": rng.random() < 0.6} | named


def _agree_with_safetensors(client: Path) -> None:
    """What the format's own reader reads is read here to the same bytes, or refused for a stated reason."""
    for path in client.rglob("*.safetensors"):
        if not path.is_file() or path.is_symlink():
            continue
        try:
            ours = TensorFile(path)
        except (ValueError, OSError) as error:
            if not any(reason in str(error) for reason in STRICTER) and _reads(path):
                raise BrokenPromiseError(f"safetensors reads what is refused here: {error}") from error
            continue
        with safe_open(path, framework="pt") as theirs:
            if set(theirs.keys()) != set(ours.specs):
                raise BrokenPromiseError("safetensors reads other names")
            for name in ours.specs:
                if _bits(theirs.get_tensor(name)) != _bits(ours.read(name)):
                    raise BrokenPromiseError(f"{name} is read differently by safetensors")


def _reads(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_line(result: Run, root: Path) -> None:
    lines = [line for line in result.stderr.splitlines() if not line.startswith("fedgram: warning: ")]
    if len(lines) != 1 or not lines[0].startswith("fedgram: ") or result.stdout:
        raise BrokenPromiseError(f"not one line: {result.stderr[:300]!r} {result.stdout[:100]!r}")
    if str(root.parent) not in lines[0] and not any(fault in lines[0] for fault in OF_THE_RESULT):
        raise BrokenPromiseError(f"does not name a client: {lines[0][:300]}")
    if len(lines[0]) > LONGEST_LINE or not lines[0].isprintable():
        raise BrokenPromiseError(f"a line of {len(lines[0])} characters: {lines[0][:200]!r}")


def _check_output(out: Path, allow_dora: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*: DoRA: ")
        adapter = load_adapter(out, allow_dora=allow_dora)
    tensors = [x for name in adapter.modules for x in (adapter.modules[name].A, adapter.modules[name].B)]
    tensors += [adapter.extras[name] for name in adapter.extras]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise BrokenPromiseError("an output that is not finite")


def _listing(root: Path) -> frozenset[str]:
    return frozenset(
        os.path.join(folder, name) for folder, *names in os.walk(root) for group in names for name in group
    )


def reset_peak() -> int:
    """Forget the process's peak of resident memory; returns what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return sys.maxsize  # not on Linux, or not allowed: no figure
    return _status("VmRSS:")


def peak() -> int:
    return _status("VmHWM:") if os.path.exists("/proc/self/status") else 0


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
