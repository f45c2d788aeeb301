"""The columns a file of rows may have: a job's fields by name, and how their cells are read."""

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
LIST_SEPARATOR: Final = "|"  #: between the values of one cell, where a sweep was asked for
_NUMBER_CHARS: Final = 32  #: no number of ours is longer; int() of a long text is slow
_WHOLE: Final = re.compile(r"\s*([+-]?[0-9]+)(?:\.0*)?\s*", re.ASCII)
_DECIMAL_COMMA: Final = re.compile(r"\s*[+-]?[0-9]+,[0-9]+\s*", re.ASCII)


class RowInput(JobInput):
    """One row of a file: a job's fields, how many pictures of it, and the client's name for it."""

    num_images: int = Field(1, ge=1, le=MAX_IMAGES_PER_ROW)
    custom_id: Label | None = None


class Kind(StrEnum):
    """What the cells of a column hold."""

    WHOLE = "a whole number"
    NUMBER = "a number"
    TEXT = "text"
    JSON = "JSON"


@cache
def kinds() -> Mapping[str, Kind]:
    """Every column by its canonical name."""
    return {name: _kind(field.annotation) for name, field in RowInput.model_fields.items()}


def _kind(annotation: object) -> Kind:
    found = set(_plain_types(annotation))
    if int in found:
        return Kind.WHOLE
    if float in found:
        return Kind.NUMBER
    return Kind.TEXT if any(issubclass(kind, str) for kind in found) else Kind.JSON


def _plain_types(annotation: object) -> list[type[Any]]:
    """`int | None` is int; of `Annotated[str, …]` the str; of `dict[str, str]` the dict."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _plain_types(typing.get_args(annotation)[0])
    if origin in {typing.Union, types.UnionType}:
        return [kind for part in typing.get_args(annotation) for kind in _plain_types(part)]
    plain = origin or annotation
    return [plain] if isinstance(plain, type) else []


def canonical(name: str) -> str:
    """The field that a column's heading means, if it is one."""
    name = name.strip().lower()
    return ALIASES.get(name, name)


@dataclass(frozen=True)
class Style:
    """How numbers are written where it is not one number in the C locale."""

    lists: bool = False  #: there may be several: `4|8|16`
    decimal_comma: bool = False  #: `7,5`, as spreadsheets write that delimit by semicolons


def parse(column: str, cell: str, style: Style) -> object:
    """The cell as the type its column wants. Raises InvalidInput, which names the column."""
    if len(cell) > MAX_CELL_CHARS:
        message = f"is longer than {MAX_CELL_CHARS:,} characters"
        raise bad_cell(column, "field_too_long", message)
    kind = kinds()[column]
    if kind is Kind.TEXT:
        return cell
    if kind is Kind.JSON:
        return _json(column, cell)
    if style.decimal_comma and kind is Kind.NUMBER:
        cell = _DECIMAL_COMMA.sub(lambda found: found[0].replace(",", "."), cell)
    if style.lists and LIST_SEPARATOR in cell:
        return [_number(column, part, kind) for part in cell.split(LIST_SEPARATOR)]
    return _number(column, cell, kind)


def _number(column: str, cell: str, kind: Kind) -> int | float:
    if len(cell) <= _NUMBER_CHARS and cell.isascii() and "_" not in cell:
        whole = _WHOLE.fullmatch(cell)
        if whole:
            return int(whole[1])
        if kind is Kind.NUMBER:
            try:
                return float(cell)
            except ValueError:
                pass
    raise bad_cell(column, "not_a_number", f"must be {kind}")


def _json(column: str, cell: str) -> object:
    try:
        return json.loads(cell, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise bad_cell(column, "not_json", "must be JSON") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("names a field twice")
    return found


def bad_cell(column: str, code: str, message: str) -> InvalidInput:
    """What is wrong with one cell; its row is added where that is known."""
    return InvalidInput([InputProblem((column,), code, message)])
