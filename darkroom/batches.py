"""Batches: create, find, count, close."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, insert, select, tuple_, update
from sqlalchemy.orm import Session

from darkroom.db.tables import Batch, Job
from darkroom.errors import NotFound
from darkroom.event_types import EventType
from darkroom.events import log as event_log
from darkroom.events.feed import EventScope
from darkroom.ids import is_id, new_id
from darkroom.status import FINISHED, BatchOutcome, BatchStatus, Status


@dataclass(frozen=True)
class Counts:
    """Jobs of a batch by status; they always sum to `total`."""

    total: int
    rejected: int
    by_status: Mapping[Status, int]
    paused: bool = False
    canceled: bool = False

    @property
    def status(self) -> BatchStatus:
        """Status of the batch: completed if all jobs finished, queued if none started.

        A batch is canceled from the request on, although some of its jobs may still be running.
        """
        if self.canceled:
            return BatchStatus.CANCELED
        if sum(self.by_status.get(status, 0) for status in FINISHED) == self.total:
            return BatchStatus.COMPLETED
        if self.paused:
            return BatchStatus.PAUSED
        started = self.by_status.get(Status.QUEUED, 0) < self.total
        return BatchStatus.RUNNING if started else BatchStatus.QUEUED

    @property
    def outcome(self) -> BatchOutcome | None:
        """Result of the batch; None until it is completed."""
        if self.status is not BatchStatus.COMPLETED:
            return None
        succeeded = self.by_status.get(Status.SUCCEEDED, 0)
        if succeeded == self.total:
            return BatchOutcome.ALL_SUCCEEDED
        return BatchOutcome.PARTIAL if succeeded else BatchOutcome.ALL_FAILED


def create(
    session: Session,
    tenant_id: str,
    *,
    total: int = 1,
    label: str | None = None,
    rejected: int = 0,
    retention_days: int | None = None,
    retried_from: str | None = None,
    webhook_url: str | None = None,
) -> Batch:
    """Create a batch of `total` jobs, which the caller submits in the same transaction."""
    return session.scalars(
        insert(Batch)
        .values(
            id=new_id("bat"),
            tenant_id=tenant_id,
            total=total,
            label=label,
            rejected=rejected,
            retried_from=retried_from,
            webhook_url=webhook_url,
            retention_days=retention_days,
        )
        .returning(Batch)
    ).one()


def fill(session: Session, batch: Batch, *, total: int, rejected: int) -> None:
    """Set the counts of a new batch that were unknown when it was created."""
    batch.total, batch.rejected = total, rejected
    session.flush()


def find(session: Session, tenant_id: str, batch_id: str, *, lock: bool = False) -> Batch:
    """Return the tenant's batch. Raises NotFound, also for another tenant's."""
    query = select(Batch).where(Batch.tenant_id == tenant_id, Batch.id == batch_id)
    if lock:
        query = query.with_for_update()
    batch = session.scalar(query) if is_id("bat", batch_id) else None
    if batch is None:
        raise NotFound("batch", batch_id)
    return batch


def find_all(session: Session, scopes: Collection[EventScope]) -> Sequence[Batch]:
    """Return those of the tenants' batches that exist."""
    return session.scalars(select(Batch).where(tuple_(Batch.tenant_id, Batch.id).in_(scopes))).all()


def page(
    session: Session,
    tenant_id: str,
    *,
    limit: int,
    after: str | None = None,
    status: BatchStatus | None = None,
    label: str | None = None,
) -> Sequence[Batch]:
    """Return batches, newest first; `after` is the last id already seen."""
    query = select(Batch).where(Batch.tenant_id == tenant_id).order_by(Batch.id.desc())
    if after is not None:
        query = query.where(Batch.id < after)
    if label is not None:
        query = query.where(Batch.label == label)
    if status is not None:
        query = query.where(_has_status(status))
    return session.scalars(query.limit(limit)).all()


def _has_status(status: BatchStatus) -> ColumnElement[bool]:
    """Match batches by `Counts.status`."""
    match status:
        case BatchStatus.CANCELED:
            return Batch.canceled_at.is_not(None)
        case BatchStatus.COMPLETED:
            return and_(Batch.canceled_at.is_(None), Batch.finished_at.is_not(None))
        case BatchStatus.PAUSED:
            return and_(Batch.paused_at.is_not(None), Batch.finished_at.is_(None))
    started = select(Job.id).where(Job.batch_id == Batch.id, Job.status != Status.QUEUED).exists()
    unfinished = and_(Batch.finished_at.is_(None), Batch.canceled_at.is_(None))
    return and_(unfinished, Batch.paused_at.is_(None), started == (status is BatchStatus.RUNNING))


def count(session: Session, batches: Sequence[Batch]) -> list[Counts]:
    """Return the counts of each batch, in order; from the rows, so that they cannot disagree."""
    ids = [batch.id for batch in batches]
    rows = session.execute(
        select(Job.batch_id, Job.status, func.count())
        .where(Job.batch_id.in_(ids))
        .group_by(Job.batch_id, Job.status)
    )
    counts: dict[str | None, dict[Status, int]] = {batch_id: {} for batch_id in ids}
    for batch_id, status, jobs in rows:
        counts[batch_id][Status(status)] = jobs
    return [
        Counts(
            batch.total,
            batch.rejected,
            counts[batch.id],
            paused=batch.paused_at is not None,
            canceled=batch.canceled_at is not None,
        )
        for batch in batches
    ]


def close_finished(session: Session, batch_ids: Collection[str]) -> None:
    """Close those of the batches that have no unfinished job, each exactly once.

    The rows are locked first, in one order: of two transactions that each finish one of the last
    two jobs, the second must see the first's.
    """
    if not batch_ids:
        return
    session.execute(
        select(Batch.id).where(Batch.id.in_(batch_ids)).order_by(Batch.id).with_for_update()
    )
    unfinished = select(Job.id).where(Job.batch_id == Batch.id, Job.finished_at.is_(None))
    closed = session.scalars(
        update(Batch)
        .where(Batch.id.in_(batch_ids), Batch.finished_at.is_(None), ~unfinished.exists())
        .values(finished_at=func.now())
        .returning(Batch)
    ).all()
    canceled = [batch for batch in closed if batch.canceled_at is not None]
    completed = [batch for batch in closed if batch.canceled_at is None]
    event_log.record_batches(session, EventType.BATCH_CANCELED, canceled)
    event_log.record_batches(session, EventType.BATCH_COMPLETED, completed)


def record_finished(session: Session, jobs: Sequence[Job]) -> None:
    """Record events for the finished jobs, and close batches whose last job finished."""
    finished = [job for job in jobs if job.finished_at is not None]
    event_log.record_jobs(session, finished)
    close_finished(session, {job.batch_id for job in finished if job.batch_id})
