"""A memory checker for Triton's interpreter, which takes addresses as they are.

What a kernel touches must be a tensor's: a mask that is one element too long reads whatever comes next, and writes over
it, mostly without a trace.
"""

import gc

import numpy as np
import torch


class OutOfBoundsError(Exception):
    """A kernel touched memory that is no live CPU tensor's."""


class LiveMemory:
    """The memory of all live CPU tensors, surveyed anew where an address is not known: what was freed since counts."""

    def __init__(self):
        self._starts = self._ends = np.empty(0, np.int64)

    def check(self, pointers, mask, size, what):
        """Raise OutOfBoundsError unless ``size`` bytes at every address under the mask are a tensor's."""
        addresses = np.asarray(pointers).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.asarray(mask, bool), addresses.shape)]
        if self._outside(addresses, size).any():
            self._survey()
        outside = addresses[self._outside(addresses, size)]
        if outside.size:
            raise OutOfBoundsError(f"{what} of {outside.size} of {addresses.size} elements outside any tensor's memory")

    def _outside(self, addresses, size):
        if not self._starts.size:
            return np.ones(addresses.shape, bool)
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        return (at < 0) | (addresses + size > self._ends[np.maximum(at, 0)])

    def _survey(self):
        tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor and o.is_cpu and o.layout is torch.strided)
        storages = (tensor.untyped_storage() for tensor in tensors)
        found = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self._starts = np.array(sorted(found), np.int64)
        self._ends = np.array([start + found[start] for start in self._starts], np.int64)


def guard(monkeypatch):
    """Check every load and store of Triton's interpreter from here on."""
    from triton.runtime import interpreter

    builder, memory = interpreter.InterpreterBuilder, LiveMemory()
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, *rest):
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        memory.check(pointers.data, mask.data, size, "a load")
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        memory.check(pointers.data, mask.data, value.data.dtype.itemsize, "a store")
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
