"""Compile every shipped kernel configuration ahead of time, without a GPU, and read what the compilers made of it.

``python -P -m fedgram.bench.aot`` compiles for NVIDIA (sm80, sm90, sm100) and AMD (gfx942), reads registers, spills,
128-bit loads and tensor-core instructions from the machine code, and fails where a configuration spills, has lost its
wide loads or tensor cores, or differs from the committed figures of this Triton version (``--write`` renews them).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fedgram.kernels

TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TABLE = resources.files("fedgram.bench") / "aot_table.json"
SASS = {
    "wide_loads": r"\b(?:LDG\.E|LDGSTS\.E)[\w.]*\.128",
    "loads": r"\b(?:LDG|LDGSTS)\.E",
    "tensor_cores": r"\b(?:HMMA|HGMMA|DMMA|UTC\w*MMA)\b",
    "spills": r"\b(?:LDL|STL)\b",
}
AMDGCN = {
    "wide_loads": r"(?:global|buffer)_load_dwordx4",
    "loads": r"(?:global|buffer)_load_",
    "tensor_cores": r"v_mfma",
    "spills": r"scratch_(?:load|store)",
}
REGISTER_SLACK = 8  # ptxas rounds registers to eights: one step is no regression


def kernel_files() -> Iterator[str]:
    """Names of the kernel files: private modules of ``fedgram.kernels`` that end in ``_triton``."""
    for module in pkgutil.iter_modules(fedgram.kernels.__path__):
        if module.name.startswith("_") and module.name.endswith("_triton"):
            yield module.name


def configs(file: str) -> list[Any]:
    """The configurations that a kernel file ships (``aot_configs()``)."""
    return importlib.import_module(f"fedgram.kernels.{file}").aot_configs()


def compile_config(config: Any, target: str) -> Any:
    """Compile one configuration for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = config.kernel
    hip = TARGETS[target][0] == "hip"
    constexprs = {k: "ieee" if hip and v == "tf32x3" else v for k, v in config.constexprs.items()}
    if "INTERPRET" in kernel.arg_names:
        constexprs["INTERPRET"] = False
    signature = {name: "constexpr" if name in constexprs else config.signature[name] for name in kernel.arg_names}
    aligned = [n for n, t in signature.items() if t.startswith("*")] + list(config.divisible)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(
        source,
        target=GPUTarget(*TARGETS[target]),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
    )


def measure(compiled: Any, target: str) -> dict[str, int]:
    """Registers, stack and instruction counts of a compiled kernel."""
    if TARGETS[target][0] == "hip":
        text = compiled.asm["amdgcn"]
        fields = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "spilled": "vgpr_spill_count"}
        numbers = {k: int(re.search(rf"\.{v}:\s+(\d+)", text)[1]) for k, v in fields.items()}
        return numbers | count(text, AMDGCN)
    usage, sass = _cuobjdump(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    numbers = {"registers": int(found[1]), "stack": int(found[2]), "shared": compiled.metadata.shared}
    return numbers | count(sass, SASS)


def count(text: str, patterns: dict[str, str]) -> dict[str, int]:
    """How often each pattern occurs in machine code."""
    return {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        runs = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        ]
    return runs[0], runs[1]


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


def work(job: tuple[str, int, str]) -> tuple[str, str, dict[str, int] | str]:
    """Compile and measure configuration ``index`` of a file; a failure to compile comes back as text."""
    file, index, target = job
    config = configs(file)[index]
    try:
        return config.name, target, measure(compile_config(config, target), target)
    except Exception as error:  # whatever a compiler throws is a finding about this configuration
        return config.name, target, f"{type(error).__name__}: {error}"


def shipped_configs(only: str = "", sample: bool = False) -> list[tuple[str, int, Any]]:
    """``(file, index, configuration)`` of all with ``only`` in their name; with ``sample`` the first of each kernel."""
    shipped = [(f, i, c) for f in kernel_files() for i, c in enumerate(configs(f)) if only in c.name]
    if not sample:
        return shipped
    return list({id(c.kernel): (f, i, c) for f, i, c in reversed(shipped)}.values())[::-1]


def run(
    targets: Iterable[str], only: str = "", sample: bool = False, jobs: int | None = None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Compile for ``targets``: figures[target][name], and the faults found by "target name"."""
    shipped = shipped_configs(only, sample)
    by_name = {c.name: c for _, _, c in shipped}
    if len(by_name) != len(shipped):
        raise ValueError("two shipped configurations have one name")
    figures: dict[str, Any] = {t: {} for t in targets}
    faults: dict[str, list[str]] = {}
    committed = read_table().get(triton_version(), {})
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn"), _fresh_cache, (cache,)) as pool,
    ):
        for name, target, result in pool.map(work, [(f, i, t) for t in targets for f, i, _ in shipped]):
            if isinstance(result, str):
                faults[f"{target} {name}"] = [result]
                continue
            figures[target][name] = result
            found = gate(by_name[name], target, result, committed.get(target, {}).get(name))
            if found:
                faults[f"{target} {name}"] = found
    return figures, faults


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
    parser.add_argument("--jobs", type=int, help="processes; by default one per core")
    parser.add_argument("--write", action="store_true", help="renew the committed figures of this Triton version")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile in the interpreter")
    if options.write and (options.only or options.sample):
        parser.error("--write renews whole targets: leave out --only and --sample")
    figures, faults = run(options.target or list(TARGETS), options.only, options.sample, options.jobs)
    for target, rows in figures.items():
        for name, row in rows.items():
            print(f"{target:7s} {name:44s}", " ".join(f"{k}={v}" for k, v in row.items()))
    if options.write:
        table = read_table()
        table[triton_version()] = table.get(triton_version(), {}) | figures
        Path(str(TABLE)).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        faults = {k: v for k, v in faults.items() if not all(", committed " in f for f in v)}
    for where, found in faults.items():
        print(f"FAULT {where}: {'; '.join(found)}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
