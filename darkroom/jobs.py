"""A job as its client knows it: submitted, found, canceled, retried, deleted; and its deadline.

Only this module, `claims` and `dispatches` change a job's status. A function takes the session and
commits nothing; the caller's block is the transaction. Whoever locks several jobs does so in the
order of their ids, and locks batches after jobs.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb
from sqlalchemy import ColumnElement, and_, func, select, tuple_, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from darkroom import batches, events, fairness
from darkroom.ends import announce
from darkroom.errors import Deleted, NotEnded, NotFound, NothingToRetry
from darkroom.happenings import Subject
from darkroom.ids import is_id, new_id
from darkroom.params import GenerationParams, JobInput, cost
from darkroom.status import FINISHED, PRIORITY_RANK, Priority, Status
from darkroom.tables import Batch, Job

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


def submit(
    session: Session,
    tenant_id: str,
    submissions: Sequence[Submission],
    *,
    batch_id: str | None = None,
) -> list[str]:
    """Queue the jobs, in order, and return their ids. They exist once the caller commits."""
    rows = _rows(tenant_id, submissions, batch_id)
    _queue(session, rows)
    return [row["id"] for row in rows]


def accept(session: Session, tenant_id: str, submissions: Sequence[Submission]) -> list[Job]:
    """As `submit`; the jobs themselves, as they will be found once the caller has committed."""
    rows = _rows(tenant_id, submissions, None)
    now = _queue(session, rows)
    queued = {"status": Status.QUEUED, "attempt": 0, "setbacks": 0, "isolation": "", "held": False}
    return [
        Job(**row, **queued, metadata_=row.pop("metadata"), created_at=now, run_after=now)
        for row in rows
    ]


def _rows(
    tenant_id: str, submissions: Sequence[Submission], batch_id: str | None
) -> list[dict[str, Any]]:
    default = Priority.NORMAL if batch_id is None else Priority.BULK
    return [
        _row(submission, default) | {"tenant_id": tenant_id, "batch_id": batch_id}
        for submission in submissions
    ]


def _row(submission: Submission, default: Priority) -> dict[str, Any]:
    """A job's columns; `start_within_s` and `deadline_s` are still to be counted from now."""
    asked = submission.input
    return submission.params.model_dump() | {
        "row_number": submission.row_number,
        "image_number": submission.image_number,
        "custom_id": submission.custom_id,
        "label": asked.label,
        "metadata": asked.metadata,
        "priority": PRIORITY_RANK[asked.priority or default],
        "microbatch_key": submission.microbatch_key,
        "cost": cost(submission.params),
        "start_within_s": asked.start_within_s,
        "deadline_s": asked.deadline_s,
        "webhook_url": asked.webhook_url,
        "webhook_events": asked.told,
    }


def _queue(session: Session, rows: Sequence[dict[str, Any]]) -> datetime:
    """Give the rows ids and places in the fair order, and write them; when, by the database.

    All are of one tenant, and there is at least one.
    """
    for priority, mine in sorted(_by_priority(rows).items()):
        total = sum(row["cost"] for row in mine)
        places = fairness.reserve(session, mine[0]["tenant_id"], priority, cost=total)
        tag = places.first_tag
        for row in mine:
            row.update(_limits(row, places.now), id=new_id("job"), fair_tag=tag)
            tag += row["cost"] / places.weight
    _copy(session, rows)
    return places.now


def _by_priority(rows: Sequence[dict[str, Any]]) -> Mapping[int, list[dict[str, Any]]]:
    classes = defaultdict(list)
    for row in rows:
        classes[row["priority"]].append(row)
    return classes


def _limits(row: dict[str, Any], now: datetime) -> dict[str, datetime | None]:
    """When it must have been begun, and ended, by the database's clock."""
    start_s, end_s = row.pop("start_within_s"), row.pop("deadline_s")
    deadline_at = None if end_s is None else now + timedelta(seconds=end_s)
    begins = [seconds for seconds in (start_s, end_s) if seconds is not None]
    expires_at = now + timedelta(seconds=min(begins)) if begins else None
    return {"expires_at": expires_at, "deadline_at": deadline_at}


def _copy(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """COPY is ten times as fast as INSERT for a file of rows, and no slower for one."""
    connection = session.connection().connection.driver_connection
    assert connection is not None  # a pool's connection has one
    names = list(rows[0])
    statement = sql.SQL("COPY job ({}) FROM STDIN").format(
        sql.SQL(", ").join(map(sql.Identifier, names))
    )
    try:
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row([_adapted(row[name]) for name in names])
    except psycopg.Error as error:  # as SQLAlchemy words it, whose statement this is not
        raise DBAPIError.instance("COPY job", None, error, psycopg.Error) from error


def _adapted(value: object) -> object:
    return Jsonb(value) if isinstance(value, dict) else value


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


def running(session: Session, wanted: Collection[Subject]) -> Sequence[Job]:
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
        .values(status=Status.CANCELED, finished_at=func.now(), held=False)
        .execution_options(synchronize_session=False)
    )
    # now() is the moment at which this transaction began, and so marks what it has ended
    canceled = and_(which, Job.status == Status.CANCELED, Job.finished_at == func.now())
    events.record_canceled(session, canceled)
    costs = session.execute(
        select(Job.priority, func.sum(Job.cost)).where(canceled).group_by(Job.priority)
    )
    fairness.give_back(session, tenant_id, {row[0]: row[1] for row in costs})
    touched = session.scalars(select(Job.batch_id).where(canceled).distinct())
    return {batch_id for batch_id in touched if batch_id}


def pause_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """Hold the batch's queued jobs; what is running is finished. Raises NotFound."""
    return _hold(session, tenant_id, batch_id, held=True)


def resume_batch(session: Session, tenant_id: str, batch_id: str) -> Batch:
    """Let a paused batch go on, in the places its jobs had. Raises NotFound."""
    return _hold(session, tenant_id, batch_id, held=False)


def _hold(session: Session, tenant_id: str, batch_id: str, *, held: bool) -> Batch:
    batch = batches.find(session, tenant_id, batch_id)
    queued = (
        select(Job.id)
        .where(Job.batch_id == batch_id, Job.status == Status.QUEUED, Job.held != held)
        .order_by(Job.id)
        .with_for_update()
    )
    session.execute(
        update(Job)
        .where(Job.id.in_(queued))
        .values(held=held)
        .execution_options(synchronize_session=False)
    )
    session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.finished_at.is_(None), Batch.canceled_at.is_(None))
        .values(paused_at=func.coalesce(Batch.paused_at, func.now()) if held else None)
    )
    session.refresh(batch)
    return batch


def retry(session: Session, tenant_id: str, job_id: str) -> Job:
    """A new job that asks for the same, of one that ended without an image.

    Asked again, it is the same new job. Raises NotFound, NotEnded, NothingToRetry.
    """
    job = find(session, tenant_id, job_id, lock=True)
    if job.status not in FINISHED:
        raise NotEnded(f"job {job_id} is {job.status}; it can be retried once it has ended")
    if job.status not in RETRYABLE:
        raise NothingToRetry(f"job {job_id} has succeeded; submit it again for another picture")
    again = session.scalar(select(Job.id).where(Job.retried_from == job_id))
    if again is None:
        row = _repeat(job) | {"row_number": None, "batch_id": None}
        _queue(session, [row])
        again = row["id"]
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
    _queue(session, [_repeat(job) | {"batch_id": new.id} for job in failed])
    return new


def _latest_retry(session: Session, batch_id: str) -> Batch:
    made = select(Batch).where(Batch.retried_from == batch_id).order_by(Batch.id.desc()).limit(1)
    batch = session.scalar(made)
    if batch is None:
        raise NothingToRetry(f"batch {batch_id} has no failed job")
    return batch


_REPEATED: Final = (
    *GenerationParams.model_fields,
    *("tenant_id", "row_number", "image_number", "custom_id", "label"),
    *("priority", "microbatch_key", "cost", "webhook_url", "webhook_events"),
)


def _repeat(job: Job) -> dict[str, Any]:
    """The columns of a job that asks for the same; a deadline was for the first time only."""
    asked = {name: getattr(job, name) for name in _REPEATED}
    return asked | {
        "metadata": job.metadata_,
        "retried_from": job.id,
        "start_within_s": None,
        "deadline_s": None,
    }


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
        .values(status=Status.EXPIRED, finished_at=func.now(), held=False)
        .returning(Job)
    ).all()
    announce(session, expired)
    return len(expired)
