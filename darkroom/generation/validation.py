"""Translation of pydantic's errors into problems: location, code, message, no input."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from darkroom.errors import InputProblem

_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field"}
_MESSAGES = {"extra_forbidden": "is not a field of a job", "missing": "is required"}


def input_problems(error: ValidationError) -> list[InputProblem]:
    """Return one problem per error, without the rejected value, which may be hostile."""
    return problems_of(error.errors(include_url=False, include_input=False, include_context=False))


def problems_of(errors: Iterable[Any]) -> list[InputProblem]:
    """Return one problem per pydantic error dictionary, as in FastAPI's own exception."""
    return [
        InputProblem(
            loc=tuple(_shortened(part) for part in error["loc"]),
            code=_CODES.get(error["type"], error["type"]),
            message=_MESSAGES.get(error["type"], error["msg"]),
        )
        for error in errors
    ]


def _shortened(part: int | str) -> int | str:
    if isinstance(part, int):
        return part
    return part.encode("utf-8", "replace").decode()[:64]
