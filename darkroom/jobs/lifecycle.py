"""A job's life as its client controls it: submit, cancel, pause, purge, retry; and its deadline.

Only this module, `darkroom.queue.claims` and `darkroom.queue.dispatches` change a job's status.
A function takes the session and commits nothing; the caller's block is the transaction. Every
transaction locks jobs in the order of their ids, and batches after jobs.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Text,
    and_,
    any_,
    func,
    literal,
    select,
    update,
)
from sqlalchemy.orm import Session

from darkroom import batches
from darkroom.batches import record_finished
from darkroom.db.tables import Batch, Job
from darkroom.errors import JobNotFinished, NothingToRetry
from darkroom.events import log as event_log
from darkroom.ids import new_id
from darkroom.jobs.bulk_insert import JobTemplate, NewJob, QueuedRow, copy_jobs
from darkroom.jobs.queries import find
from darkroom.queue import fairness
from darkroom.queue.fairness import Reservation
from darkroom.status import FINISHED, Status

RETRYABLE: Final = frozenset(FINISHED - {Status.SUCCEEDED})
_REPEATED_COLUMNS: Final = (
    *("model", "width", "height", "num_inference_steps", "guidance_scale", "output_format"),
    *("label", "priority", "microbatch_key", "cost", "webhook_url", "webhook_events"),
)


def submit(
    session: Session, tenant_id: str, jobs: Sequence[NewJob], *, batch_id: str | None = None
) -> list[str]:
    """Queue one or more jobs, in order, and return their ids.

    The jobs exist once the caller commits. Raises Draining.
    """
    costs: dict[int, float] = defaultdict(float)
    for job in jobs:
        costs[job.template.priority] += job.template.cost
    reservations = {
        priority: fairness.reserve(session, tenant_id, priority, cost=costs[priority])
        for priority in sorted(costs)
    }
    now = next(iter(reservations.values())).now
    shared = {
        template: template.shared_columns(tenant_id, batch_id, now)
        for template in {job.template for job in jobs}
    }
    rows = _with_start_tags(jobs, reservations)
    copy_jobs(session, rows, shared)
    return [job_id for job_id, _, _ in rows]


def _with_start_tags(
    jobs: Sequence[NewJob], reservations: Mapping[int, Reservation]
) -> list[QueuedRow]:
    """Give each job an id and its place within its priority's reservation."""
    next_tags = {priority: reserved.first_tag for priority, reserved in reservations.items()}
    rows = []
    for job in jobs:
        priority = job.template.priority
        tag = next_tags[priority]
        rows.append((new_id("job"), tag, job))
        next_tags[priority] = tag + job.template.cost / reservations[priority].weight
    return rows


def cancel(session: Session, tenant_id: str, job_id: str) -> Job:
    """Cancel a queued job at once and a running one as soon as its worker stops generating it.

    A finished job stays as it is. Raises NotFound.
    """
    job = find(session, tenant_id, job_id, lock=True)
    if job.status == Status.QUEUED:
        batches.close_finished(session, _cancel_queued(session, tenant_id, Job.id == job_id))
    elif job.status == Status.RUNNING:
        session.execute(
            update(Job)
            .where(Job.id == job_id)
            .values(cancel_requested_at=func.coalesce(Job.cancel_requested_at, func.now()))
        )
    session.refresh(job)
    return job


def cancel_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """Cancel the batch's queued jobs at once and its running ones when their workers stop.

    A job that is requeued in the same instant is canceled by the worker that claims it.
    A finished batch stays as it is. Raises NotFound.
    """
    batch = batches.find(session, tenant_id, batch_id)
    _cancel_queued(session, tenant_id, Job.batch_id == batch_id)
    session.execute(  # before it is closed: its last jobs may be canceled already
        update(Batch)
        .where(Batch.id == batch_id, Batch.finished_at.is_(None))
        .values(canceled_at=func.coalesce(Batch.canceled_at, func.now()), paused_at=None)
    )
    batches.close_finished(session, {batch_id})
    session.refresh(batch)
    return batch


def _cancel_queued(session: Session, tenant_id: str, condition: ColumnElement[bool]) -> set[str]:
    """Cancel the queued jobs that match; return the ids of their batches, which may be finished.

    The server does all of it, because there may be 100,000 of them.
    """
    queued = (
        select(Job.id)
        .where(Job.tenant_id == tenant_id, Job.status == Status.QUEUED, condition)
        .order_by(Job.id)
        .with_for_update()
    )
    session.execute(
        update(Job)
        .where(Job.id.in_(queued))
        .values(status=Status.CANCELED, finished_at=func.now(), paused=False)
        .execution_options(synchronize_session=False)
    )
    # now() is the start of this transaction, and so identifies the jobs that it canceled
    canceled = and_(condition, Job.status == Status.CANCELED, Job.finished_at == func.now())
    event_log.record_canceled(session, canceled)
    costs = session.execute(
        select(Job.priority, func.sum(Job.cost)).where(canceled).group_by(Job.priority)
    )
    fairness.refund(session, tenant_id, {row[0]: row[1] for row in costs})
    batch_ids = session.scalars(select(Job.batch_id).where(canceled).distinct())
    return {batch_id for batch_id in batch_ids if batch_id}


def purge(session: Session, *, limit: int = 5000) -> int:
    """Cancel up to `limit` queued jobs of one tenant; return how many, 0 when no tenant has any.

    One tenant a transaction, so that two purges cannot lock each other's. Paused batches come last,
    each as a whole.
    """
    queued = select(Job.tenant_id, Job.id).where(Job.status == Status.QUEUED, ~Job.paused)
    rows = session.execute(queued.order_by(Job.priority, Job.start_tag).limit(limit)).all()
    if not rows:
        return _purge_paused(session)
    tenant_id = rows[0].tenant_id
    ids = [job_id for owner, job_id in rows if owner == tenant_id]
    chosen = Job.id == any_(literal(ids, ARRAY(Text)))
    batches.close_finished(session, _cancel_queued(session, tenant_id, chosen))
    return len(ids)


def _purge_paused(session: Session) -> int:
    paused = select(Job.batch_id).where(Job.status == Status.QUEUED, Job.paused).limit(1)
    batch = session.scalar(select(Batch).where(Batch.id.in_(paused)))
    if batch is None:
        return 0
    queued = batches.count(session, [batch])[0].by_status.get(Status.QUEUED, 0)
    cancel_batch(session, batch.tenant_id, batch.id)
    return queued


def pause_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """Keep the batch's queued jobs from being claimed; running ones finish. Raises NotFound."""
    return _set_batch_paused(session, tenant_id, batch_id, paused=True)


def resume_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """Let a paused batch continue; its jobs keep their places in the queue. Raises NotFound."""
    return _set_batch_paused(session, tenant_id, batch_id, paused=False)


def _set_batch_paused(session: Session, tenant_id: str, batch_id: str, *, paused: bool) -> Batch:
    batch = batches.find(session, tenant_id, batch_id)
    queued = (
        select(Job.id)
        .where(Job.batch_id == batch_id, Job.status == Status.QUEUED, Job.paused != paused)
        .order_by(Job.id)
        .with_for_update()
    )
    session.execute(
        update(Job)
        .where(Job.id.in_(queued))
        .values(paused=paused)
        .execution_options(synchronize_session=False)
    )
    session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.finished_at.is_(None), Batch.canceled_at.is_(None))
        .values(paused_at=func.coalesce(Batch.paused_at, func.now()) if paused else None)
    )
    session.refresh(batch)
    return batch


def retry(session: Session, tenant_id: str, job_id: str) -> Job:
    """Queue a copy of a job that finished without an image, once; return that copy.

    A second call returns the same copy. Raises NotFound, JobNotFinished, NothingToRetry.
    """
    job = find(session, tenant_id, job_id, lock=True)
    if job.status not in FINISHED:
        raise JobNotFinished(f"job {job_id} is {job.status}; retry it once it has finished")
    if job.status not in RETRYABLE:
        raise NothingToRetry(f"job {job_id} has succeeded; submit a new job for another image")
    copy_id = session.scalar(select(Job.id).where(Job.retried_from == job_id))
    if copy_id is None:
        [copy_id] = submit(session, tenant_id, [_copy_of(job)._replace(row_number=None)])
    return find(session, tenant_id, copy_id)


def retry_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """Queue copies of the batch's failed jobs that were not retried yet; return their batch.

    Without new failures, a second call returns the same batch. Raises NotFound, NothingToRetry.
    """
    batches.find(session, tenant_id, batch_id, lock=True)
    retried = select(Job.retried_from).where(Job.retried_from.is_not(None))
    failed = session.scalars(
        select(Job)
        .where(Job.batch_id == batch_id, Job.status == Status.FAILED, Job.deleted_at.is_(None))
        .where(Job.id.not_in(retried))
        .order_by(Job.row_number, Job.image_number)
    ).all()
    if not failed:
        return _latest_retry(session, batch_id)
    old = batches.find(session, tenant_id, batch_id)
    new = batches.create(
        session,
        tenant_id,
        total=len(failed),
        label=old.label,
        retention_days=old.retention_days,
        retried_from=batch_id,
        webhook_url=old.webhook_url,
    )
    submit(session, tenant_id, [_copy_of(job) for job in failed], batch_id=new.id)
    return new


def _latest_retry(session: Session, batch_id: str) -> Batch:
    retries = select(Batch).where(Batch.retried_from == batch_id).order_by(Batch.id.desc())
    batch = session.scalar(retries.limit(1))
    if batch is None:
        raise NothingToRetry(f"batch {batch_id} has no failed job")
    return batch


def _copy_of(job: Job) -> NewJob:
    """Return a new job with the same input but no deadline."""
    columns = {name: getattr(job, name) for name in _REPEATED_COLUMNS}
    return NewJob(
        JobTemplate(columns | {"metadata": job.metadata_}, job.cost, job.priority),
        job.prompt,
        job.negative_prompt,
        job.seed,
        job.row_number,
        job.image_number,
        job.custom_id,
        retried_from=job.id,
    )


def expire_overdue(session: Session, *, limit: int = 1000) -> int:
    """Expire up to `limit` queued jobs that were to start by now; return how many."""
    overdue = (
        select(Job.id)
        .where(Job.status == Status.QUEUED, Job.expires_at <= func.now())
        .order_by(Job.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    expired = session.scalars(
        update(Job)
        .where(Job.id.in_(overdue))
        .values(status=Status.EXPIRED, finished_at=func.now(), paused=False)
        .returning(Job)
    ).all()
    record_finished(session, expired)
    return len(expired)
