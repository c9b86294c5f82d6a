"""The compiled solvers (``native/solvers.c``): an optional extension, as the loops of ``kernels`` are."""

from __future__ import annotations

from fedgram.kernels.native_calls import Extension

SOLVER = Extension(
    "fedgram.flora_na._fedgram_solver",
    {"fedgram_scalars": "ii pip p", "fedgram_blocks": "ii pip p", "fedgram_spectrum": "ii pip p"},
    {
        "fedgram_abi": "",
        "fedgram_figures": "",
        "fedgram_scalars_work": "iii",
        "fedgram_block_figures": "",
        "fedgram_blocks_work": "ii",
        "fedgram_spectrum_figures": "",
        "fedgram_spectrum_work": "i",
    },
    abi=8,
)
STATUS = ("converged", "max-sweeps")
DOUBTFUL = 2
"""What a solver says of a module whose Grams do not resolve the answer: the general path then decides."""
