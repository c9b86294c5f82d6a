"""A kernel with a fault: what shows that the memory checker looks at our kernels at all."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def planted_kernel(p, offset):
    """Store far behind the end of a tensor."""
    i = tl.arange(0, 128)
    tl.store(p + offset + i, 1.0)
