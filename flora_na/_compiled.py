"""The compiled solvers (``native/solvers.c``): an optional extension, as the loops of ``kernels`` are."""

from __future__ import annotations

from enum import IntEnum

from fedgram.kernels.native_calls import Extension

SOLVER = Extension(
    "fedgram.flora_na._fedgram_solver",
    {"fedgram_scalars": "ii pip p", "fedgram_blocks": "ii pip p", "fedgram_spectrum": "ii pip p"},
    {
        "fedgram_abi": "",
        "fedgram_scalar_figures": "",
        "fedgram_scalars_work": "iii",
        "fedgram_block_figures": "",
        "fedgram_blocks_work": "ii",
        "fedgram_spectrum_figures": "",
        "fedgram_spectrum_work": "i",
    },
    abi=9,
)
STATUS = ("converged", "max-sweeps")


class Scalar(IntEnum):
    """Columns of what the solver of scalars finds, a row for every module: ``enum scalar_figure`` of ``solvers.c``."""

    STATUS, SWEEPS, ENERGY, ERROR, ERROR_START, NORM_B, NORM_A = range(7)


class Block(IntEnum):
    """The same of the solver of blocks: ``enum block_figure``."""

    STATUS, SWEEPS, ENERGY, ERROR, NORM_B, NORM_A = range(6)


class Spectral(IntEnum):
    """The same of the spectrum: ``enum spectrum_figure``."""

    STATUS, TAIL = range(2)


DOUBTFUL = 2
"""What a solver says of a module whose Grams do not resolve the answer: the general path then decides."""
