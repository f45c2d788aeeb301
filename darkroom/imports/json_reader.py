"""Reader of JSON rows, one at a time: one object a line, or all of them in one array.

The array has a scanner of its own because ijson 3.6 gives no source text for errors.csv, bounds no
row (one string of 300 MiB ran over 9 minutes), fails the file for one NaN, 1e400 or 65-bit number,
and turns a lone surrogate into `?`.
"""

import json
from collections.abc import Iterator
from typing import IO, Any, Final

from darkroom.errors import InputProblem
from darkroom.imports.columns import canonical
from darkroom.imports.records import BorrowedText, Record, Table, file_problem

MAX_ROW_BYTES: Final = 2**16  # as for the body of a single job
_CHUNK_CHARS: Final = 2**16
_HEADER: Final = ("record",)  #: errors.csv has rejected rows as the JSON they came as


class _DuplicateField(dict[str, object]):
    """Object that names a field twice."""


def _mark_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else _DuplicateField(fields)


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_mark_duplicates)


def read_json_lines(file: IO[bytes]) -> Table:
    """Return one row for each line that is not blank."""
    return Table(_HEADER, _lines(file))


def _lines(file: IO[bytes]) -> Iterator[Record]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        complete = len(line) <= MAX_ROW_BYTES
        while not complete and not line.endswith(b"\n") and (rest := file.readline(_CHUNK_CHARS)):
            line = line[:MAX_ROW_BYTES] + rest[-1:]
        if not line.strip():
            continue
        number += 1
        yield _line(number, line) if complete else _too_long(number, line[:MAX_ROW_BYTES])


def _too_long(number: int, line: bytes) -> Record:
    problem = InputProblem((), "row_too_long", f"is longer than {MAX_ROW_BYTES:,} bytes")
    return Record(number, None, [line.decode("utf-8", "replace")], [problem])


def _line(number: int, line: bytes) -> Record:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        message = (
            f"is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the line"
        )
        return _bad(number, line.decode("utf-8", "replace").strip(), "not_utf8", message)
    try:
        return _record(number, text, _DECODER.decode(text))
    except (ValueError, RecursionError) as error:
        return _bad(number, text, "malformed_json", _reason(error))


def _bad(number: int, text: str, code: str, message: str) -> Record:
    return Record(number, None, [text], [InputProblem((), code, message)])


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg} at character {error.pos + 1}"
    nested = isinstance(error, RecursionError)
    return "is nested too deeply" if nested else "holds a number that is too long"


def _record(number: int, text: str, value: object) -> Record:
    if not isinstance(value, dict):
        return _bad(number, text, "not_an_object", "must be an object with a job's fields")
    values = {canonical(name): field for name, field in value.items()}
    duplicate = any(isinstance(each, _DuplicateField) for each in (value, *value.values()))
    if duplicate or len(values) < len(value):
        return _bad(number, text, "duplicate_field", "names a field twice")
    return Record(number, values, [text])


def read_json_array(file: IO[bytes]) -> Table:
    """Return the rows of `{"jobs": [{…}, …]}`, or of the array alone."""
    return Table(_HEADER, _elements(_JsonScanner(file)))


def _elements(scanner: "_JsonScanner") -> Iterator[Record]:
    wrapped = scanner.take("{")
    if wrapped:
        name = scanner.value(row=0)[0]
        if name != "jobs" or not scanner.take(":"):
            raise file_problem("unknown_field", 'must be {"jobs": […]} and nothing else')
    if not scanner.take("["):
        raise file_problem("malformed_json", 'must be {"jobs": […]}')
    number = 0
    closed = scanner.take("]")
    while not closed:
        number += 1
        value, text = scanner.value(row=number)
        yield _record(number, text, value)
        closed = scanner.take("]")
        if not closed and not scanner.take(","):
            raise file_problem("malformed_json", "a comma or `]` must follow", row=number)
    if (wrapped and not scanner.take("}")) or scanner.peek():
        message = 'must be {"jobs": […]} and nothing else'
        raise file_problem("unknown_field", message)


class _JsonScanner:
    """Scanner of a JSON text through a buffer of a few rows."""

    def __init__(self, file: IO[bytes]) -> None:
        self._text = BorrowedText(file, encoding="utf-8-sig")
        self._buffer = ""
        self._position = 0
        self._at_end = False

    def peek(self) -> str:
        """Return the next character that is not white space, or an empty string at the end."""
        while True:
            while self._position < len(self._buffer):
                if self._buffer[self._position] not in " \t\r\n":
                    return self._buffer[self._position]
                self._position += 1
            if self._at_end:
                return ""
            self._read()

    def take(self, character: str) -> bool:
        """Return whether `character` comes next, and skip it."""
        is_next = self.peek() == character
        self._position += is_next
        return is_next

    def value(self, *, row: int) -> tuple[Any, str]:
        """Return the next value and its source text. Raise InvalidInput if there is none."""
        self.peek()
        while True:
            enough = self._at_end or len(self._buffer) - self._position > MAX_ROW_BYTES
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except (ValueError, RecursionError) as error:
                if enough or not isinstance(error, json.JSONDecodeError):
                    raise file_problem("malformed_json", _reason(error), row=row) from error
            else:
                if enough or end < len(self._buffer):  # else a number may continue
                    text, self._position = self._buffer[self._position : end], end
                    return value, text
            self._read()

    def _read(self) -> None:
        try:
            more = self._text.read(_CHUNK_CHARS)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise file_problem("not_utf8", f"is not UTF-8: byte 0x{byte:02x}") from error
        self._at_end = not more
        self._buffer, self._position = self._buffer[self._position :] + more, 0
