"""What every Triton kernel here shares: the product at a stated precision, type names, and what is compiled ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._dispatch import interpreting

# Stated, because the default of Triton's fusion of multiplications and additions changes between versions.
FP_FUSION = True
DOUBLE_CORES = ((8, 0), (9, 0))
TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def hidden(x):
    """``x`` in float64 as a sum over an axis of one element, exactly ``x``, behind which the compiler does not look.

    Triton 3.6 arranges the operands of a product by the narrowest load they come from, and cannot compile float64 ones
    of 16-bit loads.
    """
    return tl.sum(x.to(tl.float64)[:, :, None], 2)


@triton.jit
def product(x, y, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``acc + x @ y``. PRECISION: native (16-bit operands), tf32x3 or ieee (float32), fp64."""
    if PRECISION == "fp64":
        if x.dtype.primitive_bitwidth == 16 or y.dtype.primitive_bitwidth == 16:
            x = hidden(x)
            y = hidden(y)  # both, though the 16-bit one would do to compile: that spills less on sm100
        acc = tl.dot(x.to(tl.float64), y.to(tl.float64), acc, input_precision="ieee", out_dtype=tl.float64)
    elif PRECISION == "native":
        if INTERPRET:  # Triton's interpreter would multiply the bit patterns of bf16 as integers
            acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc)
        else:
            acc = tl.dot(x, y, acc)
    else:
        acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def rounded(b, TYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """``b`` as TYPE, to nearest even; 16-bit types through float32, which is how Triton converts float64 to them."""
    if TYPE.primitive_bitwidth < 32:
        b = b.to(tl.float32)
        if INTERPRET and TYPE.is_bf16():  # Triton's interpreter cuts the lower bits off: round before it does
            bits = b.to(tl.int32, bitcast=True)
            b = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return b.to(TYPE)


@triton.jit
def trips(n, INTERPRET: tl.constexpr):
    """``n`` as a bound of ``range``: Triton 3.6's interpreter cannot convert its scalars under NumPy >= 2.4."""
    if INTERPRET:
        return n.handle.data.item()  # an assignment would be made a tensor again
    return n


@triton.jit
def column_tile(
    p_columns, strides, k, k1,
    TYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Rows ``k`` of columns that start at ``p_columns``, (rows, columns), or with WIDE (columns, rows).

    An address from a table has lost its alignment: the hint stands on the final pointer, and the host plan proves it.
    """
    BYTES: tl.constexpr = VECTOR * (TYPE.primitive_bitwidth // 8)
    if WIDE:
        p = p_columns[:, None] + k[None, :]
        p = tl.max_contiguous(tl.multiple_of(p, (1, BYTES)), (1, VECTOR))
        m = (k < k1)[None, :]
    else:
        p = p_columns[None, :] + k[:, None].to(tl.int64) * strides[None, :].to(tl.int64)
        p = tl.max_contiguous(tl.multiple_of(p, (1, BYTES)), (1, VECTOR))
        m = (k < k1)[:, None]
    if MASK:
        b = tl.load(p, mask=m, other=0.0)
    else:
        b = tl.load(p)
    return b


def precision(types: set[torch.dtype], *, precise: bool) -> str:
    """How to multiply operands of the given types: native, tf32x3, ieee or fp64; never plain tf32."""
    if precise or torch.float64 in types:
        return "fp64"
    if len(types) == 1 and next(iter(types)).itemsize == 2:
        return "native"
    return float32_precision()


def factor_precision(types: set[torch.dtype], device: torch.device, *, precise: bool) -> str:
    """The same of products of factors, which take float64 where that is the faster one."""
    doubles = max(t.itemsize for t in types) == 4 and has_double_cores(device)
    return precision(types, precise=precise or doubles)


def coefficient_precision(dtype: torch.dtype, out: torch.dtype) -> str:
    """How to multiply stored numbers of ``dtype`` by float64 coefficients: bf16x3, tf32x3, ieee or fp64."""
    if torch.float64 in (dtype, out):
        return "fp64"
    return "bf16x3" if dtype == torch.bfloat16 else float32_precision()


def float32_precision() -> str:
    """Three tf32 products where there are tf32 units; AMD multiplies float32 itself."""
    return "ieee" if torch.version.hip else "tf32x3"


def options(
    num_warps: int, num_stages: int, registers: int | None = None, *, amd: bool | None = None
) -> dict[str, Any]:
    """Keyword arguments of a launch, by default for the GPUs of this torch; ``registers`` is the most that a thread may
    take (AMD knows no such limit)."""
    amd = bool(torch.version.hip) if amd is None else amd
    limit = {} if registers is None or amd else {"maxnreg": registers}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": FP_FUSION, **limit}


def generation(device: torch.device) -> str:
    """Which of the targets that kernels are compiled for ahead of time comes next to a device."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "sm90"  # the interpreter's
    major, _ = torch.cuda.get_device_capability(device)
    return "sm80" if major < 9 else "sm90" if major == 9 else "sm100"


def has_double_cores(device: torch.device) -> bool:
    """Whether float64 products run on tensor cores: on A100 and H100, where they are faster than three tf32 products
    of the same numbers (measured on an H100 at every total rank from 80 to 1280)."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) in DOUBLE_CORES


def interpret_flag() -> bool:
    """The INTERPRET argument of the kernels."""
    return interpreting()


@dataclass(frozen=True)
class AotConfig:
    """One shipped configuration of a kernel, as the benchmarks' gate compiles it ahead of time."""

    name: str
    kernel: Any
    signature: Mapping[str, str]  # run-time arguments: Triton type strings
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16; pointers always are
    tensor_cores: bool = True  # whether the compiled kernel must hold tensor-core instructions
    wide_loads: bool = True  # whether it must hold 128-bit loads
    registers: int | None = None  # the most that a thread may take (NVIDIA)

    def options(self, *, amd: bool) -> dict[str, Any]:
        """What it is compiled with, as a launch would be."""
        return options(self.num_warps, self.num_stages, self.registers, amd=amd)
