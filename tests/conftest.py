"""Set before anything imports Triton: without a GPU its kernels run in the interpreter."""

import os

import torch

torch.set_num_threads(1)  # the tests are small: more threads only wait for each other

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
