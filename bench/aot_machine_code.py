"""What a compiler made of a kernel, read from its machine code: registers, stack, loads, tensor-core instructions."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

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
DISASSEMBLER = {80: "SM80", 90: "SM90a", 100: "SM100a"}
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/")


def count(text: str, patterns: dict[str, str]) -> dict[str, int]:
    """How often each pattern occurs in machine code."""
    return {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}


def amd_figures(text: str) -> dict[str, int]:
    """Figures of a kernel in AMD assembly."""
    fields = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "spilled": "vgpr_spill_count"}
    numbers = {k: int(re.search(rf"\.{v}:\s+(\d+)", text)[1]) for k, v in fields.items()}
    return numbers | count(text, AMDGCN)


def nvidia_figures(cubins: Sequence[bytes], capability: int) -> list[dict[str, int]]:
    """Figures of kernels in NVIDIA binaries of one architecture.

    The disassembler takes a third of a second to start: it gets the instructions of all in one file.
    """
    codes = [instructions(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "all.bin"
        raw.write_bytes(b"".join(codes))
        sass = _tool("nvdisasm", "--binary", DISASSEMBLER[capability], "--no-dataflow", raw) if any(codes) else ""
        usage = [_usage(cubin, Path(folder) / "one.cubin") for cubin in cubins]
    parts = _split(sass, [len(code) for code in codes])
    return [numbers | count(part, SASS) for numbers, part in zip(usage, parts, strict=True)]


def instructions(cubin: bytes) -> bytes:
    """The code of the one kernel in a binary (64-bit ELF): its section ``.text.<name>``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(number)]
    names = sections[names_index][4]
    code = []
    for section in sections:
        start = names + section[0]
        if cubin[start : cubin.index(b"\0", start)].startswith(b".text."):
            code.append(cubin[section[4] : section[4] + section[5]])
    if len(code) != 1:
        raise ValueError(f"a compiled kernel holds {len(code)} functions, expected one")
    return code[0]


def _split(sass: str, lengths: Sequence[int]) -> Iterator[str]:
    """The lines of each kernel by their addresses."""
    lines = sorted((int(found[1], 16), line) for line in sass.splitlines() if (found := LINE.search(line)))
    start = first = 0
    for length in lengths:
        end = bisect_left(lines, start + length, key=itemgetter(0))
        part, first = [line for _, line in lines[first:end]], end
        if length and len(part) < length // 16:  # of 16 bytes each: nothing may go uncounted
            raise RuntimeError(f"{len(part)} instructions disassembled of {length // 16}")
        yield "\n".join(part)
        start += length


def _usage(cubin: bytes, file: Path) -> dict[str, int]:
    file.write_bytes(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", file))
    return {"registers": int(found[1]), "stack": int(found[2])}


def _tool(name: str, *arguments: str | Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
