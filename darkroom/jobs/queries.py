"""Queries for jobs."""

import functools
from collections.abc import Collection, Sequence

from sqlalchemy import ARRAY, Select, Text, any_, bindparam, func, select, tuple_
from sqlalchemy.orm import Session, aliased

from darkroom.db.tables import Job
from darkroom.errors import Deleted, NotFound
from darkroom.events.feed import EventScope
from darkroom.ids import is_id
from darkroom.status import Status


def find(session: Session, tenant_id: str, job_id: str, *, lock: bool = False) -> Job:
    """Return the tenant's job. Raises NotFound, also for another tenant's, and Deleted."""
    query = select(Job).where(Job.tenant_id == tenant_id, Job.id == job_id)
    if lock:
        query = query.with_for_update()
    job = session.scalar(query) if is_id("job", job_id) else None
    if job is None:
        raise NotFound("job", job_id)
    if job.deleted_at is not None:
        raise Deleted("job", job_id, job.deleted_at)
    return job


def find_all(session: Session, job_ids: Sequence[str]) -> list[Job]:
    """Return the jobs with these ids, in order; all of them exist."""
    jobs = {job.id: job for job in session.scalars(_by_ids(), {"ids": job_ids})}
    return [jobs[job_id] for job_id in job_ids]


@functools.cache  # compiling the statement takes longer than running it
def _by_ids() -> Select[Job]:
    return select(Job).where(Job.id == any_(bindparam("ids", type_=ARRAY(Text))))


def running(session: Session, scopes: Collection[EventScope]) -> Sequence[Job]:
    """Return those of the tenants' jobs that a worker is generating."""
    in_scopes = tuple_(Job.tenant_id, Job.id).in_(scopes)
    return session.scalars(select(Job).where(in_scopes, Job.status == Status.RUNNING)).all()


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
    """Return jobs, newest first, or a batch's in row order; `after` is the last id seen."""
    jobs = select(Job).where(Job.tenant_id == tenant_id, Job.deleted_at.is_(None)).limit(limit)
    filters = {Job.status: status, Job.batch_id: batch_id, Job.label: label}
    for column, value in filters.items():
        if value is not None:
            jobs = jobs.where(column == value)
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
    """Return failed jobs of all tenants that were not retried, newest first."""
    copy = aliased(Job)
    retried = select(copy.id).where(copy.retried_from == Job.id).exists()
    jobs = select(Job).where(Job.status == Status.FAILED, Job.deleted_at.is_(None), ~retried)
    if after is not None:
        jobs = jobs.where(Job.id < after)
    return session.scalars(jobs.order_by(Job.id.desc()).limit(limit)).all()


def tenant_of(session: Session, job_id: str) -> str:
    """Return the id of the tenant that owns the job. Raises NotFound."""
    query = select(Job.tenant_id).where(Job.id == job_id)
    tenant_id = session.scalar(query) if is_id("job", job_id) else None
    if tenant_id is None:
        raise NotFound("job", job_id)
    return tenant_id
