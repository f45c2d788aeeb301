"""What happened, written down in the transaction that made it true."""

from collections.abc import Iterable
from enum import StrEnum

from sqlalchemy import insert
from sqlalchemy.orm import Session

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


def record_jobs(session: Session, jobs: Iterable[Job]) -> None:
    """One `job.<status>` event for each job's present status."""
    rows = [
        {
            "tenant_id": job.tenant_id,
            "type": EventType(f"job.{job.status}"),
            "job_id": job.id,
            "batch_id": job.batch_id,
        }
        for job in jobs
    ]
    if rows:
        session.execute(insert(Event), rows)


def record_batches(session: Session, event: EventType, batches: Iterable[Batch]) -> None:
    """One event for each batch."""
    rows = [
        {"tenant_id": batch.tenant_id, "type": event, "batch_id": batch.id} for batch in batches
    ]
    if rows:
        session.execute(insert(Event), rows)
