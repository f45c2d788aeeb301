"""Reader of CSV as spreadsheets and programs write it, one row at a time.

RFC 4180 with a header row; comma, semicolon or tab; UTF-8 with or without a byte order mark.
Rows are numbered from 1, without the header; newlines in quoted fields do not count.
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
from darkroom.imports.columns import ColumnType, NumberStyle, canonical
from darkroom.imports.records import ERROR_COLUMNS, BorrowedText, Record, Table, file_problem

MAX_COLUMNS: Final = 64
# These bound memory and end the import; past `columns.MAX_CELL_CHARS` only the row is rejected.
_MAX_FIELD_CHARS: Final = 2**20
_MAX_LINE_CHARS: Final = 2**21
_SHORT_NUMBER_CHARS: Final = 16
_DELIMITERS: Final = ",;\t"
_BAD_BYTE: Final = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of one


def read_csv(file: IO[bytes], *, lists: bool = False) -> Table:
    """Return the table in `file`, which must stay open. Raise InvalidInput for a bad header."""
    csv.field_size_limit(_MAX_FIELD_CHARS)
    lines = _Lines(file)
    first = next(lines, "")
    delimiter = _delimiter(first)
    rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header = _header(rows)
    style = NumberStyle(lists=lists, decimal_comma=delimiter != ",")
    return Table(header, _records(rows, lines, _CellReader(header, style)))


class _Lines:
    """Lines of the text, each of bounded length and valid UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._text = BorrowedText(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.row = 0  #: number of the row being read; 0 is the header

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
    """Return the delimiter under which most names of the header are known."""
    excel = re.fullmatch(r"\"?sep=(.?)\"?\s*", first_line, re.IGNORECASE)
    if excel:
        message = (
            f"looks like {excel[1]}: the first line is Excel's `sep={excel[1]}`; remove it: "
            "comma, semicolon and tab are detected from the header row"
        )
        raise file_problem("delimiter", message, row=0)

    def known_names(delimiter: str) -> int:
        try:
            names = next(csv.reader([first_line], delimiter=delimiter), [])
        except csv.Error:
            return 0
        return sum(canonical(name) in columns.column_types() for name in names)

    return max(_DELIMITERS, key=known_names)


def _header(rows: Iterator[list[str]]) -> list[str]:
    """Read the first row. Raise InvalidInput unless it names known columns, `prompt` among them."""
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise file_problem("malformed_csv", _reason(error), row=0) from error
    if len(header) > MAX_COLUMNS:
        message = f"the header has {len(header):,} columns; at most {MAX_COLUMNS} are allowed"
        raise file_problem("too_many_columns", message, row=0)
    names = [canonical(name) for name in header]
    known = columns.column_types().keys() | (ERROR_COLUMNS if _is_rejected_rows_file(names) else ())
    problems = [
        _unknown(position, name)
        for position, name in enumerate(header, start=1)
        if canonical(name) not in known
    ]
    problems += [
        InputProblem(("header", name), "duplicate_column", f"column {name!r} is named twice")
        for name in sorted(known & set(names))
        if names.count(name) > 1
    ]
    if problems:
        raise InvalidInput(problems)
    if "prompt" not in names:
        message = "the first row must name the columns, `prompt` among them"
        raise file_problem("missing_column", message, row=0)
    return header


def _is_rejected_rows_file(names: Sequence[str]) -> bool:
    """Return whether the header is that of an errors.csv, whose cells are escaped."""
    return set(ERROR_COLUMNS) <= set(names)


def _unknown(position: int, name: str) -> InputProblem:
    if not name.strip():
        message = f"column {position} has no name (from pandas: `to_csv(index=False)`)"
        return InputProblem(("header", ""), "unknown_column", message)
    return InputProblem(("header", name[:64]), "unknown_column", f"unknown column {name[:64]!r}")


def _records(
    rows: Iterator[list[str]], lines: _Lines, read_cells: "_CellReader"
) -> Iterator[Record]:
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
            yield read_cells(number, cells)


class _CellReader:
    """Converter of a row's cells to a record under one header."""

    def __init__(self, header: Sequence[str], style: NumberStyle) -> None:
        names = [canonical(name) for name in header]
        self._columns = [_column(name) for name in names]
        self._escaped = _is_rejected_rows_file(names)
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
            elif chars < _SHORT_NUMBER_CHARS and cell.isascii() and cell.isdigit():
                values[name] = int(cell)
            else:  # the branches above are only faster for the common cells
                try:
                    values[name] = columns.parse(name, cell, self._style)
                except InvalidInput as invalid:
                    problems += invalid.problems
        return Record(number, values, cells, problems)


def _column(name: str) -> tuple[str, bool]:
    """Return a column's name (empty: ignored) and whether its cells are used as they are."""
    is_input = name not in ERROR_COLUMNS
    return (name if is_input else "", is_input and columns.column_types()[name] is ColumnType.TEXT)


def _malformed(number: int, error: csv.Error) -> Record:
    """Return a bad row. Raise InvalidInput after an open quote: the next row is not known."""
    if "unexpected end" in str(error) or "field larger" in str(error):
        raise file_problem("malformed_csv", _reason(error), row=number) from error
    problem = InputProblem((), "malformed_csv", _reason(error))
    return Record(number, None, [], [problem])


def _reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quote is opened here and never closed"
    if "field larger" in str(error):
        return f"a field has over {_MAX_FIELD_CHARS:,} characters: is its quote ever closed?"
    return f"cannot be read as CSV: {error}"
