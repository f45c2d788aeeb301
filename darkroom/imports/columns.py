"""Columns of a file of rows: a job's fields by name, and how their cells are parsed."""

import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Final

from pydantic import Field

from darkroom.errors import InputProblem, InvalidInput
from darkroom.generation.params import JobInput, Label

ALIASES: Final = {
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
}
MAX_CELL_CHARS: Final = 16_384
MAX_IMAGES_PER_ROW: Final = 100
LIST_SEPARATOR: Final = "|"  #: between the values of one cell in a parameter sweep
_MAX_NUMBER_CHARS: Final = 32  #: no valid number is longer; int() of a long text is slow
_INTEGER: Final = re.compile(r"\s*([+-]?[0-9]+)(?:\.0*)?\s*", re.ASCII)
_DECIMAL_COMMA: Final = re.compile(r"\s*[+-]?[0-9]+,[0-9]+\s*", re.ASCII)


class RowInput(JobInput):
    """Row of a file: a job's fields, its number of images, and the client's id for it."""

    num_images: int = Field(1, ge=1, le=MAX_IMAGES_PER_ROW)
    custom_id: Label | None = None


class ColumnType(StrEnum):
    """Type of the values in a column."""

    INTEGER = "a whole number"
    NUMBER = "a number"
    TEXT = "text"
    JSON = "JSON"


@cache
def column_types() -> Mapping[str, ColumnType]:
    """Return the type of every column by its canonical name."""
    return {name: _column_type(field.annotation) for name, field in RowInput.model_fields.items()}


def _column_type(annotation: object) -> ColumnType:
    found = set(_plain_types(annotation))
    if int in found:
        return ColumnType.INTEGER
    if float in found:
        return ColumnType.NUMBER
    return ColumnType.TEXT if any(issubclass(kind, str) for kind in found) else ColumnType.JSON


def _plain_types(annotation: object) -> list[type[Any]]:
    """Return the classes in an annotation: int of `int | None`, dict of `dict[str, str]`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _plain_types(typing.get_args(annotation)[0])
    if origin in {typing.Union, types.UnionType}:
        return [kind for part in typing.get_args(annotation) for kind in _plain_types(part)]
    plain = origin or annotation
    return [plain] if isinstance(plain, type) else []


def canonical(name: str) -> str:
    """Return the field name that a column heading stands for: trimmed, lower case, no alias."""
    name = name.strip().lower()
    return ALIASES.get(name, name)


@dataclass(frozen=True)
class NumberStyle:
    """Notation of numbers other than one number in the C locale."""

    lists: bool = False  #: a cell may hold several: `4|8|16`
    decimal_comma: bool = False  #: `7,5`, as in files that are delimited by semicolons


def parse(column: str, cell: str, style: NumberStyle) -> object:
    """Convert a cell to its column's type. Raise InvalidInput, which names the column."""
    if len(cell) > MAX_CELL_CHARS:
        message = f"is longer than {MAX_CELL_CHARS:,} characters"
        raise bad_cell(column, "field_too_long", message)
    column_type = column_types()[column]
    if column_type is ColumnType.TEXT:
        return cell
    if column_type is ColumnType.JSON:
        return _json(column, cell)
    if style.decimal_comma and column_type is ColumnType.NUMBER:
        cell = _DECIMAL_COMMA.sub(lambda match: match[0].replace(",", "."), cell)
    if style.lists and LIST_SEPARATOR in cell:
        return [_number(column, part, column_type) for part in cell.split(LIST_SEPARATOR)]
    return _number(column, cell, column_type)


def _number(column: str, cell: str, column_type: ColumnType) -> int | float:
    if len(cell) <= _MAX_NUMBER_CHARS and cell.isascii() and "_" not in cell:
        integer = _INTEGER.fullmatch(cell)
        if integer:
            return int(integer[1])
        if column_type is ColumnType.NUMBER:
            try:
                return float(cell)
            except ValueError:
                pass
    raise bad_cell(column, "not_a_number", f"must be {column_type}")


def _json(column: str, cell: str) -> object:
    try:
        return json.loads(cell, object_pairs_hook=_unique_fields)
    except (ValueError, RecursionError) as error:
        raise bad_cell(column, "not_json", "must be JSON") from error


def _unique_fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("names a field twice")
    return fields


def bad_cell(column: str, code: str, message: str) -> InvalidInput:
    """Build the error of one cell; the caller that knows its row adds it."""
    return InvalidInput([InputProblem((column,), code, message)])
