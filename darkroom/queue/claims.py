"""Claims: the next jobs that may share a UNet batch start running, in a new dispatch.

A function takes the session and commits nothing; the caller's block is the transaction. No module
but this one, `dispatches` and `darkroom.jobs.lifecycle` changes a job's status.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    CompoundSelect,
    Integer,
    Interval,
    Select,
    SmallInteger,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    func,
    insert,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate

from darkroom.db.locks import AdvisoryLock
from darkroom.db.tables import Dispatch, Job, QueueControl
from darkroom.events import log as event_log
from darkroom.queue import fairness
from darkroom.status import PRIORITY_RANK, Status

#: A worker keeps its last key while that key's first job is at most this many full microbatches
#: behind the head of the queue, because a switch may cost a GPU its warmed graphs.
AFFINITY_MICROBATCHES: Final = 4
#: How long, by priority rank, a microbatch that is not full waits for more jobs.
LINGER: Final = (timedelta(seconds=0.05), timedelta(seconds=0.15), timedelta(seconds=0.3))
_LOCK: Final = select(func.pg_advisory_xact_lock(AdvisoryLock.CLAIM), QueueControl.paused_at)


def has_claimable(session: Session) -> bool:
    """Return whether any job could be claimed now."""
    not_paused = select(QueueControl.id).where(QueueControl.paused_at.is_(None)).exists()
    any_job = select(Job.id).where(_claimable()).exists()
    return bool(session.scalar(select(and_(not_paused, any_job))))


def _claimable() -> ColumnElement[bool]:
    return and_(
        Job.status == Status.QUEUED,
        ~Job.paused,
        Job.scheduled_at <= func.now(),
        or_(Job.expires_at.is_(None), Job.expires_at > func.now()),
    )


def claim(
    session: Session,
    worker_id: str,
    *,
    max_microbatch: Mapping[str, int],
    lease: timedelta,
    last_key: str | None = None,
    idle: bool = True,
) -> Sequence[Job]:
    """Start the next queued job and those that may share its UNet batch; return them in order.

    `max_microbatch`: the most jobs of a microbatch, per model name; other models are skipped.
    `last_key`: the microbatch key of this worker's last claim, preferred within bounds.
    `idle`: the worker generates nothing else. If it does, a microbatch that is not full waits for
    more jobs, up to `LINGER`.
    Return nothing if no job is claimable, or an operator paused the queue.
    """
    # One claim at a time: two that interleave would each lock every other row, and both
    # microbatches would be half full. A claim takes a few ms.
    if session.execute(_LOCK).one().paused_at is not None:
        return []
    heads = _heads(session, max_microbatch)
    if not heads:
        return []
    head = heads[fairness.next_class(session, heads)]
    head = _prefer_last_key(session, head, last_key, max_microbatch[head.model])
    limit = max_microbatch[head.model]
    batch = _batch(session, head, limit)
    if not batch or (len(batch) < limit and not idle and _may_linger(head, batch)):
        return []
    fairness.record_service(session, head.priority, tag=head.start_tag, waiting=heads)
    return _start(session, worker_id, batch, lease)


@dataclass(frozen=True)
class QueueHead:
    """First claimable job of a priority or a key; a microbatch is formed around it."""

    priority: int
    microbatch_key: str
    isolation_group: str
    model: str
    start_tag: float
    cost: float


_HEAD: Final = (
    Job.priority,
    Job.microbatch_key,
    Job.isolation_group,
    Job.model,
    Job.start_tag,
    Job.cost,
)


def _heads(session: Session, models: Collection[str]) -> dict[int, QueueHead]:
    """Return the head of each priority that has claimable jobs, by rank."""
    heads = [QueueHead(*row) for row in session.execute(_heads_query(frozenset(models)))]
    return {head.priority: head for head in heads}


@functools.cache  # compiling the statement takes longer than running it
def _heads_query(models: frozenset[str]) -> CompoundSelect[*tuple[Any, ...]]:
    known = Job.model.in_(models)
    return union_all(
        *(first_queued(Job.priority == rank, known) for rank in PRIORITY_RANK.values())
    )


def first_queued(*conditions: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    """Return the query for the first claimable job that matches."""
    first = select(*_HEAD).where(_claimable(), *conditions).order_by(Job.start_tag, Job.id)
    return first.limit(1).subquery().select()  # in parentheses: each has its own order and limit


def _prefer_last_key(
    session: Session, head: QueueHead, last_key: str | None, limit: int
) -> QueueHead:
    """Return the first job of the last key if it is near enough to the head, else the head."""
    if last_key in {None, head.microbatch_key} or head.isolation_group:
        return head
    row = session.execute(
        first_queued(
            Job.microbatch_key == last_key,
            Job.isolation_group == "",
            Job.priority == head.priority,
            Job.model == head.model,
        )
    ).first()
    if row is None:
        return head
    last = QueueHead(*row)
    near = last.start_tag - head.start_tag <= AFFINITY_MICROBATCHES * limit * head.cost
    return last if near else head


@dataclass(frozen=True)
class CandidateJob:
    """Job that is locked but not running yet."""

    id: str
    microbatch_key: str
    cost: float
    age: timedelta


def _batch(session: Session, head: QueueHead, limit: int) -> list[CandidateJob]:
    """Lock the head and the jobs that share its batch: its own priority first, then others."""
    batch = _lock_candidates(session, head, limit, same_priority=True)
    if len(batch) == limit:
        return batch
    return batch + _lock_candidates(session, head, limit - len(batch), same_priority=False)


def _may_linger(head: QueueHead, batch: Sequence[CandidateJob]) -> bool:
    return all(job.age < LINGER[head.priority] for job in batch)


def _lock_candidates(
    session: Session, head: QueueHead, limit: int, *, same_priority: bool
) -> list[CandidateJob]:
    parameters = {
        "key": head.microbatch_key,
        "isolation_group": head.isolation_group,
        "priority": head.priority,
        "limit": limit,
    }
    rows = session.execute(_lock_query(same_priority), parameters)
    return [CandidateJob(*row) for row in rows]


@functools.cache
def _lock_query(same_priority: bool) -> Select[*tuple[Any, ...]]:  # noqa: FBT001  # a cache's key
    rank = bindparam("priority", type_=SmallInteger)
    query = candidates_query(
        Job.microbatch_key == bindparam("key"),
        Job.isolation_group == bindparam("isolation_group"),
        Job.priority == rank if same_priority else Job.priority != rank,
    )
    return query.limit(bindparam("limit", type_=Integer)).with_for_update(skip_locked=True)


def candidates_query(*conditions: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    """Return the query for the claimable jobs that match, in queue order."""
    age = cast(func.now() - Job.created_at, Interval)
    return (
        select(Job.id, Job.microbatch_key, Job.cost, age)
        .where(_claimable(), *conditions)
        .order_by(Job.priority, Job.start_tag, Job.id)
    )


def _start(
    session: Session, worker_id: str, batch: Sequence[CandidateJob], lease: timedelta
) -> Sequence[Job]:
    """Open a dispatch and mark its jobs as running; return them in the order given."""
    dispatch = {
        "worker": worker_id,
        "key": batch[0].microbatch_key,
        "size": len(batch),
        "cost": sum(job.cost for job in batch),
        "lease": lease,
    }
    dispatch_id = session.connection().execute(_open_dispatch(), dispatch).scalar_one()
    ids = [job.id for job in batch]
    parameters = {"ids": ids, "dispatch": dispatch_id, "size": len(batch)}
    started = session.scalars(_start_jobs(), parameters).all()
    event_log.record_jobs(session, started)
    return sorted(started, key=lambda job: ids.index(job.id))


@functools.cache
def _open_dispatch() -> ReturningInsert[int]:
    return (
        insert(Dispatch)
        .values(
            worker_id=bindparam("worker"),
            microbatch_key=bindparam("key"),
            size=bindparam("size"),
            cost=bindparam("cost"),
            leased_until=func.now() + bindparam("lease", type_=Interval),
        )
        .returning(Dispatch.id)
    )


@functools.cache
def _start_jobs() -> ReturningUpdate[Job]:
    return (
        update(Job)
        .where(Job.id == any_(bindparam("ids", type_=ARRAY(Text))), Job.status == Status.QUEUED)
        .values(
            status=Status.RUNNING,
            dispatch_id=bindparam("dispatch"),
            attempt=Job.attempt + 1,
            microbatch_size=bindparam("size"),
            started_at=func.now(),
        )
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    )
