"""Escaping of cells that a spreadsheet would run as formulas (CWE-1236)."""

import re
from typing import Final

# Leading quotes count, so that escaping an escaped cell can be undone too.
_FORMULA: Final = re.compile(r"'*[=+\-@\t\r\n\0]")


def escape(cell: str) -> str:
    """Prefix a cell that would be a formula with a quote, which makes it text."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def unescape(cell: str) -> str:
    """Undo `escape`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
