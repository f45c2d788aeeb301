"""Event feed: the events of a job or a batch, in order.

`darkroom.events.log` numbers the events of one scope in commit order, so a reader that has read up
to a number never misses a smaller one of that scope. Across scopes there is no such order: a
smaller number may become visible after a larger one. So a reader keeps a cursor per scope.
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, Select, Text, cast, func, literal, select, true, tuple_
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import InstrumentedAttribute, Session

from darkroom.db.tables import Event, Job
from darkroom.event_types import EventType
from darkroom.events.fanout import id_of
from darkroom.events.log import OF_STATUS
from darkroom.ids import is_id
from darkroom.status import FINISHED, Status

PAGE: Final = 500  #: most events per cursor and read
_OVERLAP: Final = 1000  #: events
_MAX_CHANGED: Final = 10_000
BEGINNING: Final = "evt_" + "0" * 32  #: id of the cursor before all events
_STATUS: Final = {event: status for status, event in OF_STATUS.items()}


class EventScope(NamedTuple):
    """Scope of a feed: a job, or a batch with all of its jobs, of one tenant."""

    tenant_id: str
    id: str

    @property
    def is_job(self) -> bool:
        """Whether it is a job; otherwise it is a batch."""
        return is_id("job", self.id)


class EventCursor(NamedTuple):
    """Position in a scope's events: the number of the last one read."""

    subject: EventScope
    sequence: int


class FeedEvent(NamedTuple):
    """Event with columns of its job."""

    sequence: int
    id: str  #: public
    type: EventType
    created_at: datetime
    job_id: str | None
    batch_id: str | None
    row_number: int | None
    custom_id: str | None
    error_code: str | None
    error_message: str | None
    error_retryable: bool | None

    @property
    def status(self) -> Status | None:
        """Status of the job after this event; None for a batch's event."""
        return _STATUS.get(self.type)

    def ends(self, subject: EventScope) -> bool:
        """Return whether no event of the scope follows this one."""
        return self.status in FINISHED if subject.is_job else self.status is None


def latest(session: Session, subject: EventScope) -> tuple[EventCursor, str]:
    """Return the cursor and the id of the scope's last event; BEGINNING if it has none."""
    last = session.execute(_events_of(subject).order_by(Event.id.desc()).limit(1)).first()
    number, event_id = (0, BEGINNING) if last is None else last
    return EventCursor(subject, number), event_id


def cursor_for(session: Session, subject: EventScope, event_id: str) -> EventCursor | None:
    """Return the cursor at an event of the scope; None if the scope has no such event."""
    if event_id == BEGINNING:
        return EventCursor(subject, 0)
    created_at = func.to_timestamp(int(event_id[4:16], 16) / 1000)
    margin = literal(timedelta(milliseconds=1))  # an id has milliseconds, a row microseconds
    within = Event.created_at.between(created_at - margin, created_at + margin)
    events = _events_of(subject).where(within).subquery()
    number = session.scalar(select(events.c[0]).where(events.c[1] == event_id))
    return None if number is None else EventCursor(subject, number)


def _events_of(subject: EventScope) -> Select[int, str]:
    column = Event.job_id if subject.is_job else Event.batch_id
    in_scope = (column == subject.id, Event.tenant_id == subject.tenant_id)
    return select(Event.id, id_of(Event.id, Event.created_at)).where(*in_scope)


def changed_scopes(session: Session, after: int) -> tuple[int, frozenset[str] | None]:
    """Return the newest number, and the ids of jobs and batches with events after number `after`.

    None stands for all, if there are too many. It is a hint: only `events_after` is exact. An
    event that becomes visible after `_OVERLAP` newer ones is missed.
    """
    newest = select(Event.id, Event.job_id, Event.batch_id).order_by(Event.id.desc())
    recent = newest.where(Event.id > after - _OVERLAP).limit(_MAX_CHANGED)
    rows = session.execute(recent).all()
    last = rows[0][0] if rows else after
    if len(rows) == _MAX_CHANGED:
        return last, None
    return last, frozenset(id_ for row in rows for id_ in row[1:] if id_ is not None)


def events_after(
    session: Session, cursors: Collection[EventCursor]
) -> dict[EventCursor, list[FeedEvent]]:
    """Return the events after each cursor, in order, at most a PAGE each; no empty lists."""
    events: dict[EventCursor, list[FeedEvent]] = {}
    jobs = [cursor for cursor in cursors if cursor.subject.is_job]
    batches = [cursor for cursor in cursors if not cursor.subject.is_job]
    for column, chosen in ((Event.job_id, jobs), (Event.batch_id, batches)):
        if chosen:
            for number, *event in session.execute(_events_query(column, chosen)):
                events.setdefault(chosen[number - 1], []).append(_feed_event(*event))
    return events


def _events_query(
    column: InstrumentedAttribute[str | None], cursors: Sequence[EventCursor]
) -> Select[Any]:
    """Return the query that descends the scope's index once for each cursor.

    The two comparisons state `column = subject AND id > sequence` as a range of that index.
    Otherwise the planner may walk the primary key, from the cursor to the table's end.
    """
    cursor = (
        func.unnest(
            cast([each.subject.tenant_id for each in cursors], ARRAY(Text)),
            cast([each.subject.id for each in cursors], ARRAY(Text)),
            cast([each.sequence for each in cursors], ARRAY(BigInteger)),
        )
        .table_valued("tenant_id", "subject", "sequence", with_ordinality="number", name="cursor")
        .render_derived()
    )
    event = (
        select(
            Event.id,
            id_of(Event.id, Event.created_at).label("public_id"),
            Event.type,
            Event.created_at,
            Event.job_id,
            Event.batch_id,
        )
        .where(
            tuple_(column, Event.id) > tuple_(cursor.c.subject, cursor.c.sequence),
            column <= cursor.c.subject,
            Event.tenant_id == cursor.c.tenant_id,
        )
        .order_by(column, Event.id)
        .limit(PAGE)
        .lateral("event")
    )
    job = (
        Job.row_number,
        Job.custom_id,
        Job.error_code,
        Job.error_message,
        Job.error_retryable,
    )
    return (
        select(cursor.c.number, *event.c, *job)
        .select_from(cursor)
        .join(event, true())
        .outerjoin(Job, Job.id == event.c.job_id)
        .order_by(event.c.id)
    )


def _feed_event(sequence: int, public_id: str, type_: str, *columns: Any) -> FeedEvent:
    return FeedEvent(sequence, public_id, EventType(type_), *columns)
