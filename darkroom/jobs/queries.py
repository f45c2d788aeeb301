"""Queries."""

from collections.abc import Collection, Sequence

from sqlalchemy import (
    func,
    select,
    tuple_,
)
from sqlalchemy.orm import Session, aliased

from darkroom.db.tables import Job
from darkroom.errors import Deleted, NotFound
from darkroom.events.feed import EventScope
from darkroom.ids import is_id
from darkroom.status import Status


def find(session: Session, tenant_id: str, job_id: str, *, lock: bool = False) -> Job:
    """The tenant's job. Raises NotFound, also for another tenant's, and Deleted."""
    theirs = select(Job).where(Job.tenant_id == tenant_id, Job.id == job_id)
    if lock:
        theirs = theirs.with_for_update()
    job = session.scalar(theirs) if is_id("job", job_id) else None
    if job is None:
        raise NotFound("job", job_id)
    if job.deleted_at is not None:
        raise Deleted("job", job_id, job.deleted_at)
    return job


def running(session: Session, wanted: Collection[EventScope]) -> Sequence[Job]:
    """Those of the tenants' jobs that are being drawn."""
    theirs = tuple_(Job.tenant_id, Job.id).in_(wanted)
    return session.scalars(select(Job).where(theirs, Job.status == Status.RUNNING)).all()


def page(
    session: Session,
    tenant_id: str,
    *,
    limit: int,
    after: str | None = None,
    status: Status | None = None,
    batch_id: str | None = None,
    label: str | None = None,
) -> Sequence[Job]:
    """Newest first; a batch's jobs in the order of its rows. `after`: the last id already seen."""
    jobs = select(Job).where(Job.tenant_id == tenant_id, Job.deleted_at.is_(None)).limit(limit)
    filters = {Job.status: status, Job.batch_id: batch_id, Job.label: label}
    for column, wanted in filters.items():
        if wanted is not None:
            jobs = jobs.where(column == wanted)
    if batch_id is None:
        jobs = jobs.order_by(Job.id.desc())
        return session.scalars(jobs if after is None else jobs.where(Job.id < after)).all()
    jobs = jobs.order_by(Job.row_number, Job.image_number)
    if after is not None:
        seen = find(session, tenant_id, after)
        jobs = jobs.where(
            func.row(Job.row_number, Job.image_number)
            > func.row(seen.row_number, seen.image_number)
        )
    return session.scalars(jobs).all()


def failed(session: Session, *, limit: int, after: str | None = None) -> Sequence[Job]:
    """Those of all tenants that failed and were not retried, newest first."""
    again = aliased(Job)
    retried = select(again.id).where(again.retried_from == Job.id).exists()
    ends = select(Job).where(Job.status == Status.FAILED, Job.deleted_at.is_(None), ~retried)
    if after is not None:
        ends = ends.where(Job.id < after)
    return session.scalars(ends.order_by(Job.id.desc()).limit(limit)).all()


def tenant_of(session: Session, job_id: str) -> str:
    """Whose job it is. Raises NotFound."""
    found = select(Job.tenant_id).where(Job.id == job_id)
    tenant_id = session.scalar(found) if is_id("job", job_id) else None
    if tenant_id is None:
        raise NotFound("job", job_id)
    return tenant_id
