"""Every query and every move of a job. Only this module changes a job's status.

A function takes the session and commits nothing; the caller's block is the transaction.
Leaving `running` has one door, `settle` (with `expire_leases` for workers that went silent): it
acts only while the dispatch is still open, so a worker that wakes from the dead changes nothing.
"""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import ColumnElement, Row, and_, func, insert, select, update
from sqlalchemy.orm import Session

from darkroom import batches, events
from darkroom.errors import NotFound
from darkroom.ids import is_id, new_id
from darkroom.outcomes import Drawn, Failed, Outcome, SentBack, Suspect
from darkroom.params import GenerationParams, JobInput
from darkroom.status import PRIORITY_RANK, DispatchStatus, Priority, Status
from darkroom.tables import Dispatch, Job

MAX_BACKOFF_S: Final = 60.0
_CLAIM_LOCK: Final = 7_261_003  # advisory lock; see darkroom.database for the others


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
    default = Priority.NORMAL if batch_id is None else Priority.BULK
    rows = [
        _row(submission, default) | {"tenant_id": tenant_id, "batch_id": batch_id}
        for submission in submissions
    ]
    session.execute(insert(Job), rows)
    return [str(row["id"]) for row in rows]


def _row(submission: Submission, default: Priority) -> dict[str, object]:
    return submission.params.model_dump() | {
        "id": new_id("job"),
        "row_number": submission.row_number,
        "image_number": submission.image_number,
        "custom_id": submission.custom_id,
        "label": submission.input.label,
        "metadata_": submission.input.metadata,
        "priority": PRIORITY_RANK[submission.input.priority or default],
        "microbatch_key": submission.microbatch_key,
    }


def find(session: Session, tenant_id: str, job_id: str) -> Job:
    """The tenant's job. Raises NotFound, also for another tenant's."""
    theirs = select(Job).where(Job.tenant_id == tenant_id, Job.id == job_id)
    job = session.scalar(theirs) if is_id("job", job_id) else None
    if job is None:
        raise NotFound("job", job_id)
    return job


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
    jobs = select(Job).where(Job.tenant_id == tenant_id).limit(limit)
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


def queued(session: Session) -> bool:
    """Whether any job could be claimed now."""
    return bool(session.scalar(select(select(Job.id).where(_claimable()).exists())))


def _claimable() -> ColumnElement[bool]:
    return and_(Job.status == Status.QUEUED, Job.run_after <= func.now())


def claim(
    session: Session,
    worker_id: str,
    *,
    max_microbatch: Mapping[str, int],
    lease: timedelta,
) -> Sequence[Job]:
    """Take the first queued job and those that may share its UNet batch, into a new dispatch.

    `max_microbatch`: the most jobs of one call, per model name; other models are left alone.
    Empty when there is nothing to take. The jobs come in the order of the queue.
    """
    # One claim at a time: two that interleave would each lock every other row, and leave half
    # of the seats of both microbatches empty. A claim takes about 1 ms.
    session.execute(select(func.pg_advisory_xact_lock(_CLAIM_LOCK)))
    taken = _next_microbatch(session, max_microbatch)
    if not taken:
        return []
    dispatch_id = _open_dispatch(session, worker_id, taken[0].microbatch_key, len(taken), lease)
    claimed = session.scalars(
        update(Job)
        .where(Job.id.in_([row.id for row in taken]), Job.status == Status.QUEUED)
        .values(
            status=Status.RUNNING,
            dispatch_id=dispatch_id,
            attempt=Job.attempt + 1,
            microbatch_size=len(taken),
            started_at=func.now(),
        )
        .returning(Job)
    ).all()
    return sorted(claimed, key=lambda job: (job.priority, job.id))


def _next_microbatch(
    session: Session, max_microbatch: Mapping[str, int]
) -> Sequence[Row[str, str]]:
    """Id and microbatch key of the first queued job and its company, locked."""
    head = session.execute(
        select(Job.microbatch_key, Job.isolation, Job.model)
        .where(_claimable(), Job.model.in_(max_microbatch))
        .order_by(Job.priority, Job.id)
        .limit(1)
    ).first()
    if head is None:
        return []
    company = (Job.microbatch_key == head.microbatch_key, Job.isolation == head.isolation)
    return session.execute(
        select(Job.id, Job.microbatch_key)
        .where(_claimable(), *company)
        .order_by(Job.priority, Job.id)
        .limit(max_microbatch[head.model])
        .with_for_update(skip_locked=True)
    ).all()


def _open_dispatch(
    session: Session, worker_id: str, microbatch_key: str, size: int, lease: timedelta
) -> int:
    return session.execute(
        insert(Dispatch)
        .values(
            worker_id=worker_id,
            microbatch_key=microbatch_key,
            size=size,
            leased_until=func.now() + lease,
        )
        .returning(Dispatch.id)
    ).scalar_one()


def renew(session: Session, dispatch_ids: Collection[int], *, lease: timedelta) -> frozenset[int]:
    """Heartbeat: extend the leases of these dispatches. Those of them that are still open."""
    held = session.scalars(
        update(Dispatch)
        .where(Dispatch.id.in_(dispatch_ids), Dispatch.status == DispatchStatus.RUNNING)
        .values(leased_until=func.now() + lease)
        .returning(Dispatch.id)
    )
    return frozenset(held)


def settle(session: Session, dispatch_id: int, outcomes: Iterable[Outcome]) -> bool:
    """Close the dispatch and move each of its jobs to where its outcome says.

    False, and nothing moves, when the dispatch is no longer open: its lease ran out and somebody
    else has the jobs. Whatever was drawn then is garbage.
    """
    outcomes = list(outcomes)
    sent_back = any(isinstance(outcome, SentBack) for outcome in outcomes)
    status = DispatchStatus.RELEASED if sent_back else DispatchStatus.FINISHED
    if not _close_dispatch(session, dispatch_id, status):
        return False
    _move(session, dispatch_id, outcomes)
    return True


def _close_dispatch(session: Session, dispatch_id: int, status: DispatchStatus) -> bool:
    closed = session.execute(
        update(Dispatch)
        .where(Dispatch.id == dispatch_id, Dispatch.status == DispatchStatus.RUNNING)
        .values(status=status, finished_at=func.now())
        .returning(Dispatch.id)
    )
    return closed.first() is not None


def _leave_running(session: Session, dispatch_id: int, outcome: Outcome) -> Job | None:
    return session.scalar(
        update(Job)
        .where(
            Job.id == outcome.job_id,
            Job.dispatch_id == dispatch_id,
            Job.status == Status.RUNNING,
        )
        .values(_values(outcome))
        .returning(Job)
    )


def _values(outcome: Outcome) -> dict[str, object]:
    match outcome:
        case Drawn():
            return {
                "status": Status.SUCCEEDED,
                "finished_at": func.now(),
                "image_key": outcome.image_key,
                "image_sha256": outcome.image_sha256,
                "image_bytes": outcome.image_bytes,
                "inference_ms": outcome.inference_ms,
                "upload_ms": outcome.upload_ms,
            }
        case Failed():
            return _failure(outcome.code, outcome.message, retryable=outcome.retryable)
        case SentBack():
            return _back_to_queue() | {
                "attempt": Job.attempt - 1,
                "setbacks": Job.setbacks + 1,
                "run_after": func.now() + _backoff(),
            }
        case Suspect():
            return _back_to_queue() | {"isolation": outcome.isolation}


def _failure(code: str, message: str, *, retryable: bool) -> dict[str, object]:
    return {
        "status": Status.FAILED,
        "finished_at": func.now(),
        "error_code": code,
        "error_message": message,
        "error_retryable": retryable,
    }


def _back_to_queue() -> dict[str, object]:
    return {
        "status": Status.QUEUED,
        "dispatch_id": None,
        "microbatch_size": None,
        "started_at": None,
    }


def _backoff() -> ColumnElement[timedelta]:
    """1, 2, 4 … 60 s by the number of setbacks so far, give or take a half, so none align."""
    seconds = func.least(MAX_BACKOFF_S, func.power(2, func.least(Job.setbacks, 10)))
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds * random.uniform(0.5, 1.5))  # noqa: S311  # jitter, not a secret


def release(session: Session, worker_id: str) -> int:
    """Hand back what a worker still holds as it leaves; no attempt is spent. How many jobs."""
    released = session.scalars(
        update(Dispatch)
        .where(Dispatch.worker_id == worker_id, Dispatch.status == DispatchStatus.RUNNING)
        .values(status=DispatchStatus.RELEASED, finished_at=func.now())
        .returning(Dispatch.id)
    ).all()
    requeued = session.scalars(
        update(Job)
        .where(Job.dispatch_id.in_(released), Job.status == Status.RUNNING)
        .values(_back_to_queue() | {"attempt": Job.attempt - 1})
        .returning(Job.id)
    )
    return len(requeued.all())


def crash(session: Session, dispatch_id: int, *, max_attempts: int) -> bool:
    """Close a dispatch over which the replica died or hung; False when it is no longer open.

    Any of its jobs may be why. They are drawn again in two halves, and after a second crash each
    alone; a job that was there at `max_attempts` crashes, 3 or more, fails: the last were its own.
    """
    if not _close_dispatch(session, dispatch_id, DispatchStatus.CRASHED):
        return False
    _part_suspects(session, dispatch_id, max_attempts)
    return True


def expire_leases(session: Session, *, max_attempts: int) -> int:
    """Take back the jobs of workers that stopped renewing; how many dispatches were closed.

    One of the jobs may be what killed the worker, so they are suspects as in `crash`. One
    statement for reading and closing, so that a heartbeat cannot slip between the two.
    """
    overdue = (
        select(Dispatch.id)
        .where(Dispatch.status == DispatchStatus.RUNNING, Dispatch.leased_until < func.now())
        .order_by(Dispatch.leased_until)
        .limit(100)
        .with_for_update(skip_locked=True)
        .cte("overdue")
    )
    expired = session.scalars(
        update(Dispatch)
        .where(Dispatch.id.in_(select(overdue.c.id)))
        .values(status=DispatchStatus.EXPIRED, finished_at=func.now())
        .returning(Dispatch.id)
    ).all()
    for dispatch_id in expired:
        _part_suspects(session, dispatch_id, max_attempts)
    return len(expired)


def _part_suspects(session: Session, dispatch_id: int, max_attempts: int) -> None:
    running = (Job.dispatch_id == dispatch_id, Job.status == Status.RUNNING)
    suspects = session.scalars(select(Job).where(*running).order_by(Job.priority, Job.id)).all()
    for place, job in enumerate(suspects):
        second_half = place >= (len(suspects) + 1) // 2
        outcome = _verdict(job, second_half=second_half, max_attempts=max_attempts)
        _move(session, dispatch_id, [outcome])


def _verdict(job: Job, *, second_half: bool, max_attempts: int) -> Failed | Suspect:
    """A claim that ended in a crash counts as an attempt, so `attempt` is how many there were."""
    if job.attempt >= max_attempts:
        message = f"its replica or worker died {job.attempt} times while drawing it"
        return Failed(job.id, "crashed_worker", message, retryable=True)
    if job.attempt == 1:
        return Suspect(job.id, isolation=f"{job.dispatch_id}{'b' if second_half else 'a'}")
    return Suspect(job.id, isolation=job.id)


def _move(session: Session, dispatch_id: int, outcomes: Iterable[Outcome]) -> None:
    """Each job to where its outcome says, with the events and ends of batches that follow."""
    moved = [
        job
        for outcome in outcomes
        if (job := _leave_running(session, dispatch_id, outcome)) is not None
    ]
    _announce(session, moved)


def _announce(session: Session, moved: Sequence[Job]) -> None:
    """Events for the jobs that reached an end, and the batches that this completed."""
    ended = [job for job in moved if job.finished_at is not None]
    events.record_jobs(session, ended)
    batches.close_finished(session, {job.batch_id for job in ended if job.batch_id})
