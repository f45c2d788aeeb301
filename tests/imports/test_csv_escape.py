"""Cells that a spreadsheet would run as formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom import csv_escape
from tests.support.import_rows import few


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@a", "\ta", "\ra", "\0a", "'=1", "''=1"])
def test_a_formula_is_escaped_and_comes_back(cell):
    assert csv_escape.escape(cell) == f"'{cell}"
    assert csv_escape.unescape(csv_escape.escape(cell)) == cell


@few
@given(st.text(max_size=5))
def test_escaping_loses_nothing(cell):
    assert csv_escape.unescape(csv_escape.escape(cell)) == cell
    assert csv_escape.escape(cell)[:1] not in set("=+-@\t\r\0")
