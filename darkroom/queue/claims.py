"""Forming a microbatch: the next jobs that may be drawn together move into a dispatch.

A function takes the session and commits nothing; the caller's block is the transaction.
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

#: A worker stays with the key it drew last while that key's first job is at most so many full
#: microbatches behind the one that is next: to switch may cost a GPU its warmed graphs.
AFFINITY_MICROBATCHES: Final = 4
#: How long, by the class's rank, a microbatch with empty seats waits for company.
LINGER: Final = (timedelta(seconds=0.05), timedelta(seconds=0.15), timedelta(seconds=0.3))
_LOCK: Final = select(func.pg_advisory_xact_lock(AdvisoryLock.CLAIM), QueueControl.paused_at)


def has_claimable(session: Session) -> bool:
    """Whether any job could be claimed now."""
    going_on = select(QueueControl.id).where(QueueControl.paused_at.is_(None)).exists()
    any_job = select(Job.id).where(_claimable()).exists()
    return bool(session.scalar(select(and_(going_on, any_job))))


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
    """Take the next queued job and those that may share its UNet batch, into a new dispatch.

    `max_microbatch`: the most jobs of one call, per model name; other models are left alone.
    `last_key`: the microbatch key that this worker drew last, preferred within bounds.
    `idle`: the worker draws nothing else meanwhile. If it does, a microbatch with empty seats is
    left for company to come, as long as `LINGER` says.
    Empty when there is nothing to take, or an operator has paused all. The jobs come in the order
    of the queue.
    """
    # One claim at a time: two that interleave would each lock every other row, and leave half
    # of the seats of both microbatches empty. A claim takes a few ms.
    if session.execute(_LOCK).one().paused_at is not None:
        return []
    heads = _heads(session, max_microbatch)
    if not heads:
        return []
    head = heads[fairness.next_class(session, heads)]
    head = _prefer_last_key(session, head, last_key, max_microbatch[head.model])
    most = max_microbatch[head.model]
    company = _batch(session, head, most)
    if not company or (len(company) < most and not idle and _may_linger(head, company)):
        return []
    fairness.record_service(session, head.priority, tag=head.start_tag, waiting=heads)
    return _begin(session, worker_id, company, lease)


@dataclass(frozen=True)
class QueueHead:
    """The first of the jobs that a microbatch could be formed around."""

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
    """The first waiting job of each class that has one, by the class's rank."""
    found = [QueueHead(*row) for row in session.execute(_heads_of(frozenset(models)))]
    return {head.priority: head for head in found}


@functools.cache  # to word a statement takes longer than to run it
def _heads_of(models: frozenset[str]) -> CompoundSelect[*tuple[Any, ...]]:
    known = Job.model.in_(models)
    return union_all(
        *(first_queued(Job.priority == rank, known) for rank in PRIORITY_RANK.values())
    )


def first_queued(*conditions: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    """The statement for the first of the claimable jobs that fit."""
    first = select(*_HEAD).where(_claimable(), *conditions).order_by(Job.start_tag, Job.id)
    return first.limit(1).subquery().select()  # in parentheses: each has its own order and limit


def _prefer_last_key(
    session: Session, head: QueueHead, last_key: str | None, seats: int
) -> QueueHead:
    """The first job of the key drawn last, where it is near enough to the one that is next."""
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
    near = last.start_tag - head.start_tag <= AFFINITY_MICROBATCHES * seats * head.cost
    return last if near else head


@dataclass(frozen=True)
class CandidateJob:
    """A job that is taken: locked, but not moved yet."""

    id: str
    microbatch_key: str
    cost: float
    age: timedelta


def _batch(session: Session, head: QueueHead, most: int) -> list[CandidateJob]:
    """Who is drawn with the head, itself included: its class first, then whoever fills a seat."""
    company = _candidates(session, head, most, its_class=True)
    if len(company) == most:
        return company
    return company + _candidates(session, head, most - len(company), its_class=False)


def _may_linger(head: QueueHead, company: Sequence[CandidateJob]) -> bool:
    return all(seat.age < LINGER[head.priority] for seat in company)


def _candidates(
    session: Session, head: QueueHead, most: int, *, its_class: bool
) -> list[CandidateJob]:
    wanted = {
        "key": head.microbatch_key,
        "isolation_group": head.isolation_group,
        "priority": head.priority,
        "most": most,
    }
    return [CandidateJob(*row) for row in session.execute(_candidates_query(its_class), wanted)]


@functools.cache
def _candidates_query(its_class: bool) -> Select[*tuple[Any, ...]]:  # noqa: FBT001  # a cache's key
    rank = bindparam("priority", type_=SmallInteger)
    beside = candidates_query(
        Job.microbatch_key == bindparam("key"),
        Job.isolation_group == bindparam("isolation_group"),
        Job.priority == rank if its_class else Job.priority != rank,
    )
    return beside.limit(bindparam("most", type_=Integer)).with_for_update(skip_locked=True)


def candidates_query(*conditions: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    """The statement for those of the claimable jobs that fit, in the order of the queue."""
    age = cast(func.now() - Job.created_at, Interval)
    return (
        select(Job.id, Job.microbatch_key, Job.cost, age)
        .where(_claimable(), *conditions)
        .order_by(Job.priority, Job.start_tag, Job.id)
    )


def _begin(
    session: Session, worker_id: str, company: Sequence[CandidateJob], lease: timedelta
) -> Sequence[Job]:
    """Open a dispatch and move the jobs into it; in the order given."""
    opened = {
        "worker": worker_id,
        "key": company[0].microbatch_key,
        "size": len(company),
        "cost": sum(seat.cost for seat in company),
        "lease": lease,
    }
    dispatch_id = session.connection().execute(_open_dispatch(), opened).scalar_one()
    taken = {
        "ids": [seat.id for seat in company],
        "dispatch": dispatch_id,
        "size": len(company),
    }
    begun = session.scalars(_take_jobs(), taken).all()
    event_log.record_jobs(session, begun)
    places = {seat.id: place for place, seat in enumerate(company)}
    return sorted(begun, key=lambda job: places[job.id])


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
def _take_jobs() -> ReturningUpdate[Job]:
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
