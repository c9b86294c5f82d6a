"""Float32 numbers in two parts that narrow tensor-core types hold."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(e, DROPPED: tl.constexpr):
    """float32 rounded to nearest with ``DROPPED`` bits fewer: what narrower types then hold exactly."""
    bits = e.to(tl.int32, bitcast=True)
    return ((bits + (1 << (DROPPED - 1))) & -(1 << DROPPED)).to(tl.float32, bitcast=True)


@triton.jit
def split_tf32(e):
    """``e = high + low`` where tf32 holds ``high`` exactly and ``low`` to 2^-22 of e."""
    high = rounded(e, 13)
    return high, e - high


@triton.jit
def split_bf16(e, INTERPRET: tl.constexpr):
    """``e = high + low`` in bf16, to 2^-17 of e; exact for differences of bf16 numbers of similar size.

    Rounding the bits of the NaN that GPUs return carries them over to those of -0: ``low`` is NaN then, as it is
    rounded by the conversion, which costs less.
    """
    high = rounded(e, 16)
    low = e - high
    if INTERPRET:  # Triton's interpreter cuts the lower bits off: round before it does
        low = tl.where(low == low, rounded(low, 16), low)
    return high.to(tl.bfloat16), low.to(tl.bfloat16)
