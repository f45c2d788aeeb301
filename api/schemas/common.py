"""Parts that several resources share: timestamps, pages, input problems, ETAs."""

from datetime import datetime
from typing import Annotated, Final, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, Field, PlainSerializer, WithJsonSchema

from darkroom.errors import InputProblem
from darkroom.forecast.eta import Eta
from darkroom.rfc3339 import rfc3339

Item = TypeVar("Item")

#: RFC 3339, UTC, milliseconds
Moment = Annotated[
    datetime,
    PlainSerializer(rfc3339, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]

ETA_P50: Final = "Seconds from now until the end in half of all cases, or null while unknown."
ETA_P90: Final = "Seconds from now until the end in nine of ten cases, or null while unknown."


class ProblemItem(BaseModel):
    """One problem with the input, and its place."""

    loc: list[str | int] = Field(
        description="Path to the field: `body` or `query` and names, or a row's number and column."
    )
    code: str = Field(description="Stable name of the problem, in snake_case.")
    message: str = Field(description="What is wrong, for people.")

    @classmethod
    def of(cls, found: InputProblem) -> Self:
        """Render a problem."""
        return cls(loc=list(found.loc), code=found.code, message=found.message)


class Page(BaseModel, Generic[Item]):
    """Part of a list."""

    object: Literal["list"] = "list"
    data: list[Item] = Field(description="The items of this page.")
    next_cursor: str | None = Field(
        description="Send it as `cursor` to get the next page. Null on the last page."
    )


def eta_fields(eta: Eta | None) -> dict[str, float | None]:
    """Return the two ETA fields, rounded to tenths of a second."""
    return {
        "eta_s_p50": None if eta is None else round(eta.p50_s, 1),
        "eta_s_p90": None if eta is None else round(eta.p90_s, 1),
    }
