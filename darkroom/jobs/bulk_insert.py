"""Jobs that are about to become rows, and how COPY is told of them.

What many rows of a file have in common stands in one `JobTemplate`, which is judged, and worded for
COPY, once for all of them; a `NewJob` adds what is the row's own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, TypeAlias

import psycopg
from psycopg import sql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from darkroom.generation.params import GenerationParams, JobInput, cost
from darkroom.status import PRIORITY_RANK, Priority

Row: TypeAlias = Mapping[str, Any]  #: a job's columns

_BLOCK_ROWS: Final = 500  # worded before they are sent: the server works on while we word the next
_ESCAPES: Final = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


@dataclass(frozen=True, eq=False)  # compared by identity: it stands for the rows that share it
class JobTemplate:
    """All that decides a job but its own words."""

    columns: Row
    cost: float
    priority: int
    start_within_s: int | None
    deadline_s: int | None
    num_images: int = 1

    @classmethod
    def of(
        cls,
        asked: JobInput,
        params: GenerationParams,
        microbatch_key: str,
        *,
        default: Priority,
        num_images: int = 1,
    ) -> "JobTemplate":
        """What a validated job shares with others; `default`: the class of one that names none."""
        columns = {
            **params.model_dump(exclude=_OWN_PARAMS),
            "label": asked.label,
            "metadata": asked.metadata,
            "priority": PRIORITY_RANK[asked.priority or default],
            "microbatch_key": microbatch_key,
            "cost": cost(params),
            "webhook_url": asked.webhook_url,
            "webhook_events": asked.webhook_event_types,
        }
        return cls(
            columns,
            columns["cost"],
            columns["priority"],
            asked.start_within_s,
            asked.deadline_s,
            num_images,
        )

    def limits(self, now: datetime) -> dict[str, datetime | None]:
        """When its jobs must have been begun, and ended, by the database's clock."""
        deadline_at = None if self.deadline_s is None else now + timedelta(seconds=self.deadline_s)
        begins = [given for given in (self.start_within_s, self.deadline_s) if given is not None]
        expires_at = now + timedelta(seconds=min(begins)) if begins else None
        return {"expires_at": expires_at, "deadline_at": deadline_at}


class NewJob(NamedTuple):
    """A validated job before it has an id and a place in the queue."""

    recipe: JobTemplate
    prompt: str
    negative_prompt: str
    seed: int
    row_number: int | None = None
    image_number: int = 0
    custom_id: str | None = None
    retried_from: str | None = None


_OWN: Final = NewJob._fields[1:]  #: columns by the same names
_OWN_PARAMS: Final = set(_OWN) & GenerationParams.model_fields.keys()


class Placed(NamedTuple):
    """A draft with its id and its place in the fair order."""

    id: str
    start_tag: float
    draft: NewJob

    def columns(self, common: Row) -> dict[str, Any]:
        """All of its row; `common`: see `shared_columns`."""
        own = zip(_OWN, self.draft[1:], strict=True)
        return {**common, **dict(own), "id": self.id, "start_tag": self.start_tag}


def shared_columns(recipe: JobTemplate, tenant_id: str, batch_id: str | None, now: datetime) -> Row:
    """What the jobs of one recipe have in common, if they are submitted together."""
    return {
        "tenant_id": tenant_id,
        "batch_id": batch_id,
        **recipe.columns,
        **recipe.limits(now),
    }


def copy_jobs(
    session: Session, common: Mapping[JobTemplate, Row], placed: Sequence[Placed]
) -> None:
    """COPY is ten times as fast as INSERT for a file of rows, and no slower for one."""
    connection = session.connection().connection.driver_connection
    assert connection is not None  # a pool's connection has one
    shared = next(iter(common.values()))
    statement = sql.SQL("COPY job ({}) FROM STDIN").format(
        sql.SQL(", ").join(map(sql.Identifier, ("id", "start_tag", *_OWN, *shared)))
    )
    endings = {recipe: _copy_row(columns.values()) for recipe, columns in common.items()}
    try:
        with connection.cursor() as cursor, cursor.copy(statement) as out:
            for block in _blocks(placed, endings):
                out.write(block)
    except psycopg.Error as error:  # as SQLAlchemy words it, whose statement this is not
        raise DBAPIError.instance("COPY job", None, error, psycopg.Error) from error


def _blocks(placed: Sequence[Placed], endings: Mapping[JobTemplate, str]) -> Iterator[bytes]:
    for start in range(0, len(placed), _BLOCK_ROWS):
        lines = [
            f"{job_id}\t{tag!r}\t{_copy_row(draft[1:])}\t{endings[draft.recipe]}\n"
            for job_id, tag, draft in placed[start : start + _BLOCK_ROWS]
        ]
        yield "".join(lines).encode()


def _copy_row(values: Iterable[object]) -> str:
    return "\t".join([_copy_value(value) for value in values])


def _copy_value(value: object) -> str:
    """One value in COPY's text format."""
    if isinstance(value, str):
        if value.isprintable() and "\\" not in value:
            return value
        return value.translate(_ESCAPES)
    if value is None:
        return r"\N"
    if isinstance(value, dict):
        return json.dumps(value).translate(_ESCAPES)
    if isinstance(value, list):  # of words that need no quotes, see `event_types`
        return "{" + ",".join(value) + "}"
    return str(value)
