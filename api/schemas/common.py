"""Common."""

from datetime import datetime
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, PlainSerializer

from darkroom.errors import InputProblem
from darkroom.forecast.eta import Eta
from darkroom.rfc3339 import rfc3339

Item = TypeVar("Item")


#: RFC 3339, UTC, milliseconds
Moment = Annotated[datetime, PlainSerializer(rfc3339, return_type=str)]


class ProblemItem(BaseModel):
    """One thing wrong with the input, and where."""

    loc: list[str | int]
    code: str
    message: str

    @classmethod
    def of(cls, found: InputProblem) -> Self:
        """The problem as clients see it."""
        return cls(loc=list(found.loc), code=found.code, message=found.message)


class Page(BaseModel, Generic[Item]):
    """Part of a list; ask again with `cursor=next_cursor` for what follows."""

    object: Literal["list"] = "list"
    data: list[Item]
    next_cursor: str | None


def _eta(eta: Eta | None) -> dict[str, float | None]:
    """Tenths of a second are enough."""
    return {
        "eta_s_p50": None if eta is None else round(eta.p50_s, 1),
        "eta_s_p90": None if eta is None else round(eta.p90_s, 1),
    }
