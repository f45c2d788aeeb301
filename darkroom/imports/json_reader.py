"""Rows as JSON: one object a line, or all of them in an array; read one at a time."""

import json
from collections.abc import Iterator
from typing import IO, Any, Final

from darkroom.errors import InputProblem
from darkroom.imports.columns import canonical
from darkroom.imports.records import BorrowedText, Record, Table, file_problem

MAX_ROW_BYTES: Final = 2**16  # as for the body of a single job
_CHUNK: Final = 2**16
_HEADER: Final = ("record",)  #: rejected rows are given back as the JSON they came as


class _DuplicateField(dict[str, object]):
    """An object that names a field twice."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _DuplicateField(found)


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object)


def read_json_lines(file: IO[bytes]) -> Table:
    """One object a line; blank lines are not rows."""
    return Table(_HEADER, _lines(file))


def _lines(file: IO[bytes]) -> Iterator[Record]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        whole = len(line) <= MAX_ROW_BYTES
        while not whole and not line.endswith(b"\n") and (rest := file.readline(_CHUNK)):
            line = line[:MAX_ROW_BYTES] + rest[-1:]
        if not line.strip():
            continue
        number += 1
        yield _line(number, line) if whole else _too_long(number, line[:MAX_ROW_BYTES])


def _too_long(number: int, line: bytes) -> Record:
    problem = InputProblem((), "row_too_long", f"is longer than {MAX_ROW_BYTES:,} bytes")
    return Record(number, None, [line.decode("utf-8", "replace")], [problem])


def _line(number: int, line: bytes) -> Record:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        message = f"is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of it"
        return _bad(number, line.decode("utf-8", "replace").strip(), "not_utf8", message)
    try:
        return _record(number, text, _DECODER.decode(text))
    except (ValueError, RecursionError) as error:
        return _bad(number, text, "malformed_json", _why(error))


def _bad(number: int, text: str, code: str, message: str) -> Record:
    return Record(number, None, [text], [InputProblem((), code, message)])


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg} at character {error.pos + 1}"
    nested = isinstance(error, RecursionError)
    return "is nested too deeply" if nested else "holds a number that is too long"


def _record(number: int, text: str, value: object) -> Record:
    if not isinstance(value, dict):
        return _bad(number, text, "not_an_object", "must be an object with a job's fields")
    values = {canonical(name): field for name, field in value.items()}
    doubled = any(isinstance(each, _DuplicateField) for each in (value, *value.values()))
    if doubled or len(values) < len(value):
        return _bad(number, text, "duplicate_field", "names a field twice")
    return Record(number, values, [text])


def read_json_array(file: IO[bytes]) -> Table:
    """`{"jobs": [{…}, …]}`, or the array alone."""
    return Table(_HEADER, _items(_Window(file)))


def _items(window: "_Window") -> Iterator[Record]:
    wrapped = window.take("{")
    if wrapped:
        name = window.value(row=0)[0]
        if name != "jobs" or not window.take(":"):
            raise file_problem("unknown_field", 'must be {"jobs": […]} and nothing else')
    if not window.take("["):
        raise file_problem("malformed_json", 'must be {"jobs": […]}')
    number = 0
    closed = window.take("]")
    while not closed:
        number += 1
        value, text = window.value(row=number)
        yield _record(number, text, value)
        closed = window.take("]")
        if not closed and not window.take(","):
            raise file_problem("malformed_json", "a comma or `]` must follow", row=number)
    if (wrapped and not window.take("}")) or window.peek():
        message = 'must be {"jobs": […]} and nothing else'
        raise file_problem("unknown_field", message)


class _Window:
    """The part of a JSON text that is being looked at."""

    def __init__(self, file: IO[bytes]) -> None:
        self._text = BorrowedText(file, encoding="utf-8-sig")
        self._seen = ""
        self._at = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._seen):
                if self._seen[self._at] not in " \t\r\n":
                    return self._seen[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._read()

    def take(self, character: str) -> bool:
        """Whether this comes next; then it is passed."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self, *, row: int) -> tuple[Any, str]:
        """The next value, and its text. Raises InvalidInput when there is none."""
        self.peek()
        while True:
            enough = self._ended or len(self._seen) - self._at > MAX_ROW_BYTES
            try:
                value, end = _DECODER.raw_decode(self._seen, self._at)
            except (ValueError, RecursionError) as error:
                if enough or not isinstance(error, json.JSONDecodeError):
                    raise file_problem("malformed_json", _why(error), row=row) from error
            else:
                if enough or end < len(self._seen):  # else a number may go on
                    text, self._at = self._seen[self._at : end], end
                    return value, text
            self._read()

    def _read(self) -> None:
        try:
            more = self._text.read(_CHUNK)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise file_problem("not_utf8", f"is not UTF-8: byte 0x{byte:02x}") from error
        self._ended = not more
        self._seen, self._at = self._seen[self._at :] + more, 0
