"""Fair scheduling: start-time fair queueing among tenants, weighted turns among priority classes.

Start-time fair queueing (Goyal, Vin & Cheng 1996): each job gets a tag when it is submitted, and
the queued job with the smallest tag is next. A tenant's tags are as far apart as its jobs cost,
divided by its weight; a tenant that returns after a pause starts at the present, not in the past.
Writing the tags at submit makes the claim a plain index scan, however long the queue is.

Priority classes are served in order, but a class that has waited `AGEING` for each rank between
them precedes a class that was just served, so that none starves.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Double,
    SmallInteger,
    Text,
    bindparam,
    func,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningInsert

from darkroom.db.tables import FairShare, Job, PriorityClass, QueueControl, Tenant
from darkroom.errors import Draining
from darkroom.status import Status

AGEING: Final = timedelta(seconds=30)
#: The sums of what a tenant submits decay to 1/e in this many seconds, see `_decayed_sums`.
FADING: Final = 600.0


@dataclass(frozen=True)
class Reservation:
    """Place of a tenant's next jobs of one priority: their first tag, and the tenant's weight."""

    first_tag: float
    weight: float
    now: datetime  #: of the transaction, by the database's clock


def reserve(session: Session, tenant_id: str, priority: int, *, cost: float) -> Reservation:
    """Reserve a place for jobs of this total cost, after the tenant's others.

    Locks the tenant's share of this priority until the caller commits. Raises Draining.
    """
    parameters = {"tenant": tenant_id, "rank": priority, "cost": cost, "square": cost**2}
    row = session.connection().execute(_reservation(), parameters).one()
    if row.draining_at is not None:
        raise Draining
    return Reservation(row.next_start_tag - cost / row.weight, row.weight, row.now)


@functools.cache  # compiling the statement takes longer than running it
def _reservation() -> ReturningInsert[Any]:
    tenant, rank = bindparam("tenant", type_=Text), bindparam("rank", type_=SmallInteger)
    cost, square = bindparam("cost", type_=Double), bindparam("square", type_=Double)
    weight = select(Tenant.weight).where(Tenant.id == tenant).scalar_subquery()
    draining_at = select(QueueControl.draining_at).scalar_subquery()
    start = _virtual_time(rank)
    share = insert(FairShare).values(
        tenant_id=tenant,
        priority=rank,
        next_start_tag=start + cost / weight,
        arrived=cost,
        arrived_squares=square,
    )
    share = share.on_conflict_do_update(
        index_elements=[FairShare.tenant_id, FairShare.priority],
        set_={"next_start_tag": func.greatest(FairShare.next_start_tag, start) + cost / weight}
        | _decayed_sums(cost, square),
    )
    return share.returning(
        FairShare.next_start_tag,
        weight.label("weight"),
        func.now().label("now"),
        draining_at.label("draining_at"),
    )


def _decayed_sums(cost: BindParameter[float], square: BindParameter[float]) -> dict[str, Any]:
    """Add to the decayed submission rate; `darkroom.forecast.queue_position` reads it."""
    age_s = func.extract("epoch", func.now() - FairShare.counted_at)
    left = func.exp(-func.least(50, age_s / FADING))  # the server calls smaller ones an error
    return {
        "arrived": FairShare.arrived * left + cost,
        "arrived_squares": FairShare.arrived_squares * left + square,
        "counted_at": func.now(),
    }


def refund(session: Session, tenant_id: str, costs: Mapping[int, float]) -> None:
    """Move the tenant's next jobs forward by the cost of canceled ones; `costs` is by priority."""
    weight = select(Tenant.weight).where(Tenant.id == tenant_id).scalar_subquery()
    for priority, cost in sorted(costs.items()):
        session.execute(
            update(FairShare)
            .where(FairShare.tenant_id == tenant_id, FairShare.priority == priority)
            .values(next_start_tag=FairShare.next_start_tag - cost / weight)
        )


def _virtual_time(priority: BindParameter[int]) -> ColumnElement[float]:
    """Return the smallest queued tag, or the last one claimed if no job is queued."""
    queued = (
        select(Job.start_tag)
        .where(Job.status == Status.QUEUED, ~Job.paused, Job.priority == priority)
        .order_by(Job.start_tag)
        .limit(1)
        .scalar_subquery()
    )
    claimed = (
        select(PriorityClass.virtual_time)
        .where(PriorityClass.priority == priority)
        .scalar_subquery()
    )
    return func.coalesce(queued, claimed, literal(0.0))


def next_class(session: Session, waiting: Collection[int]) -> int:
    """Return the rank to serve of the priority classes that have claimable jobs."""
    if len(waiting) == 1:
        return next(iter(waiting))
    waited_s = {rank: float(seconds) for rank, seconds in session.execute(_WAITED)}
    return min(waiting, key=lambda rank: rank - waited_s[rank] / AGEING.total_seconds())


_WAITED: Final = text(
    "SELECT priority, coalesce(extract(epoch FROM now() - waiting_since), 0) FROM priority_class"
)


def record_service(session: Session, served: int, *, tag: float, waiting: Collection[int]) -> None:
    """Record that class `served` got the microbatch at `tag` while classes `waiting` had jobs.

    The caller holds the lock of claims.
    """
    session.execute(_RECORD_SERVICE, {"served": served, "tag": tag, "waiting": list(waiting)})


_RECORD_SERVICE: Final = text("""
    UPDATE priority_class
    SET virtual_time = CASE WHEN priority = :served THEN greatest(virtual_time, :tag)
                            ELSE virtual_time END,
        waiting_since = CASE WHEN priority = :served THEN now()
                             WHEN priority = ANY(:waiting) THEN coalesce(waiting_since, now()) END
    WHERE priority = :served OR (priority = ANY(:waiting)) = (waiting_since IS NULL)
""")
