"""The compiled solvers are there where they can be: what tests them is skipped where they are not."""

import os
import shutil

import pytest

from fedgram.flora_na._compiled import SOLVER


def test_they_are_built_where_there_is_a_compiler():
    if os.environ.get("FEDGRAM_NATIVE") == "0" or shutil.which("cc") is None:
        pytest.skip("switched off, or no compiler here")
    assert SOLVER.missing is None
