"""Compile every shipped kernel configuration ahead of time, without a GPU, and read what the compilers made of it.

``python -P -m fedgram.bench.aot`` compiles for NVIDIA (sm80, sm90, sm100) and AMD (gfx942), reads registers, spills,
128-bit loads and tensor-core instructions from the machine code, and fails where a configuration spills, has lost its
wide loads or tensor cores, or differs from the committed figures of this Triton version (``--write`` renews them).

With every row of figures goes a fingerprint of what it was compiled from. ``--changed`` compiles what has another one
now, and a part of the rest that changes from day to day, so that figures nobody measured are found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from datetime import date
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fedgram.kernels

from . import aot_machine_code
from .aot_machine_code import amd_figures, nvidia_figures

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TABLE = resources.files("fedgram.bench") / "aot_table.json"
REGISTER_SLACK = 8  # ptxas rounds registers to eights: one step is no regression
DAYS = 10  # within which ``--changed`` has compiled everything


def kernel_files() -> Iterator[str]:
    """Names of the kernel files: private modules of ``fedgram.kernels`` that end in ``_triton``."""
    for module in pkgutil.iter_modules(fedgram.kernels.__path__):
        if module.name.startswith("_") and module.name.endswith("_triton"):
            yield module.name


def configs(file: str, target: str) -> list[Any]:
    """The configurations that a kernel file ships for a target (``aot_configs``), of the same names for all."""
    return importlib.import_module(f"fedgram.kernels.{file}").aot_configs(target)


def compile_config(config: Any, target: str) -> Any:
    """Compile one configuration for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes = _specialised(config, target)
    source = ASTSource(fn=config.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=_options(config, target))


def fingerprint(config: Any, target: str) -> str:
    """A short hash of what decides the machine code under one Triton version, and of how it is read."""
    parts = [config.kernel.cache_key, *_specialised(config, target), _options(config, target), TARGETS[target]]
    parts += [inspect.getsource(module) for module in (aot_machine_code, _specialised, compile_config)]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _options(config: Any, target: str) -> dict[str, Any]:
    return config.options(amd=TARGETS[target][0] == "hip")


def _specialised(config: Any, target: str) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Signature, compile-time constants and alignments of a configuration for a target."""
    kernel = config.kernel
    hip = TARGETS[target][0] == "hip"
    constexprs = {k: "ieee" if hip and v == "tf32x3" else v for k, v in config.constexprs.items()}
    if "INTERPRET" in kernel.arg_names:
        constexprs["INTERPRET"] = False
    signature = {name: "constexpr" if name in constexprs else config.signature[name] for name in kernel.arg_names}
    aligned = [n for n, t in signature.items() if t.startswith("*")] + list(config.divisible)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return signature, constexprs, attributes


def measure(compiled: Sequence[Any], target: str) -> list[dict[str, int]]:
    """Registers, stack and instruction counts of compiled kernels."""
    return figures_of([machine_code(c, target) for c in compiled], target)


def machine_code(compiled: Any, target: str) -> tuple[str | bytes, int]:
    """The assembly (AMD) or binary (NVIDIA) of a compiled kernel, and its shared memory in bytes."""
    return compiled.asm["amdgcn" if TARGETS[target][0] == "hip" else "cubin"], compiled.metadata.shared


def figures_of(code: Sequence[tuple[str | bytes, int]], target: str) -> list[dict[str, int]]:
    """The figures of machine code, ``shared`` among them."""
    kind, architecture, _ = TARGETS[target]
    if kind == "hip":
        rows = [amd_figures(text) for text, _ in code if isinstance(text, str)]
    else:
        assert isinstance(architecture, int)
        rows = nvidia_figures([binary for binary, _ in code if isinstance(binary, bytes)], architecture)
    return [row | {"shared": shared} for row, (_, shared) in zip(rows, code, strict=True)]


def gate(config: Any, target: str, figures: dict[str, int], committed: dict[str, int] | None) -> list[str]:
    """What is wrong with a compiled configuration, in words; empty where nothing is."""
    faults = [f"{k} = {figures[k]}" for k in ("stack", "spills", "spilled") if figures.get(k)]
    # AMD's buffer loads drop the alignment hints: there wide loads are recorded, not demanded
    demanded = ["tensor_cores"] if TARGETS[target][0] == "hip" else ["tensor_cores", "wide_loads"]
    faults += [f"no {k}" for k in demanded if getattr(config, k) and not figures[k]]
    if committed:
        faults += [f"{k}: {figures[k]}, committed {committed[k]}" for k in demanded if figures[k] != committed[k]]
        if figures["registers"] > committed["registers"] + REGISTER_SLACK:
            faults.append(f"registers: {figures['registers']}, committed {committed['registers']}")
    return faults


def work(job: tuple[str, int, str]) -> tuple[str, tuple[str | bytes, int] | str]:
    """Compile configuration ``index`` of a file; a failure to compile comes back as text."""
    file, index, target = job
    config = configs(file, target)[index]
    try:
        return config.name, machine_code(_compile_again(config, target), target)
    except Exception as error:  # whatever a compiler throws is a finding about this configuration
        return config.name, f"{type(error).__name__}: {error}"


def _compile_again(config: Any, target: str) -> Any:
    """Compile, twice where the compiler's own assertions fail: Triton 3.9 has failed once for sm100 (a cast in its pass
    for tensor memory) on what it compiled dozens of times before and after."""
    try:
        return compile_config(config, target)
    except RuntimeError as error:
        if "PassManager" not in str(error):
            raise
        print(f"{target} {config.name}: {error}: compiled once more", file=sys.stderr)
        return compile_config(config, target)


def shipped_configs(target: str, only: str = "", sample: bool = False) -> list[tuple[str, int, Any]]:
    """``(file, index, configuration)`` of all with ``only`` in their name; with ``sample`` the first of each kernel."""
    shipped = [(f, i, c) for f in kernel_files() for i, c in enumerate(configs(f, target)) if only in c.name]
    if not sample:
        return shipped
    return list({id(c.kernel): (f, i, c) for f, i, c in reversed(shipped)}.values())[::-1]


def due(name: str, target: str, today: int) -> bool:
    """Whether a configuration is among those that ``--changed`` compiles today although nothing has changed."""
    return (int(hashlib.sha256(f"{target} {name}".encode()).hexdigest(), 16) + today) % DAYS == 0


def run(
    targets: Iterable[str], only: str = "", sample: bool = False, jobs: int | None = None, changed: bool = False
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Compile for ``targets``: figures[target][name], and the faults found by "target name"."""
    shipped = {t: shipped_configs(t, only, sample) for t in targets}
    by_name = {t: {c.name: c for _, _, c in found} for t, found in shipped.items()}
    if any(len(by_name[t]) != len(found) for t, found in shipped.items()):
        raise ValueError("two shipped configurations have one name")
    figures: dict[str, Any] = {}
    faults: dict[str, list[str]] = {}
    committed = read_table().get(triton_version(), {})
    with tempfile.TemporaryDirectory() as cache, _compilers(jobs or os.cpu_count() or 1, cache) as pool:
        chosen = {
            t: [(f, i, c) for f, i, c in found if not changed or _is_due(c, t, committed)]
            for t, found in shipped.items()
        }
        compiling = {t: [pool.submit(work, (f, i, t)) for f, i, _ in found] for t, found in chosen.items()}
        for target, futures in compiling.items():
            results = dict(future.result() for future in futures)
            broken = {name: result for name, result in results.items() if isinstance(result, str)}
            faults |= {f"{target} {name}": [result] for name, result in broken.items()}
            compiled = {name: result for name, result in results.items() if not isinstance(result, str)}
            rows = figures_of(list(compiled.values()), target)
            figures[target] = {
                name: row | {"source": fingerprint(by_name[target][name], target)}
                for name, row in zip(compiled, rows, strict=True)
            }
            for name, row in figures[target].items():
                if found := gate(by_name[target][name], target, row, committed.get(target, {}).get(name)):
                    faults[f"{target} {name}"] = found
    return figures, faults


def _is_due(config: Any, target: str, committed: dict[str, Any]) -> bool:
    held = committed.get(target, {}).get(config.name, {})
    return held.get("source") != fingerprint(config, target) or due(config.name, target, date.today().toordinal())


def _compilers(jobs: int, cache: str) -> Executor:
    """Processes that compile; a single one would only import everything again, so it is a thread of this process."""
    if jobs == 1:
        return ThreadPoolExecutor(1, initializer=_fresh_cache, initargs=(cache,))
    return ProcessPoolExecutor(jobs, get_context("spawn"), _fresh_cache, (cache,))


def _fresh_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def triton_version() -> str:
    """The version the committed figures are keyed by."""
    import triton

    return triton.__version__


def read_table() -> dict[str, Any]:
    """The committed figures: version, target, configuration."""
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures and the faults; 1 where there are any."""
    parser = argparse.ArgumentParser(prog="fedgram.bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target (may be repeated)")
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--sample", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--changed", action="store_true", help="only what has changed, and a part of the rest")
    parser.add_argument("--jobs", type=int, help="compilations at once; by default one per core")
    parser.add_argument("--write", action="store_true", help="renew the committed figures of this Triton version")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile in the interpreter")
    if options.write and (options.only or options.sample):
        parser.error("--write renews whole targets: leave out --only and --sample")
    targets = options.target or list(TARGETS)
    figures, faults = run(targets, options.only, options.sample, options.jobs, options.changed)
    for target, rows in figures.items():
        for name, row in rows.items():
            print(f"{target:7s} {name:44s}", " ".join(f"{k}={v}" for k, v in row.items()))
    if options.write:
        table, shipped = read_table(), {c.name for _, _, c in shipped_configs(targets[0])}
        held = table.setdefault(triton_version(), {})
        for target, rows in figures.items():
            held[target] = {k: row for k, row in (held.get(target, {}) | rows).items() if k in shipped}
        Path(str(TABLE)).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        faults = {k: v for k, v in faults.items() if not all(", committed " in f for f in v)}
    for where, found in faults.items():
        print(f"FAULT {where}: {'; '.join(found)}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
