"""Records: the rows of a file in any format, numbered from 1."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from darkroom.errors import InputProblem, InvalidInput

#: columns that `darkroom.imports.rejected_rows` adds; ignored when its file is sent again
ERROR_COLUMNS: Final = ("row_number", "error_column", "error")


@dataclass(slots=True)
class Record:
    """Row as it came, and its values by canonical column; None if it cannot be parsed."""

    number: int
    values: dict[str, object] | None
    source: Sequence[str]  #: the cells under the table's header
    problems: list[InputProblem] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """File of rows. Iterating over the records may raise InvalidInput, which ends the file."""

    header: Sequence[str]  #: of the records' sources
    records: Iterator[Record]


class BorrowedText(io.TextIOWrapper):
    """Text of a file that stays open afterwards, to be read again."""

    def close(self) -> None:
        """Leave the file open: its caller closes it."""


def file_problem(code: str, message: str, *, row: int | None = None) -> InvalidInput:
    """Build the error of a whole file. `row`: where it was found; 0 is the header."""
    if row is None:
        return InvalidInput([InputProblem(("file",), code, message)])
    loc = ("row", row) if row else ("header",)
    return InvalidInput([InputProblem(loc, code, message)])
