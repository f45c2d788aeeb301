"""Escaping of cells that a spreadsheet would run as formulas (CWE-1236)."""

import re
from typing import Final

# Including leading quotes, so that the escaping of an escaped cell can be undone too.
_FORMULA: Final = re.compile(r"'*[=+\-@\t\r\n\0]")


def escape(cell: str) -> str:
    """Put a quote before a cell that would be a formula."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def unescape(cell: str) -> str:
    """Undo `escape`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
