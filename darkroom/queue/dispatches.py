"""Dispatches: leases renewed, outcomes settled, jobs requeued after a crash or a lapsed lease.

A function takes the session and commits nothing; the caller's block is the transaction.
A job leaves `running` only by `_move`, after a check that its dispatch is still open. So a worker
that comes back after its lease lapsed changes nothing. No module but this one, `claims` and
`darkroom.jobs.lifecycle` changes a job's status.
"""

import functools
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Integer,
    Text,
    and_,
    bindparam,
    case,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.types import TypeEngine

from darkroom.batches import record_finished
from darkroom.db.tables import Batch, Dispatch, Job
from darkroom.queue.outcomes import Failed, Outcome, Requeued, RequeueReason, Succeeded
from darkroom.status import DispatchStatus, Status

MAX_BACKOFF_S: Final = 60.0


def renew(session: Session, dispatch_ids: Collection[int], *, lease: timedelta) -> frozenset[int]:
    """Extend the leases of those of the dispatches that are still open; return their ids."""
    renewed = session.scalars(
        update(Dispatch)
        .where(Dispatch.id.in_(dispatch_ids), Dispatch.status == DispatchStatus.RUNNING)
        .values(leased_until=func.now() + lease)
        .returning(Dispatch.id)
    )
    return frozenset(renewed)


def canceled_jobs(session: Session, dispatch_ids: Collection[int]) -> dict[int, frozenset[str]]:
    """Return the running jobs whose image is no longer wanted, by dispatch."""
    due = (
        select(Dispatch.id, func.array_agg(Job.id))
        .join(Job, Job.dispatch_id == Dispatch.id)
        .where(Dispatch.id.in_(dispatch_ids), Job.status == Status.RUNNING, _cancel_due())
        .group_by(Dispatch.id)
    )
    return {dispatch_id: frozenset(ids) for dispatch_id, ids in session.execute(due)}


def _cancel_due() -> ColumnElement[bool]:
    """Match running jobs that were canceled, alone or with their batch, or missed a deadline."""
    canceled = select(Batch.id).where(Batch.id == Job.batch_id, Batch.canceled_at.is_not(None))
    return or_(
        Job.cancel_requested_at.is_not(None), Job.deadline_at <= func.now(), canceled.exists()
    )


def settle(session: Session, dispatch_id: int, outcomes: Iterable[Outcome]) -> bool:
    """Close the dispatch and give each of its jobs the status of its outcome.

    A job that was canceled meanwhile ends as canceled or expired, whatever its outcome.
    Return False, and change nothing, if the dispatch is no longer open: its lease lapsed, its jobs
    were requeued, and the images of `outcomes` are garbage.
    """
    outcomes = list(outcomes)
    requeues = any(isinstance(outcome, Requeued) for outcome in outcomes)
    status = DispatchStatus.RELEASED if requeues else DispatchStatus.FINISHED
    if not _close_dispatch(session, dispatch_id, status):
        return False
    _move(session, dispatch_id, lambda _: outcomes)
    return True


def settle_early(session: Session, dispatch_id: int, outcomes: Iterable[Outcome]) -> bool:
    """Settle finished jobs of a dispatch that continues with its others.

    Return False, and change nothing, if the dispatch is no longer open.
    """
    still_open = select(Dispatch.id).where(
        Dispatch.id == dispatch_id, Dispatch.status == DispatchStatus.RUNNING
    )
    if session.scalar(still_open.with_for_update()) is None:
        return False
    outcomes = list(outcomes)
    these = Job.id.in_([outcome.job_id for outcome in outcomes])
    _move(session, dispatch_id, lambda _: outcomes, these)
    return True


def crash(
    session: Session, dispatch_id: int, outcomes: Iterable[Outcome] = (), *, max_attempts: int
) -> bool:
    """Close a dispatch whose replica died or hung; return False if it is no longer open.

    `outcomes` are of the jobs that finished before the crash. Any of the others may have caused it:
    they are generated again in two halves, and after a second crash each alone. A job that was in
    `max_attempts` crashes, 3 or more, fails: it was alone in the last ones.
    """
    if not _close_dispatch(session, dispatch_id, DispatchStatus.CRASHED):
        return False
    known = {outcome.job_id: outcome for outcome in outcomes}

    def outcomes_of(jobs: Sequence[Job]) -> list[Outcome]:
        suspects = [job for job in jobs if job.id not in known]
        return [*known.values(), *_split_suspects(suspects, max_attempts)]

    _move(session, dispatch_id, outcomes_of)
    return True


def unused_images(session: Session, outcomes: Iterable[Outcome]) -> list[str]:
    """Return the keys of stored images that no job refers to; they may be removed."""
    stored = {
        outcome.job_id: outcome.image_key for outcome in outcomes if isinstance(outcome, Succeeded)
    }
    used = set(session.scalars(select(Job.image_key).where(Job.id.in_(stored))))
    return [key for key in stored.values() if key not in used]


def release(session: Session, worker_id: str) -> int:
    """Requeue all running jobs of a worker that stops; return how many. No attempt is counted."""
    released = session.scalars(
        update(Dispatch)
        .where(Dispatch.worker_id == worker_id, Dispatch.status == DispatchStatus.RUNNING)
        .values(status=DispatchStatus.RELEASED, finished_at=func.now())
        .returning(Dispatch.id)
    ).all()

    def outcomes_of(jobs: Sequence[Job]) -> list[Outcome]:
        return [Requeued(job.id, RequeueReason.RELEASED) for job in jobs]

    return sum(_move(session, dispatch_id, outcomes_of) for dispatch_id in released)


def expire_leases(session: Session, *, max_attempts: int) -> int:
    """Close dispatches whose lease lapsed and requeue their jobs; return how many were closed.

    One of the jobs may have killed the worker, so they are suspects as in `crash`. If the worker
    ran other dispatches too, one of those may be to blame: a job fails only after twice as many
    attempts. One statement reads and closes, so that no heartbeat can come between the two.
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
    concurrent = _ids_with_other_dispatches(session, expired)
    for dispatch_id in expired:
        attempts = 2 * max_attempts if dispatch_id in concurrent else max_attempts
        _move(session, dispatch_id, partial(_split_suspects, max_attempts=attempts))
    return len(expired)


def _ids_with_other_dispatches(session: Session, expired: Sequence[int]) -> Collection[int]:
    """Return those of the dispatches whose worker ran another one when it died."""
    other = aliased(Dispatch)
    open_then = other.finished_at.is_(None) | (other.finished_at >= Dispatch.created_at)
    same_worker = (
        select(other.id)
        .where(other.worker_id == Dispatch.worker_id, other.id != Dispatch.id, open_then)
        .where(other.status.in_([DispatchStatus.RUNNING, DispatchStatus.EXPIRED]))
    )
    these = select(Dispatch.id).where(Dispatch.id.in_(expired), same_worker.exists())
    return set(session.scalars(these)) if expired else ()


def _close_dispatch(session: Session, dispatch_id: int, status: DispatchStatus) -> bool:
    closed = session.execute(
        update(Dispatch)
        .where(Dispatch.id == dispatch_id, Dispatch.status == DispatchStatus.RUNNING)
        .values(status=status, finished_at=func.now())
        .returning(Dispatch.id)
    )
    return closed.first() is not None


def _split_suspects(suspects: Sequence[Job], max_attempts: int) -> list[Outcome]:
    half = (len(suspects) + 1) // 2
    first, second = suspects[:half], suspects[half:]
    return [_suspect_outcome(job, f"{job.dispatch_id}a", max_attempts) for job in first] + [
        _suspect_outcome(job, f"{job.dispatch_id}b", max_attempts) for job in second
    ]


def _suspect_outcome(job: Job, half: str, max_attempts: int) -> Outcome:
    """Requeue or fail one suspect; `job.attempt` counts the crashes, this one included."""
    if job.attempt >= max_attempts:
        message = f"its replica or worker died {job.attempt} times while generating it"
        return Failed(job.id, "worker_crashed", message, retryable=True)
    return Requeued(job.id, RequeueReason.CRASHED, half if job.attempt == 1 else job.id)


def _move(
    session: Session,
    dispatch_id: int,
    outcomes_of: Callable[[Sequence[Job]], Iterable[Outcome]],
    *conditions: ColumnElement[bool],
) -> int:
    """Give the dispatch's running jobs that match the status of their outcome; return how many.

    The rows are locked first, in the order of their ids like everywhere: a concurrent cancel waits
    and then sees their new status.
    """
    running = and_(Job.dispatch_id == dispatch_id, Job.status == Status.RUNNING, *conditions)
    jobs = session.scalars(select(Job).where(running).order_by(Job.id).with_for_update()).all()
    moved = list(session.scalars(_end_canceled(running)))
    canceled = {job.id for job in moved}
    outcomes = list(outcomes_of([job for job in jobs if job.id not in canceled]))
    succeeded = [outcome for outcome in outcomes if isinstance(outcome, Succeeded)]
    moved += _succeed(session, dispatch_id, succeeded)
    for outcome in outcomes:
        if not isinstance(outcome, Succeeded):
            moved += session.scalars(
                update(Job)
                .where(running, Job.id == outcome.job_id)
                .values(_values(outcome))
                .returning(Job)
            )
    record_finished(session, moved)
    return len(moved)


def _succeed(session: Session, dispatch_id: int, outcomes: Sequence[Succeeded]) -> Sequence[Job]:
    """Mark jobs that are still the dispatch's as succeeded, in one statement; return them."""
    if not outcomes:
        return []
    arrays = {name: [getattr(each, name) for each in outcomes] for name in _SUCCEEDED_COLUMNS}
    return session.scalars(_success(), arrays | {"dispatch": dispatch_id}).all()


_SUCCEEDED_COLUMNS: Final[Mapping[str, TypeEngine[Any]]] = {
    "job_id": Text(),
    "image_key": Text(),
    "image_sha256": Text(),
    "image_bytes": Integer(),
    "inference_ms": Integer(),
    "upload_ms": Integer(),
}


@functools.cache  # compiling the statement takes longer than running it
def _success() -> ReturningUpdate[Job]:
    columns = [bindparam(name, type_=ARRAY(kind)) for name, kind in _SUCCEEDED_COLUMNS.items()]
    unnested = func.unnest(*columns).table_valued(*_SUCCEEDED_COLUMNS, name="succeeded")
    succeeded = unnested.render_derived()
    values = {name: succeeded.c[name] for name in _SUCCEEDED_COLUMNS if name != "job_id"}
    return (
        update(Job)
        .where(
            Job.dispatch_id == bindparam("dispatch"),
            Job.status == Status.RUNNING,
            Job.id == succeeded.c.job_id,
        )
        .values(status=Status.SUCCEEDED, finished_at=func.now(), **values)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    )


def _end_canceled(running: ColumnElement[bool]) -> ReturningUpdate[Job]:
    """End jobs whose image is no longer wanted; as expired if the deadline preceded the cancel."""
    canceled_at = func.coalesce(Job.cancel_requested_at, func.now())
    expired = and_(Job.deadline_at.is_not(None), Job.deadline_at <= canceled_at)
    return (
        update(Job)
        .where(running, _cancel_due())
        .values(
            status=case((expired, Status.EXPIRED), else_=Status.CANCELED), finished_at=func.now()
        )
        .returning(Job)
    )


def _values(outcome: Failed | Requeued) -> dict[str, object]:
    if isinstance(outcome, Failed):
        return {
            "status": Status.FAILED,
            "finished_at": func.now(),
            "error_code": outcome.code,
            "error_message": outcome.message,
            "error_retryable": outcome.retryable,
        }
    paused = select(Batch.id).where(Batch.id == Job.batch_id, Batch.paused_at.is_not(None))
    queued = {
        "status": Status.QUEUED,
        "dispatch_id": None,
        "microbatch_size": None,
        "started_at": None,
        "paused": paused.exists(),
    }
    match outcome.reason:
        case RequeueReason.CRASHED:
            return queued | {"isolation_group": outcome.isolation_group}
        case RequeueReason.RELEASED:
            return queued | {"attempt": Job.attempt - 1}
        case RequeueReason.UNAVAILABLE:
            return queued | {
                "attempt": Job.attempt - 1,
                "requeue_count": Job.requeue_count + 1,
                "scheduled_at": func.now() + _backoff(),
            }


def _backoff() -> ColumnElement[timedelta]:
    """Return 1, 2, 4 … 60 s by how often the job was requeued; ± half, so that none align."""
    seconds = func.least(MAX_BACKOFF_S, func.power(2, func.least(Job.requeue_count, 10)))
    jitter = random.uniform(0.5, 1.5)  # noqa: S311  # not a secret
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds * jitter)
