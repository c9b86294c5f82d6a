"""The page of the cost model over hosts: made from the model, and written in place."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedgram.bench import sizing_tables
from fedgram.bench.sizing_tables import table
from fedgram.bindings.sizing import Host, llama_7b

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sizing.md"


@pytest.mark.parametrize("own", [False, True])
def test_the_page_holds_the_tables_of_the_model(own):
    assert table(llama_7b(), own=own) in PAGE.read_text()
    assert table(llama_7b(), own=own, host=replace(Host(), storage=3e9)) not in PAGE.read_text()


def test_tables_are_written_into_the_page_in_place(tmp_path):
    page = tmp_path / "sizing.md"
    page.write_text(PAGE.read_text().replace("800 GB", "1 GB"))
    sizing_tables.write_tables(page)
    assert page.read_text() == PAGE.read_text()
