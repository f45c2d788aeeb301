"""A job as its client knows it: submitted, found, canceled, retried, deleted; and its deadline.

Only this module, `claims` and `dispatches` change a job's status. A function takes the session and
commits nothing; the caller's block is the transaction. Whoever locks several jobs does so in the
order of their ids, and locks batches after jobs.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

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
from darkroom.generation.params import GenerationParams, JobInput
from darkroom.ids import new_id
from darkroom.jobs.bulk_insert import JobTemplate, NewJob, Placed, Row, copy_jobs, shared_columns
from darkroom.jobs.queries import find
from darkroom.queue import fairness
from darkroom.status import FINISHED, Priority, Status

#: an end that was not the one the client wanted
RETRYABLE: Final = frozenset(FINISHED - {Status.SUCCEEDED})


@dataclass(frozen=True)
class Submission:
    """A validated job that is about to become a row."""

    input: JobInput
    params: GenerationParams
    microbatch_key: str
    row_number: int | None = None
    image_number: int = 0
    custom_id: str | None = None

    def draft(self, default: Priority) -> NewJob:
        """The same as COPY takes it; `default`: its class if it names none."""
        params = self.params
        return NewJob(
            JobTemplate.of(self.input, params, self.microbatch_key, default=default),
            params.prompt,
            params.negative_prompt,
            params.seed,
            self.row_number,
            self.image_number,
            self.custom_id,
        )


def submit(
    session: Session,
    tenant_id: str,
    submissions: Sequence[Submission],
    *,
    batch_id: str | None = None,
) -> list[str]:
    """Queue the jobs, in order, and return their ids. They exist once the caller commits."""
    default = Priority.NORMAL if batch_id is None else Priority.BULK
    drafts = [submission.draft(default) for submission in submissions]
    return submit_drafts(session, tenant_id, drafts, batch_id=batch_id)


def submit_drafts(
    session: Session, tenant_id: str, drafts: Sequence[NewJob], *, batch_id: str | None
) -> list[str]:
    """As `submit`."""
    return [placed.id for placed in _queue(session, tenant_id, drafts, batch_id).placed]


def accept(session: Session, tenant_id: str, submissions: Sequence[Submission]) -> list[Job]:
    """As `submit`; the jobs themselves, as they will be found once the caller has committed."""
    drafts = [submission.draft(Priority.NORMAL) for submission in submissions]
    queue = _queue(session, tenant_id, drafts, None)
    queued = {
        "status": Status.QUEUED,
        "attempt": 0,
        "requeue_count": 0,
        "isolation_group": "",
        "paused": False,
    }
    times = {"created_at": queue.now, "scheduled_at": queue.now}
    made = []
    for placed in queue.placed:
        row = placed.columns(queue.common[placed.draft.recipe])
        job = (
            Job()
        )  # as if it had been loaded: to set each column would take longer than to write it
        vars(job).update(row, metadata_=row.pop("metadata"), **queued, **times)
        made.append(job)
    return made


class _Queued(NamedTuple):
    """Drafts that have been given their places, in order."""

    placed: list[Placed]
    common: Mapping[JobTemplate, Row]
    now: datetime  #: by the database's clock


def _queue(
    session: Session, tenant_id: str, drafts: Sequence[NewJob], batch_id: str | None
) -> _Queued:
    """Give the drafts ids and places in the fair order, and write them. There is at least one."""
    costs: dict[int, float] = defaultdict(float)
    for draft in drafts:
        costs[draft.recipe.priority] += draft.recipe.cost
    places = {
        priority: fairness.reserve(session, tenant_id, priority, cost=costs[priority])
        for priority in sorted(costs)
    }
    tags = {priority: place.first_tag for priority, place in places.items()}
    placed = []
    for draft in drafts:
        recipe = draft.recipe
        tag = tags[recipe.priority]
        placed.append(Placed(new_id("job"), tag, draft))
        tags[recipe.priority] = tag + recipe.cost / places[recipe.priority].weight
    now = next(iter(places.values())).now
    common = {
        recipe: shared_columns(recipe, tenant_id, batch_id, now)
        for recipe in {draft.recipe for draft in drafts}
    }
    copy_jobs(session, common, placed)
    return _Queued(placed, common, now)


def cancel(session: Session, tenant_id: str, job_id: str) -> Job:
    """End a queued job at once, and ask that a running one be withdrawn; others stay as they are.

    A running job stays so until its worker has let go of it. Raises NotFound.
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
    """End the batch's queued jobs at once, and have its running ones withdrawn.

    One that goes back to the queue in the same instant is withdrawn by whoever claims it.
    Raises NotFound; a batch that has ended stays as it is.
    """
    batch = batches.find(session, tenant_id, batch_id)
    _cancel_queued(session, tenant_id, Job.batch_id == batch_id)
    session.execute(  # before it is closed: these may have been the last of its jobs
        update(Batch)
        .where(Batch.id == batch_id, Batch.finished_at.is_(None))
        .values(canceled_at=func.coalesce(Batch.canceled_at, func.now()), paused_at=None)
    )
    batches.close_finished(session, {batch_id})
    session.refresh(batch)
    return batch


def _cancel_queued(session: Session, tenant_id: str, which: ColumnElement[bool]) -> set[str]:
    """All on the server, because there may be 100,000 of them. Batches that may have ended now."""
    queued = (
        select(Job.id)
        .where(Job.tenant_id == tenant_id, Job.status == Status.QUEUED, which)
        .order_by(Job.id)
        .with_for_update()
    )
    session.execute(
        update(Job)
        .where(Job.id.in_(queued))
        .values(status=Status.CANCELED, finished_at=func.now(), paused=False)
        .execution_options(synchronize_session=False)
    )
    # now() is the moment at which this transaction began, and so marks what it has ended
    canceled = and_(which, Job.status == Status.CANCELED, Job.finished_at == func.now())
    event_log.record_canceled(session, canceled)
    costs = session.execute(
        select(Job.priority, func.sum(Job.cost)).where(canceled).group_by(Job.priority)
    )
    fairness.refund(session, tenant_id, {row[0]: row[1] for row in costs})
    touched = session.scalars(select(Job.batch_id).where(canceled).distinct())
    return {batch_id for batch_id in touched if batch_id}


def purge(session: Session, *, limit: int = 5000) -> int:
    """Cancel jobs that wait, of all tenants, `limit` at most; 0 when none is left.

    One tenant's in one transaction, so that none locks another's; paused batches come last, whole.
    """
    waiting = select(Job.tenant_id, Job.id).where(Job.status == Status.QUEUED, ~Job.paused)
    rows = session.execute(waiting.order_by(Job.priority, Job.start_tag).limit(limit)).all()
    if not rows:
        return _purge_paused(session)
    tenant_id = rows[0].tenant_id
    ids = [job_id for owner, job_id in rows if owner == tenant_id]
    these = Job.id == any_(literal(ids, ARRAY(Text)))
    batches.close_finished(session, _cancel_queued(session, tenant_id, these))
    return len(ids)


def _purge_paused(session: Session) -> int:
    held = select(Job.batch_id).where(Job.status == Status.QUEUED, Job.paused).limit(1)
    batch = session.scalar(select(Batch).where(Batch.id.in_(held)))
    if batch is None:
        return 0
    waiting = batches.count(session, [batch])[0].by_status.get(Status.QUEUED, 0)
    cancel_batch(session, batch.tenant_id, batch.id)
    return waiting


def pause_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """Hold the batch's queued jobs; what is running is finished. Raises NotFound."""
    return _set_batch_paused(session, tenant_id, batch_id, paused=True)


def resume_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """Let a paused batch go on, in the places its jobs had. Raises NotFound."""
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
    """A new job that asks for the same, of one that ended without an image.

    Asked again, it is the same new job. Raises NotFound, NotEnded, NothingToRetry.
    """
    job = find(session, tenant_id, job_id, lock=True)
    if job.status not in FINISHED:
        raise JobNotFinished(f"job {job_id} is {job.status}; it can be retried once it has ended")
    if job.status not in RETRYABLE:
        raise NothingToRetry(f"job {job_id} has succeeded; submit it again for another picture")
    again = session.scalar(select(Job.id).where(Job.retried_from == job_id))
    if again is None:
        [again] = submit_drafts(session, tenant_id, [_repeat(job, alone=True)], batch_id=None)
    return find(session, tenant_id, again)


def retry_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """A new batch of the failed jobs of this one that were not retried yet.

    Asked again with no new failures, it is the same new batch. Raises NotFound, NothingToRetry.
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
    submit_drafts(session, tenant_id, [_repeat(job) for job in failed], batch_id=new.id)
    return new


def _latest_retry(session: Session, batch_id: str) -> Batch:
    made = select(Batch).where(Batch.retried_from == batch_id).order_by(Batch.id.desc()).limit(1)
    batch = session.scalar(made)
    if batch is None:
        raise NothingToRetry(f"batch {batch_id} has no failed job")
    return batch


_REPEATED: Final = (
    *("model", "width", "height", "num_inference_steps", "guidance_scale", "output_format"),
    *("label", "priority", "microbatch_key", "cost", "webhook_url", "webhook_events"),
)


def _repeat(job: Job, *, alone: bool = False) -> NewJob:
    """A job that asks for the same; a deadline was for the first time only."""
    asked = {name: getattr(job, name) for name in _REPEATED} | {"metadata": job.metadata_}
    return NewJob(
        JobTemplate(asked, job.cost, job.priority, None, None),
        job.prompt,
        job.negative_prompt,
        job.seed,
        None if alone else job.row_number,
        job.image_number,
        job.custom_id,
        retried_from=job.id,
    )


def expire_overdue(session: Session, *, limit: int = 1000) -> int:
    """End the queued jobs that were to have been begun by now; how many. The first `limit`."""
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
