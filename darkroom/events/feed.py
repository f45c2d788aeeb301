"""What has happened to a job or a batch, read in the order in which it came true.

Whoever has read a subject's events up to one number will see no smaller one of that subject
appear: `darkroom.events` numbers them in the order of their commits. Between subjects there is no
such order: another's smaller number may become visible after a larger one. So readers keep a place
for each subject, and none in the table as a whole.
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

PAGE: Final = 500  #: the most events that one read brings of one place
_OVERLAP: Final = 1000  #: events
_MAX_CHANGED: Final = 10_000
BEGINNING: Final = "evt_" + "0" * 32  #: the id of a place before all events
_STATUS: Final = {event: status for status, event in OF_STATUS.items()}


class EventScope(NamedTuple):
    """What events are about: a tenant's job, or his batch with all of its jobs."""

    tenant_id: str
    id: str

    @property
    def is_job(self) -> bool:
        """Otherwise it is a batch."""
        return is_id("job", self.id)


class EventCursor(NamedTuple):
    """How far somebody has read a subject's events: up to and including this number."""

    subject: EventScope
    sequence: int


class FeedEvent(NamedTuple):
    """An event, and what its job's row adds to it."""

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
        """The job's from then on; None for a batch's event."""
        return _STATUS.get(self.type)

    def ends(self, subject: EventScope) -> bool:
        """Whether the subject has no further event after this one."""
        return self.status in FINISHED if subject.is_job else self.status is None


def latest(session: Session, subject: EventScope) -> tuple[EventCursor, str]:
    """The subject's last event so far: its place and its id, BEGINNING when there is none."""
    last = session.execute(_of(subject).order_by(Event.id.desc()).limit(1)).first()
    number, event_id = (0, BEGINNING) if last is None else last
    return EventCursor(subject, number), event_id


def cursor_for(session: Session, subject: EventScope, event_id: str) -> EventCursor | None:
    """Where the reader is who has read this event of the subject last; None if it has no such."""
    if event_id == BEGINNING:
        return EventCursor(subject, 0)
    at = func.to_timestamp(int(event_id[4:16], 16) / 1000)
    blur = literal(timedelta(milliseconds=1))  # an id has milliseconds, a row microseconds
    about = _of(subject).where(Event.created_at.between(at - blur, at + blur)).subquery()
    number = session.scalar(select(about.c[0]).where(about.c[1] == event_id))
    return None if number is None else EventCursor(subject, number)


def _of(subject: EventScope) -> Select[int, str]:
    column = Event.job_id if subject.is_job else Event.batch_id
    theirs = (column == subject.id, Event.tenant_id == subject.tenant_id)
    return select(Event.id, id_of(Event.id, Event.created_at)).where(*theirs)


def changed_scopes(session: Session, after: int) -> tuple[int, frozenset[str] | None]:
    """The newest number, and the jobs and batches with events past the one given, by id.

    None stands for all, where there were too many. It is a hint where to look: `events_after` is
    the answer. An event that became visible so late that `_OVERLAP` newer ones were there is not
    seen.
    """
    newest = select(Event.id, Event.job_id, Event.batch_id).order_by(Event.id.desc())
    past = newest.where(Event.id > after - _OVERLAP).limit(_MAX_CHANGED)
    rows = session.execute(past).all()
    last = rows[0][0] if rows else after
    if len(rows) == _MAX_CHANGED:
        return last, None
    return last, frozenset(subject for row in rows for subject in row[1:] if subject is not None)


def events_after(
    session: Session, places: Collection[EventCursor]
) -> dict[EventCursor, list[FeedEvent]]:
    """What came true after each place, in order: of each at most a PAGE, and no empty lists."""
    found: dict[EventCursor, list[FeedEvent]] = {}
    jobs = [place for place in places if place.subject.is_job]
    batches = [place for place in places if not place.subject.is_job]
    for column, asked in ((Event.job_id, jobs), (Event.batch_id, batches)):
        if asked:
            for number, *event in session.execute(_events_query(column, asked)):
                found.setdefault(asked[number - 1], []).append(_feed_event(*event))
    return found


def _events_query(
    column: InstrumentedAttribute[str | None], places: Sequence[EventCursor]
) -> Select[Any]:
    """One descent of the subject's index for each place, however many there are.

    The two comparisons say `column = subject AND id > sequence` as a range of that index. Said
    plainly, the planner may walk the primary key instead, from the place to the table's end.
    """
    place = (
        func.unnest(
            cast([place.subject.tenant_id for place in places], ARRAY(Text)),
            cast([place.subject.id for place in places], ARRAY(Text)),
            cast([place.sequence for place in places], ARRAY(BigInteger)),
        )
        .table_valued("tenant_id", "subject", "sequence", with_ordinality="number", name="place")
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
            tuple_(column, Event.id) > tuple_(place.c.subject, place.c.sequence),
            column <= place.c.subject,
            Event.tenant_id == place.c.tenant_id,
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
        select(place.c.number, *event.c, *job)
        .select_from(place)
        .join(event, true())
        .outerjoin(Job, Job.id == event.c.job_id)
        .order_by(event.c.id)
    )


def _feed_event(sequence: int, public_id: str, type_: str, *about: Any) -> FeedEvent:
    return FeedEvent(sequence, public_id, EventType(type_), *about)
