"""CSV as spreadsheets and programs write it, read one row at a time.

RFC 4180 with a header row; comma, semicolon or tab; UTF-8 with or without a byte order mark.
Rows are numbered from 1, the header not counted, whatever newlines their quoted fields hold.
"""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import IO, Final

from darkroom import csv_escape
from darkroom.errors import InputProblem, InvalidInput
from darkroom.imports import columns
from darkroom.imports.columns import Kind, Style, canonical
from darkroom.imports.records import ERROR_COLUMNS, BorrowedText, Record, Table, file_problem

MAX_COLUMNS: Final = 64
# What bounds the memory; a cell past `columns.MAX_CELL_CHARS` costs only its own row.
_MAX_FIELD_CHARS: Final = 2**20
_MAX_LINE_CHARS: Final = 2**21
_SHORT: Final = 16  #: characters, of numbers
_DELIMITERS: Final = ",;\t"
_BAD_BYTE: Final = re.compile("[\udc80-\udcff]")  # as `surrogateescape` decodes it


def read_csv(file: IO[bytes], *, lists: bool = False) -> Table:
    """The table in `file`, which must outlive it. Raises InvalidInput when the header is wrong."""
    csv.field_size_limit(_MAX_FIELD_CHARS)
    lines = _Lines(file)
    first = next(lines, "")
    delimiter = _delimiter(first)
    rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header = _header(rows)
    style = Style(lists=lists, decimal_comma=delimiter != ",")
    return Table(header, _records(rows, lines, _CellReader(header, style)))


class _Lines:
    """The lines of the text, each bounded and known to be UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._text = BorrowedText(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.row = 0  #: that is being read; 0 is the header

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(_MAX_LINE_CHARS)
        if not line:
            raise StopIteration
        if len(line) == _MAX_LINE_CHARS:
            message = f"a line is longer than {_MAX_LINE_CHARS:,} characters"
            raise file_problem("row_too_long", message, row=self.row)
        if not line.isascii() and (bad := _BAD_BYTE.search(line)):
            message = (
                f"is not UTF-8: byte 0x{ord(bad[0]) - 0xDC00:02x} at offset "
                f"{_first_bad_byte(self._file):,} of the file; save the file as UTF-8"
            )
            raise file_problem("not_utf8", message, row=self.row)
        return line


def _first_bad_byte(file: IO[bytes]) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")()
    file.seek(0)
    offset = 0
    while chunk := file.read(2**16):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            return offset - pending + error.start
        offset += len(chunk)
    return offset  # cut off in the middle of a character


def _delimiter(first_line: str) -> str:
    """The one under which most of the header's names are known."""
    excel = re.fullmatch(r"\"?sep=(.?)\"?\s*", first_line, re.IGNORECASE)
    if excel:
        message = (
            f"looks like {excel[1]}: the first line is Excel's `sep={excel[1]}`; remove it: "
            "comma, semicolon and tab are told apart by the header row"
        )
        raise file_problem("delimiter", message, row=0)

    def known(delimiter: str) -> int:
        try:
            names = next(csv.reader([first_line], delimiter=delimiter), [])
        except csv.Error:
            return 0
        return sum(canonical(name) in columns.kinds() for name in names)

    return max(_DELIMITERS, key=known)


def _header(rows: Iterator[list[str]]) -> list[str]:
    """The first row, if it can name columns."""
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise file_problem("malformed_csv", _why(error), row=0) from error
    if len(header) > MAX_COLUMNS:
        message = f"the header has {len(header):,} columns; at most {MAX_COLUMNS} make sense"
        raise file_problem("too_many_columns", message, row=0)
    names = [canonical(name) for name in header]
    known = columns.kinds().keys() | (ERROR_COLUMNS if _returns(names) else ())
    problems = [
        _unknown(place, name)
        for place, name in enumerate(header, start=1)
        if canonical(name) not in known
    ]
    problems += [
        InputProblem(("header", name), "duplicate_column", f"column {name!r} stands twice")
        for name in sorted(known & set(names))
        if names.count(name) > 1
    ]
    if problems:
        raise InvalidInput(problems)
    if "prompt" not in names:
        message = "the first row must name the columns, `prompt` among them"
        raise file_problem("missing_column", message, row=0)
    return header


def _returns(names: Sequence[str]) -> bool:
    """Whether this is a file of rejected rows, as we wrote it, on its way back."""
    return set(ERROR_COLUMNS) <= set(names)


def _unknown(place: int, name: str) -> InputProblem:
    if not name.strip():
        message = f"column {place} has no name (from pandas: `to_csv(index=False)`)"
        return InputProblem(("header", ""), "unknown_column", message)
    return InputProblem(("header", name[:64]), "unknown_column", f"unknown column {name[:64]!r}")


def _records(rows: Iterator[list[str]], lines: _Lines, read: "_CellReader") -> Iterator[Record]:
    number = 0
    while True:
        lines.row = number + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            number += 1
            yield _malformed(number, error)
            continue
        if cells is None:
            return
        if cells:  # a blank line is not a row
            number += 1
            yield read(number, cells)


class _CellReader:
    """Makes records of rows under one header."""

    def __init__(self, header: Sequence[str], style: Style) -> None:
        names = [canonical(name) for name in header]
        self._columns = [_column(name) for name in names]
        self._escaped = _returns(names)
        self._style = style

    def __call__(self, number: int, cells: list[str]) -> Record:
        if self._escaped:
            cells = [csv_escape.unescape(cell) for cell in cells]
        if len(cells) != len(self._columns):
            message = f"has {len(cells):,} cells, the header has {len(self._columns)}"
            return Record(number, None, cells, [InputProblem((), "column_count", message)])
        values: dict[str, object] = {}
        problems: list[InputProblem] = []
        for (name, plain), cell in zip(self._columns, cells, strict=True):
            if not cell or not name or cell.isspace():
                continue  # an empty cell is the default
            chars = len(cell)
            if plain and chars <= columns.MAX_CELL_CHARS:
                values[name] = cell
            elif chars < _SHORT and cell.isascii() and cell.isdigit():
                values[name] = int(cell)
            else:  # none of the usual, for which the above is only faster
                try:
                    values[name] = columns.parse(name, cell, self._style)
                except InvalidInput as invalid:
                    problems += invalid.problems
        return Record(number, values, cells, problems)


def _column(name: str) -> tuple[str, bool]:
    """Its name, empty when it is to be ignored, and whether its cells are taken as they are."""
    ours = name not in ERROR_COLUMNS
    return (name if ours else "", ours and columns.kinds()[name] is Kind.TEXT)


def _malformed(number: int, error: csv.Error) -> Record:
    """A bad row where the next line is surely another row; else the end of the file's reading."""
    if "unexpected end" in str(error) or "field larger" in str(error):
        raise file_problem("malformed_csv", _why(error), row=number) from error
    problem = InputProblem((), "malformed_csv", _why(error))
    return Record(number, None, [], [problem])


def _why(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quote is opened here and never closed"
    if "field larger" in str(error):
        return f"a field has over {_MAX_FIELD_CHARS:,} characters: is its quote ever closed?"
    return f"cannot be read as CSV: {error}"
