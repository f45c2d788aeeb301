"""Cells that a spreadsheet would run as formulas are escaped on the way out (CWE-1236)."""

import re
from typing import Final

# With the quotes before them, so that escaping a cell that came escaped can be undone too.
_FORMULA: Final = re.compile(r"'*[=+\-@\t\r\n\0]")


def escape(cell: str) -> str:
    """The cell as text to every spreadsheet: a quote is put before what would be a formula."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def unescape(cell: str) -> str:
    """What `escape` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
