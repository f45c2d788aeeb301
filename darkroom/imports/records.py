"""What a file of rows is read as, whatever its format: records that are numbered from 1."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from darkroom.errors import InputProblem, InvalidInput

#: added to the columns of rejected rows, see `darkroom.imports.rejected_rows`; ignored when they
#: come back
ERROR_COLUMNS: Final = ("row_number", "error_column", "error")


@dataclass(slots=True)
class Record:
    """One row as it came, and its values by canonical column; None when it cannot be read."""

    number: int
    values: dict[str, object] | None
    source: Sequence[str]  #: the cells under the table's header
    problems: list[InputProblem] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """A file of rows. Reading the records may raise InvalidInput, when the file ends there."""

    header: Sequence[str]  #: of the records' sources
    records: Iterator[Record]


class BorrowedText(io.TextIOWrapper):
    """A file's text; the file stays open when this is done with, to be read again."""

    def close(self) -> None:
        """The file is the caller's to close."""


def file_problem(code: str, message: str, *, row: int | None = None) -> InvalidInput:
    """What is wrong with the file as a whole; `row`: where it was noticed, 0 for the header."""
    if row is None:
        return InvalidInput([InputProblem(("file",), code, message)])
    place = ("row", row) if row else ("header",)
    return InvalidInput([InputProblem(place, code, message)])
