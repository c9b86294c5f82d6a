"""The compiled solvers are there where they can be: what tests them is skipped where they are not."""

import os
import shutil

import pytest

from fedgram.flora_na._compiled import SOLVER, Block, Scalar, Spectral


def test_they_are_built_where_there_is_a_compiler():
    if os.environ.get("FEDGRAM_NATIVE") == "0" or shutil.which("cc") is None:
        pytest.skip("switched off, or no compiler here")
    assert SOLVER.missing is None


@pytest.mark.skipif(SOLVER.missing is not None, reason=str(SOLVER.missing))
def test_columns_have_the_names_of_the_solvers():
    counts = [SOLVER.loaded.fedgram_scalar_figures(), SOLVER.loaded.fedgram_block_figures()]
    assert [*counts, SOLVER.loaded.fedgram_spectrum_figures()] == [len(Scalar), len(Block), len(Spectral)]
