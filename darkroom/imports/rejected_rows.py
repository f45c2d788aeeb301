"""errors.csv: the rows that a batch did not take, as they came, and why.

Kept with the batch as pieces of CSV text, written in the transaction that created it. Mended, the
file can be sent again as it is: its own columns are ignored, and escaped cells come back.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from darkroom import csv_escape
from darkroom.db.connection import Sessions
from darkroom.db.tables import RejectedRowChunk
from darkroom.errors import InputProblem
from darkroom.imports.records import ERROR_COLUMNS, Record

_PIECE_CHARS: Final = 2**19


class RejectedRowWriter:
    """Takes rejected rows down as pieces of the file, for whoever puts them away in time."""

    def __init__(self, header: Sequence[str]) -> None:
        self._columns = [place for place, name in enumerate(header) if name not in ERROR_COLUMNS]
        self._width = len(header)
        self._text = io.StringIO(newline="")
        self.pieces: list[bytes] = []  #: that are whole and were not taken yet
        self._write([header[place] for place in self._columns] + list(ERROR_COLUMNS))

    def add(self, record: Record, problems: Sequence[InputProblem]) -> None:
        """One row, under the header it came under."""
        cells = [*record.source, *[""] * (self._width - len(record.source))]
        # A comma that wanted quotes has made cells too many: nothing of them may be lost.
        cells[self._width - 1 :] = [",".join(cells[self._width - 1 :])]
        column = str(problems[0].loc[2]) if len(problems[0].loc) > 2 else ""  # noqa: PLR2004  # ("row", 7, column)
        why = "; ".join(_described(problem) for problem in problems)
        self._write([cells[place] for place in self._columns] + [str(record.number), column, why])

    def close(self) -> None:
        """What was added last is a piece too."""
        if self._text.tell():
            self._cut()

    def taken(self) -> list[bytes]:
        """The pieces, which are the caller's from now on."""
        pieces, self.pieces = self.pieces, []
        return pieces

    def _write(self, cells: Sequence[str]) -> None:
        csv.writer(self._text).writerow([csv_escape.escape(cell) for cell in cells])
        if self._text.tell() > _PIECE_CHARS:
            self._cut()

    def _cut(self) -> None:
        self.pieces.append(self._text.getvalue().encode("utf-8", "replace"))
        self._text = io.StringIO(newline="")


def write(session: Session, batch_id: str, pieces: Sequence[bytes], *, first: int) -> None:
    """Put the batch's next pieces away, of which it has `first` already."""
    rows = [
        {"batch_id": batch_id, "piece": number, "csv": text}
        for number, text in enumerate(pieces, start=first)
    ]
    if rows:
        session.execute(insert(RejectedRowChunk), rows)


def _described(problem: InputProblem) -> str:
    where = ".".join(str(part) for part in problem.loc[2:])
    return f"{where} {problem.message}" if where else problem.message


def read(sessions: Sessions, batch_id: str) -> Iterator[bytes]:
    """The file in pieces; a transaction for each, so that a slow reader holds nothing."""
    number = 0
    while True:
        with sessions.begin() as session:
            piece = session.scalar(
                select(RejectedRowChunk.csv).where(
                    RejectedRowChunk.batch_id == batch_id, RejectedRowChunk.piece == number
                )
            )
        if piece is None:
            return
        yield piece
        number += 1
