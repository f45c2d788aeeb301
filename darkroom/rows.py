"""CSV text into jobs, or into everything that is wrong with it. Pure, one row at a time.

RFC 4180 with a header row; comma, semicolon or tab; UTF-8 with or without a byte order mark.
Rows are numbered from 1, the header not counted, whatever newlines their quoted fields hold.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Final, TypeAlias

from pydantic import ValidationError

from darkroom.catalogue import Catalogue
from darkroom.errors import InputProblem, InvalidInput
from darkroom.jobs import Submission
from darkroom.params import MAX_SEED, GenerationParams, JobInput
from darkroom.problems import input_problems

ALIASES: Final = {
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
}
MAX_IMAGES_PER_ROW: Final = 100
MAX_FIELD_CHARS: Final = 16_384
MAX_PROBLEMS: Final = 1000  #: reported of one file; the rest are only counted
_NUMBER_CHARS: Final = 32  #: no number of ours is longer; int() of a long text is slow
_INTEGERS: Final = frozenset({"width", "height", "num_inference_steps", "seed", "num_images"})
_TEXTS: Final = frozenset(
    {
        "prompt",
        "negative_prompt",
        "model",
        "output_format",
        "priority",
        "label",
        "custom_id",
        "webhook_url",
    }
)
COLUMNS: Final = _INTEGERS | _TEXTS | {"guidance_scale"}


Reader: TypeAlias = Iterator[list[str]]  #: csv.reader's own type has no public name


@dataclass
class _Seen:
    """What later rows are compared with."""

    custom_ids: set[str]


def read_csv(file: IO[bytes], catalogue: Catalogue, *, max_rows: int) -> list[Submission]:
    """Every row as submissions, in order.

    Raises InvalidInput with what is wrong with the header, or with every bad row.
    """
    submissions: list[Submission] = []
    problems: list[InputProblem] = []
    seen = _Seen(set())
    for number, cells in _records(file, max_rows=max_rows):
        try:
            submissions.extend(_submissions(number, cells, catalogue, seen))
        except InvalidInput as invalid:
            problems.extend(invalid.problems)
    if problems:
        raise InvalidInput(problems[:MAX_PROBLEMS])
    if not submissions:
        raise InvalidInput([InputProblem(("file",), "no_rows", "the file has no rows of values")])
    return submissions


def _records(file: IO[bytes], *, max_rows: int) -> Iterator[tuple[int, dict[str, str] | int]]:
    """Number and cells of each row by column; or how many cells it has, when that is wrong."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        reader = csv.reader(text, delimiter=_delimiter(text), strict=True)
        yield from _numbered(reader, max_rows)
    except UnicodeDecodeError as error:
        message = (
            f"the file is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        )
        raise InvalidInput([InputProblem(("file",), "not_utf8", message)]) from error
    finally:
        text.detach()


def _numbered(reader: Reader, max_rows: int) -> Iterator[tuple[int, dict[str, str] | int]]:
    columns = _columns(_next(reader, 0) or [])
    number = 0
    while (cells := _next(reader, number + 1)) is not None:
        if not cells:
            continue  # a blank line is not a row
        number += 1
        if number > max_rows:
            message = f"the file has more than {max_rows:,} rows; send it in parts"
            raise InvalidInput([InputProblem(("file",), "too_many_rows", message)])
        fits = len(cells) == len(columns)
        yield number, dict(zip(columns, cells, strict=True)) if fits else len(cells)


def _next(reader: Reader, number: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        place = ("row", number) if number else ("header",)
        hint = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        problem = InputProblem(place, "malformed_csv", hint)
        raise InvalidInput([problem]) from error


def _delimiter(text: io.TextIOWrapper) -> str:
    """Comma, unless the header reads as known columns only with another."""
    header = text.readline(MAX_FIELD_CHARS)
    text.seek(0)
    for delimiter in ",;\t":
        names = next(csv.reader([header], delimiter=delimiter), [])
        if names and all(_canonical(name) in COLUMNS for name in names):
            return delimiter
    return ","


def _canonical(name: str) -> str:
    name = name.strip().lower()
    return ALIASES.get(name, name)


def _columns(header: Sequence[str]) -> list[str]:
    """Canonical column names. Raises InvalidInput when one is unknown, doubled or missing."""
    columns = [_canonical(name) for name in header]
    problems = [
        InputProblem(("header", name[:64]), "unknown_column", f"unknown column {name[:64]!r}")
        for name, column in zip(header, columns, strict=True)
        if column not in COLUMNS
    ]
    problems += [
        InputProblem(("header", column), "doubled_column", f"column {column!r} stands twice")
        for column in sorted(set(columns) & COLUMNS)
        if columns.count(column) > 1
    ]
    if not problems and "prompt" not in columns:
        message = "the first row must name the columns, `prompt` among them"
        problems.append(InputProblem(("header",), "missing_column", message))
    if problems:
        raise InvalidInput(problems)
    return columns


def _submissions(
    number: int, cells: dict[str, str] | int, catalogue: Catalogue, seen: _Seen
) -> list[Submission]:
    if isinstance(cells, int):
        message = f"has {cells} cells, which is not the number of columns of the header"
        raise _row_problem(number, None, "column_count", message)
    values = _values(number, cells)
    images = values.pop("num_images", 1)
    custom_id = values.pop("custom_id", None)
    _check_row(number, images, custom_id, seen)
    try:
        job = JobInput.model_validate(values)
        submissions = _expand(job, int(str(images)), catalogue)
    except ValidationError as error:
        raise InvalidInput([_in_row(number, found) for found in input_problems(error)]) from error
    except InvalidInput as error:
        raise InvalidInput([_in_row(number, found) for found in error.problems]) from error
    return [
        Submission(
            input=job,
            params=params,
            microbatch_key=catalogue.models[params.model].microbatch_key(params),
            row_number=number,
            image_number=image_number,
            custom_id=None if custom_id is None else str(custom_id),
        )
        for image_number, params in enumerate(submissions)
    ]


def _expand(job: JobInput, images: int, catalogue: Catalogue) -> list[GenerationParams]:
    """`num_images` pictures of one row: the same but for seeds that count up."""
    first = catalogue.resolve(job)
    if first.seed + images - 1 > MAX_SEED:
        raise InvalidInput(
            [InputProblem(("seed",), "out_of_range", "seed + num_images is too large")]
        )
    return [first.model_copy(update={"seed": first.seed + image}) for image in range(images)]


def _values(number: int, cells: dict[str, str]) -> dict[str, object]:
    """Cells as the types their columns want; empty cells fall back to the defaults."""
    return {column: _value(number, column, cell) for column, cell in cells.items() if cell.strip()}


def _value(number: int, column: str, cell: str) -> object:
    if len(cell) > MAX_FIELD_CHARS:
        message = f"is longer than {MAX_FIELD_CHARS:,} characters"
        raise _row_problem(number, column, "field_too_long", message)
    if column in _TEXTS:
        return cell
    parse: Callable[[str], object] = int if column in _INTEGERS else float
    kind = "a whole number" if column in _INTEGERS else "a number"
    if len(cell) > _NUMBER_CHARS or not cell.isascii() or "_" in cell:
        raise _row_problem(number, column, "not_a_number", f"must be {kind}")
    try:
        return parse(cell)
    except ValueError as error:
        raise _row_problem(number, column, "not_a_number", f"must be {kind}") from error


def _check_row(number: int, images: object, custom_id: object, seen: _Seen) -> None:
    if not isinstance(images, int) or not 1 <= images <= MAX_IMAGES_PER_ROW:
        message = f"must be between 1 and {MAX_IMAGES_PER_ROW}"
        raise _row_problem(number, "num_images", "out_of_range", message)
    if isinstance(custom_id, str):
        if custom_id in seen.custom_ids:
            raise _row_problem(number, "custom_id", "not_unique", "stands in an earlier row too")
        seen.custom_ids.add(custom_id)


def _row_problem(number: int, column: str | None, code: str, message: str) -> InvalidInput:
    return InvalidInput([_in_row(number, InputProblem((column,) if column else (), code, message))])


def _in_row(number: int, problem: InputProblem) -> InputProblem:
    """The same problem, placed: the place says which row and column, the message only what."""
    return InputProblem(("row", number, *problem.loc[-1:]), problem.code, problem.message)
