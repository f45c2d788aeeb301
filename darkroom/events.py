"""What happened, written down in the transaction that made it true."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from sqlalchemy import ColumnElement, insert, literal, select
from sqlalchemy.orm import Session

from darkroom.status import Status
from darkroom.tables import Batch, Event, Job


class EventType(StrEnum):
    """The public names."""

    JOB_STARTED = "job.started"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELED = "job.canceled"
    JOB_EXPIRED = "job.expired"
    BATCH_COMPLETED = "batch.completed"
    BATCH_CANCELED = "batch.canceled"


OF_STATUS: Final = {
    Status.RUNNING: EventType.JOB_STARTED,
    Status.SUCCEEDED: EventType.JOB_SUCCEEDED,
    Status.FAILED: EventType.JOB_FAILED,
    Status.CANCELED: EventType.JOB_CANCELED,
    Status.EXPIRED: EventType.JOB_EXPIRED,
}


def record_jobs(session: Session, jobs: Iterable[Job]) -> None:
    """What each job's present status says has happened to it."""
    rows = [
        {
            "tenant_id": job.tenant_id,
            "type": OF_STATUS[Status(job.status)],
            "job_id": job.id,
            "batch_id": job.batch_id,
        }
        for job in jobs
    ]
    if rows:
        session.execute(insert(Event), rows)


def record_canceled(session: Session, which: ColumnElement[bool]) -> None:
    """One event for each job that fits. Written by the server: there may be 100,000."""
    canceled = select(
        Job.tenant_id, literal(EventType.JOB_CANCELED.value), Job.id, Job.batch_id
    ).where(which)
    columns = [Event.tenant_id, Event.type, Event.job_id, Event.batch_id]
    session.execute(insert(Event).from_select(columns, canceled))


def record_batches(session: Session, event: EventType, batches: Iterable[Batch]) -> None:
    """One event for each batch."""
    rows = [
        {"tenant_id": batch.tenant_id, "type": event, "batch_id": batch.id} for batch in batches
    ]
    if rows:
        session.execute(insert(Event), rows)
