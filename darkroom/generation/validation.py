"""What pydantic found wrong, in the words of this project: place, code, message, no echo."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from darkroom.errors import InputProblem

_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field"}
_MESSAGES = {"extra_forbidden": "is not a field of a job", "missing": "is required"}


def input_problems(error: ValidationError) -> list[InputProblem]:
    """One problem for each error. The offending value is never repeated: it may be hostile."""
    return problems_of(error.errors(include_url=False, include_input=False, include_context=False))


def problems_of(errors: Iterable[Any]) -> list[InputProblem]:
    """The same for pydantic's error dicts, which FastAPI hands on in its own exception."""
    return [
        InputProblem(
            loc=tuple(_shortened(part) for part in found["loc"]),
            code=_CODES.get(found["type"], found["type"]),
            message=_MESSAGES.get(found["type"], found["msg"]),
        )
        for found in errors
    ]


def _shortened(part: int | str) -> int | str:
    if isinstance(part, int):
        return part
    return part.encode("utf-8", "replace").decode()[:64]
