"""What becomes of a dispatch: renewed, settled, crashed, released, or its lease runs out.

A function takes the session and commits nothing; the caller's block is the transaction.
Leaving `running` has one door, `_move`, behind the closing of the dispatch: it opens only while
the dispatch is still open, so a worker that wakes from the dead changes nothing.
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
from darkroom.queue.outcomes import Failed, HandedBack, Outcome, SentBack, Succeeded, Suspect
from darkroom.status import DispatchStatus, Status

MAX_BACKOFF_S: Final = 60.0


def renew(session: Session, dispatch_ids: Collection[int], *, lease: timedelta) -> frozenset[int]:
    """Heartbeat: extend the leases of these dispatches. Those of them that are still open."""
    held = session.scalars(
        update(Dispatch)
        .where(Dispatch.id.in_(dispatch_ids), Dispatch.status == DispatchStatus.RUNNING)
        .values(leased_until=func.now() + lease)
        .returning(Dispatch.id)
    )
    return frozenset(held)


def canceled_jobs(session: Session, dispatch_ids: Collection[int]) -> dict[int, frozenset[str]]:
    """The running jobs of these dispatches that nobody wants any more, by dispatch."""
    asked = (
        select(Dispatch.id, func.array_agg(Job.id))
        .join(Job, Job.dispatch_id == Dispatch.id)
        .where(Dispatch.id.in_(dispatch_ids), Job.status == Status.RUNNING, _cancel_due())
        .group_by(Dispatch.id)
    )
    return {dispatch_id: frozenset(ids) for dispatch_id, ids in session.execute(asked)}


def _cancel_due() -> ColumnElement[bool]:
    """Of a running job: it or its batch was canceled, or its deadline has passed."""
    canceled = select(Batch.id).where(Batch.id == Job.batch_id, Batch.canceled_at.is_not(None))
    return or_(
        Job.cancel_requested_at.is_not(None), Job.deadline_at <= func.now(), canceled.exists()
    )


def settle(session: Session, dispatch_id: int, outcomes: Iterable[Outcome]) -> bool:
    """Close the dispatch and move each of its jobs to where its outcome says.

    A job that was withdrawn meanwhile ends as canceled or expired, whatever its outcome.
    False, and nothing moves, when the dispatch is no longer open: its lease ran out and somebody
    else has the jobs. Whatever was drawn then is garbage.
    """
    outcomes = list(outcomes)
    back = any(isinstance(outcome, SentBack | HandedBack) for outcome in outcomes)
    status = DispatchStatus.RELEASED if back else DispatchStatus.FINISHED
    if not _close_dispatch(session, dispatch_id, status):
        return False
    _move(session, dispatch_id, lambda _: outcomes)
    return True


def settle_early(session: Session, dispatch_id: int, outcomes: Iterable[Outcome]) -> bool:
    """Move jobs that are done with while the dispatch goes on with the others, wanted or not.

    False, and nothing moves, when the dispatch is no longer open.
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
    """Close a dispatch over which the replica died or hung; False when it is no longer open.

    `outcomes` are of the jobs that were done with before. Any of the others may be why. They are
    drawn again in two halves, and after a second crash each alone; a job that was there at
    `max_attempts` crashes, 3 or more, fails: the last were its own.
    """
    if not _close_dispatch(session, dispatch_id, DispatchStatus.CRASHED):
        return False
    known = {outcome.job_id: outcome for outcome in outcomes}

    def verdicts(jobs: Sequence[Job]) -> list[Outcome]:
        suspects = [job for job in jobs if job.id not in known]
        return [*known.values(), *_split_suspects(suspects, max_attempts)]

    _move(session, dispatch_id, verdicts)
    return True


def unused_images(session: Session, outcomes: Iterable[Outcome]) -> list[str]:
    """Keys of images that were stored, but that no job refers to: they may be removed."""
    stored = {
        outcome.job_id: outcome.image_key for outcome in outcomes if isinstance(outcome, Succeeded)
    }
    used = set(session.scalars(select(Job.image_key).where(Job.id.in_(stored))))
    return [key for key in stored.values() if key not in used]


def release(session: Session, worker_id: str) -> int:
    """Hand back what a worker still holds as it leaves; no attempt is spent. How many jobs."""
    released = session.scalars(
        update(Dispatch)
        .where(Dispatch.worker_id == worker_id, Dispatch.status == DispatchStatus.RUNNING)
        .values(status=DispatchStatus.RELEASED, finished_at=func.now())
        .returning(Dispatch.id)
    ).all()
    return sum(
        _move(session, dispatch_id, lambda jobs: [HandedBack(job.id) for job in jobs])
        for dispatch_id in released
    )


def expire_leases(session: Session, *, max_attempts: int) -> int:
    """Take back the jobs of workers that stopped renewing; how many dispatches were closed.

    One of the jobs may be what killed the worker, so they are suspects as in `crash`. Where the
    worker held other dispatches too, it may have been theirs: then a job fails only after twice as
    many. One statement for reading and closing, so that a heartbeat cannot slip between the two.
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
    accompanied = _ids_with_other_dispatches(session, expired)
    for dispatch_id in expired:
        patience = 2 * max_attempts if dispatch_id in accompanied else max_attempts
        _move(session, dispatch_id, partial(_split_suspects, max_attempts=patience))
    return len(expired)


def _ids_with_other_dispatches(session: Session, expired: Sequence[int]) -> Collection[int]:
    """Those whose worker held another one when it died."""
    other = aliased(Dispatch)
    held = other.finished_at.is_(None) | (other.finished_at >= Dispatch.created_at)
    beside = (
        select(other.id)
        .where(other.worker_id == Dispatch.worker_id, other.id != Dispatch.id, held)
        .where(other.status.in_([DispatchStatus.RUNNING, DispatchStatus.EXPIRED]))
    )
    these = select(Dispatch.id).where(Dispatch.id.in_(expired), beside.exists())
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
    return [
        _verdict(job, second_half=place >= half, max_attempts=max_attempts)
        for place, job in enumerate(suspects)
    ]


def _verdict(job: Job, *, second_half: bool, max_attempts: int) -> Failed | Suspect:
    """A claim that ended in a crash counts as an attempt, so `attempt` is how many there were."""
    if job.attempt >= max_attempts:
        message = f"its replica or worker died {job.attempt} times while drawing it"
        return Failed(job.id, "worker_crashed", message, retryable=True)
    if job.attempt == 1:
        return Suspect(job.id, isolation_group=f"{job.dispatch_id}{'b' if second_half else 'a'}")
    return Suspect(job.id, isolation_group=job.id)


def _move(
    session: Session,
    dispatch_id: int,
    outcomes_of: Callable[[Sequence[Job]], Iterable[Outcome]],
    *which: ColumnElement[bool],
) -> int:
    """The dispatch's jobs, or `which` of them, to where their outcomes say; how many moved.

    The rows are locked first, and all in the order of their ids, as everybody does who locks
    several: a cancel that comes meanwhile waits, and finds them where they have gone.
    """
    held = and_(Job.dispatch_id == dispatch_id, Job.status == Status.RUNNING, *which)
    jobs = session.scalars(select(Job).where(held).order_by(Job.id).with_for_update()).all()
    moved = list(session.scalars(_end_canceled(held)))
    gone = {job.id for job in moved}
    outcomes = list(outcomes_of([job for job in jobs if job.id not in gone]))
    drawn = [outcome for outcome in outcomes if isinstance(outcome, Succeeded)]
    moved += _succeed(session, dispatch_id, drawn)
    for outcome in outcomes:
        if not isinstance(outcome, Succeeded):
            moved += session.scalars(
                update(Job)
                .where(held, Job.id == outcome.job_id)
                .values(_values(outcome))
                .returning(Job)
            )
    record_finished(session, moved)
    return len(moved)


def _succeed(session: Session, dispatch_id: int, drawn: Sequence[Succeeded]) -> Sequence[Job]:
    """Those of the dispatch's jobs that are still its own; all in one statement."""
    if not drawn:
        return []
    given = {name: [getattr(each, name) for each in drawn] for name in _SUCCEEDED}
    return session.scalars(_success(), given | {"dispatch": dispatch_id}).all()


_SUCCEEDED: Final[Mapping[str, TypeEngine[Any]]] = {
    "job_id": Text(),
    "image_key": Text(),
    "image_sha256": Text(),
    "image_bytes": Integer(),
    "inference_ms": Integer(),
    "upload_ms": Integer(),
}


@functools.cache  # to word it takes longer than to run it
def _success() -> ReturningUpdate[Job]:
    columns = [bindparam(name, type_=ARRAY(kind)) for name, kind in _SUCCEEDED.items()]
    drawn = func.unnest(*columns).table_valued(*_SUCCEEDED, name="drawn").render_derived()
    values = {name: drawn.c[name] for name in _SUCCEEDED if name != "job_id"}
    return (
        update(Job)
        .where(
            Job.dispatch_id == bindparam("dispatch"),
            Job.status == Status.RUNNING,
            Job.id == drawn.c.job_id,
        )
        .values(status=Status.SUCCEEDED, finished_at=func.now(), **values)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    )


def _end_canceled(held: ColumnElement[bool]) -> ReturningUpdate[Job]:
    """End what is no longer wanted: as expired when its deadline came before the client's word."""
    asked_at = func.coalesce(Job.cancel_requested_at, func.now())
    expired = and_(Job.deadline_at.is_not(None), Job.deadline_at <= asked_at)
    return (
        update(Job)
        .where(held, _cancel_due())
        .values(
            status=case((expired, Status.EXPIRED), else_=Status.CANCELED), finished_at=func.now()
        )
        .returning(Job)
    )


def _values(outcome: Failed | SentBack | HandedBack | Suspect) -> dict[str, object]:
    match outcome:
        case Failed():
            return {
                "status": Status.FAILED,
                "finished_at": func.now(),
                "error_code": outcome.code,
                "error_message": outcome.message,
                "error_retryable": outcome.retryable,
            }
        case SentBack():
            return _back_to_queue() | {
                "attempt": Job.attempt - 1,
                "requeue_count": Job.requeue_count + 1,
                "scheduled_at": func.now() + _backoff(),
            }
        case HandedBack():
            return _back_to_queue() | {"attempt": Job.attempt - 1}
        case Suspect():
            return _back_to_queue() | {"isolation_group": outcome.isolation_group}


def _back_to_queue() -> dict[str, object]:
    paused = select(Batch.id).where(Batch.id == Job.batch_id, Batch.paused_at.is_not(None))
    return {
        "status": Status.QUEUED,
        "dispatch_id": None,
        "microbatch_size": None,
        "started_at": None,
        "paused": paused.exists(),
    }


def _backoff() -> ColumnElement[timedelta]:
    """1, 2, 4 … 60 s by the number of requeue_count so far, give or take a half, so none align."""
    seconds = func.least(MAX_BACKOFF_S, func.power(2, func.least(Job.requeue_count, 10)))
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds * random.uniform(0.5, 1.5))  # noqa: S311  # jitter, not a secret
