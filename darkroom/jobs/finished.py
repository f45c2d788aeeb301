"""Jobs in the order of their last events, for a process that counts them as they finish."""

from collections.abc import Collection
from datetime import timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, Interval, all_, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from darkroom.db.tables import Event, Job
from darkroom.events.log import OF_STATUS
from darkroom.status import FINISHED, Status

_STATUS: Final = {event.value: status for status, event in OF_STATUS.items() if status in FINISHED}


class FinishedJob(NamedTuple):
    """What is measured of a job that has finished."""

    event_id: int
    status: Status
    model: str
    queued: timedelta | None  #: until its last start; None if it never started
    inference_ms: int | None
    upload_ms: int | None


def last_event_before(session: Session, age: timedelta) -> int:
    """Return the number of the last event that is older than `age`; 0 if there is none."""
    moment = func.now() - literal(age, Interval)
    older = select(Event.id).where(Event.created_at < moment).order_by(Event.id.desc()).limit(1)
    return session.scalar(older) or 0


def finished_after(
    session: Session, after: int, *, counted: Collection[int], limit: int
) -> list[FinishedJob]:
    """Return the jobs of the finishing events after a number, in order, except `counted` ones."""
    known = literal(list(counted), ARRAY(BigInteger))
    rows = session.execute(
        select(
            Event.id,
            Event.type,
            Job.model,
            Job.started_at - Job.created_at,
            Job.inference_ms,
            Job.upload_ms,
        )
        .join(Job, Job.id == Event.job_id)
        .where(Event.id > after, Event.id != all_(known), Event.type.in_(_STATUS))
        .order_by(Event.id)
        .limit(limit)
    )
    return [_finished_job(*row) for row in rows]


def _finished_job(event_id: int, event: str, *measured: Any) -> FinishedJob:
    return FinishedJob(event_id, _STATUS[event], *measured)
