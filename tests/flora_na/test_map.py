"""The room's docstring is a map of its files."""

import re
from pathlib import Path

from fedgram import flora_na


def test_every_file_is_on_the_map():
    files = {path.stem for path in Path(flora_na.__file__).parent.glob("*.py")} - {"__init__"}
    assert files <= set(re.findall(r"``(\w+)``", flora_na.__doc__))
