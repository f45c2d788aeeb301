"""errors.csv: the rejected rows of a batch as they came, with the reasons.

Stored with the batch as chunks of CSV text, written in the transaction that creates the batch.
Once corrected, the file can be sent again: its added columns are ignored, its cells unescaped.
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

_CHUNK_CHARS: Final = 2**19


class RejectedRowWriter:
    """Writer of errors.csv in chunks, which the caller takes and stores."""

    def __init__(self, header: Sequence[str]) -> None:
        self._columns = [index for index, name in enumerate(header) if name not in ERROR_COLUMNS]
        self._width = len(header)
        self._text = io.StringIO(newline="")
        self.chunks: list[bytes] = []  #: complete and not taken yet
        self._write([header[index] for index in self._columns] + list(ERROR_COLUMNS))

    def add(self, record: Record, problems: Sequence[InputProblem]) -> None:
        """Add one row under the original header."""
        cells = [*record.source, *[""] * (self._width - len(record.source))]
        # An unquoted comma makes too many cells: the last column keeps all of them.
        cells[self._width - 1 :] = [",".join(cells[self._width - 1 :])]
        column = str(problems[0].loc[2]) if len(problems[0].loc) > 2 else ""  # noqa: PLR2004  # ("row", 7, column)
        reason = "; ".join(_described(problem) for problem in problems)
        self._write(
            [cells[index] for index in self._columns] + [str(record.number), column, reason]
        )

    def close(self) -> None:
        """Complete the last chunk."""
        if self._text.tell():
            self._end_chunk()

    def take(self) -> list[bytes]:
        """Return the complete chunks and forget them."""
        chunks, self.chunks = self.chunks, []
        return chunks

    def _write(self, cells: Sequence[str]) -> None:
        csv.writer(self._text).writerow([csv_escape.escape(cell) for cell in cells])
        if self._text.tell() > _CHUNK_CHARS:
            self._end_chunk()

    def _end_chunk(self) -> None:
        self.chunks.append(self._text.getvalue().encode("utf-8", "replace"))
        self._text = io.StringIO(newline="")


def write(session: Session, batch_id: str, chunks: Sequence[bytes], *, first: int) -> None:
    """Store the next chunks of a batch, numbered from `first`."""
    rows = [
        {"batch_id": batch_id, "piece": number, "csv": text}
        for number, text in enumerate(chunks, start=first)
    ]
    if rows:
        session.execute(insert(RejectedRowChunk), rows)


def _described(problem: InputProblem) -> str:
    field = ".".join(str(part) for part in problem.loc[2:])
    return f"{field} {problem.message}" if field else problem.message


def read(sessions: Sessions, batch_id: str) -> Iterator[bytes]:
    """Yield the file in chunks, one transaction each: a slow client must not keep one open."""
    number = 0
    while True:
        with sessions.begin() as session:
            chunk = session.scalar(
                select(RejectedRowChunk.csv).where(
                    RejectedRowChunk.batch_id == batch_id, RejectedRowChunk.piece == number
                )
            )
        if chunk is None:
            return
        yield chunk
        number += 1
