"""How the kernels of ``grad_gram`` are compiled and launched: tiles, warps and registers of every case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ._grad_work import CHUNK, LARGEST_TILE
from ._plan import WIDEST
from ._triton_common import TYPES

CENTRE_BLOCK = 128  # columns of one program of the centre


@dataclass(frozen=True)
class Configuration:
    """How ``grad_gram_kernel`` is compiled and launched.

    ``programs`` is what 132 processors hold, or twice that: a constant, so that bits do not follow the device.
    """

    arguments: dict[str, Any]
    warps: int
    stages: int
    registers: int | None
    programs: int


def configuration(
    generation: str, dtype: torch.dtype, precision: str, tile: int,
    *, wide: bool, inline: bool, diagonal: bool, spare: bool,
) -> Configuration:  # fmt: skip
    """The fastest on an H100 of those that spill nowhere: few warps, since a barrier costs more than a longer program.

    A program of one warp waits for no other: eight to twelve of them share a processor.
    """
    bf16, doubles, older = precision == "bf16", precision == "fp64", generation in ("sm80", "gfx942")
    block, warps, registers, programs, chain = 32, 1, None, 1056, 256 if bf16 else 128
    if not wide:
        block, warps, programs = 16, 4 if tile <= 32 else 8, 528
    elif tile == 16:
        block, registers = 64 if spare else 32, 200
    elif tile == 32 and not doubles:
        # float32 in 168 registers, twelve programs a processor, takes 7 % less time, and spills with Triton 3.9
        warps, registers, programs = (1, 168 if bf16 else None, 1584 if bf16 else 1056) if spare else (2, 192, 1320)
    elif tile == 64:
        block, warps, programs = 64 if bf16 and generation == "sm90" else 32, 4, 528
    if older:  # allocates more coarsely, or does not know the limit
        registers = None
    if generation == "sm80" and bf16 and wide:  # a compiler left to itself takes too few registers here; they spill
        registers = 255 if tile == 32 and spare else None
        block = 16 if tile == 64 and diagonal and not inline else block
    if doubles:
        chain, block = 0, 32 if wide and spare and tile == 32 and dtype == torch.float32 else 16
        warps = 2 if wide and tile == 32 and not spare else warps
        if generation == "sm80" and wide and tile == 32 and spare and dtype == torch.float64:
            registers = 255  # as above
        if generation == "sm100" and tile == 64 and inline and not spare and dtype == torch.float64:  # (Triton 3.6)
            warps, block = 8, block if wide else 32
    stages = 3
    if doubles and dtype.itemsize == 2 and generation == "sm100":  # no tensor cores for them: registers are short
        warps, stages = max(warps, 2 if tile <= 32 else 8), 1
    arguments = {
        "TILE": tile, "BLOCK": block, "FLUSH": chain // block, "CHUNK": CHUNK, "TYPE": TYPES[dtype],
        "VECTOR": WIDEST // dtype.itemsize if wide else 1, "INLINE": inline, "DIAGONAL": diagonal,
        "SPARE": spare, "PRECISION": precision,
    }  # fmt: skip
    return Configuration(arguments, warps, stages, registers, programs)


def centre_configuration(dtype: torch.dtype, precision: str, wide: bool) -> tuple[dict[str, Any], int, int]:
    """Compile-time arguments of ``grad_centre_kernel``, whose tiles are the largest, warps and stages."""
    arguments = {
        "TILE": LARGEST_TILE, "BLOCK": CENTRE_BLOCK, "CHUNK": CHUNK, "TYPE": TYPES[dtype],
        "SUM": tl.float64 if precision == "fp64" else tl.float32, "VECTOR": WIDEST // dtype.itemsize if wide else 1,
    }  # fmt: skip
    return arguments, 4 if wide else 8, 2


def shipped() -> dict[str, tuple[torch.dtype, str, int, bool, tuple[bool, bool], bool]]:
    """What is compiled ahead of time: type, precision, tile, wide, (inline, diagonal), a row to spare."""
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    one, tiled, off = (True, True), (False, True), (False, False)  # inline, diagonal
    return {
        "bf16 tile 16": (bf16, "bf16", 16, True, one, True),
        "bf16 tile 32": (bf16, "bf16", 32, True, one, True),
        "bf16 tile 32 full": (bf16, "bf16", 32, True, one, False),
        "bf16 tile 64": (bf16, "bf16", 64, True, one, True),
        "bf16 tile 64 full": (bf16, "bf16", 64, True, one, False),
        "bf16 tile 64 scalar loads": (bf16, "bf16", 64, False, one, True),
        "bf16 tiles of 64": (bf16, "bf16", 64, True, tiled, False),
        "bf16 tiles of 64 off": (bf16, "bf16", 64, True, off, False),
        "bf16 tile 32 precise": (bf16, "fp64", 32, True, one, True),
        "bf16 tile 64 precise": (bf16, "fp64", 64, True, one, False),
        "bf16 tile 32 scalar loads precise": (bf16, "fp64", 32, False, one, False),
        "fp16 tile 32": (fp16, "tf32x3", 32, True, one, True),
        "fp16 tile 64": (fp16, "tf32x3", 64, True, one, False),
        "fp32 tile 16": (fp32, "tf32x3", 16, True, one, True),
        "fp32 tile 16 full": (fp32, "tf32x3", 16, True, one, False),
        "fp32 tile 32": (fp32, "tf32x3", 32, True, one, True),
        "fp32 tile 32 full": (fp32, "tf32x3", 32, True, one, False),
        "fp32 tile 32 scalar loads": (fp32, "tf32x3", 32, False, one, True),
        "fp32 tile 64": (fp32, "tf32x3", 64, True, one, False),
        "fp32 tiles of 64": (fp32, "tf32x3", 64, True, tiled, False),
        "fp32 tiles of 64 off": (fp32, "tf32x3", 64, True, off, False),
        "fp32 tile 16 precise": (fp32, "fp64", 16, True, one, True),
        "fp32 tile 32 precise": (fp32, "fp64", 32, True, one, True),
        "fp32 tile 32 full precise": (fp32, "fp64", 32, True, one, False),
        "fp32 tile 64 precise": (fp32, "fp64", 64, True, one, False),
        "fp32 tiles of 64 precise": (fp32, "fp64", 64, True, tiled, False),
        "bf16 tiles of 64 off precise": (bf16, "fp64", 64, True, off, False),
        "fp64 tile 64": (fp64, "fp64", 64, True, one, False),
        "fp64 tile 64 scalar loads": (fp64, "fp64", 64, False, one, False),
        "fp64 tile 32": (fp64, "fp64", 32, True, one, True),
        "fp64 tiles of 64 off": (fp64, "fp64", 64, True, off, False),
    }
