"""Set before anything imports Triton: without a GPU its kernels run in the interpreter."""

import os

import torch

torch.set_num_threads(1)  # the tests are small: more threads only wait for each other

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: with several workers, each of which takes whole files, the last ones are short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
