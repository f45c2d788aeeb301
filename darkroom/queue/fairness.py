"""Who is next: fair tags among tenants, turns among classes.

Start-time fair queueing (Goyal, Vin & Cheng 1996): each job gets a tag when it is submitted, and
the waiting job with the smallest tag is next. A tenant's tags are as far apart as its jobs cost,
divided by its weight; a tenant that returns after a pause starts at the present, not in the past.
Writing the tags at submit makes the claim a plain index scan, however long the queue is.

Classes go strictly in order, but a class that has waited longer than `AGEING` for each rank
between them goes before one that has just been served, so that none starves.
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
#: What a tenant submits is counted in sums that fade to 1/e in so many seconds, see `_counted`.
FADING: Final = 600.0


@dataclass(frozen=True)
class Reservation:
    """Where a tenant's next jobs of one class go: the first tag, and how far a cost carries."""

    first_tag: float
    weight: float
    now: datetime  #: of the transaction, by the database's clock


def reserve(session: Session, tenant_id: str, priority: int, *, cost: float) -> Reservation:
    """Room for jobs of this total cost, after the tenant's others.

    Until the caller commits, others who reserve for this tenant and class wait. Raises Draining.
    """
    asked = {"tenant": tenant_id, "rank": priority, "cost": cost, "square": cost**2}
    reserved = session.connection().execute(_reservation(), asked).one()
    if reserved.draining_at is not None:
        raise Draining
    return Reservation(
        reserved.next_start_tag - cost / reserved.weight, reserved.weight, reserved.now
    )


@functools.cache  # to word a statement takes longer than to run it
def _reservation() -> ReturningInsert[Any]:
    tenant, rank = bindparam("tenant", type_=Text), bindparam("rank", type_=SmallInteger)
    cost, square = bindparam("cost", type_=Double), bindparam("square", type_=Double)
    weight = select(Tenant.weight).where(Tenant.id == tenant).scalar_subquery()
    draining_at = select(QueueControl.draining_at).scalar_subquery()
    start = _present(rank)
    mine = insert(FairShare).values(
        tenant_id=tenant,
        priority=rank,
        next_start_tag=start + cost / weight,
        arrived=cost,
        arrived_squares=square,
    )
    mine = mine.on_conflict_do_update(
        index_elements=[FairShare.tenant_id, FairShare.priority],
        set_={"next_start_tag": func.greatest(FairShare.next_start_tag, start) + cost / weight}
        | _counted(cost, square),
    )
    return mine.returning(
        FairShare.next_start_tag,
        weight.label("weight"),
        func.now().label("now"),
        draining_at.label("draining_at"),
    )


def _counted(cost: BindParameter[float], square: BindParameter[float]) -> dict[str, Any]:
    """Add to the decayed submission rate; `darkroom.forecast.queue_position` reads it."""
    age_s = func.extract("epoch", func.now() - FairShare.counted_at)
    left = func.exp(-func.least(50, age_s / FADING))  # the server calls smaller ones an error
    return {
        "arrived": FairShare.arrived * left + cost,
        "arrived_squares": FairShare.arrived_squares * left + square,
        "counted_at": func.now(),
    }


def refund(session: Session, tenant_id: str, costs: Mapping[int, float]) -> None:
    """Jobs were canceled before they cost anything: what the tenant submits next moves up.

    `costs`: by priority.
    """
    weight = select(Tenant.weight).where(Tenant.id == tenant_id).scalar_subquery()
    for priority, cost in sorted(costs.items()):
        session.execute(
            update(FairShare)
            .where(FairShare.tenant_id == tenant_id, FairShare.priority == priority)
            .values(next_start_tag=FairShare.next_start_tag - cost / weight)
        )


def _present(priority: BindParameter[int]) -> ColumnElement[float]:
    """The smallest tag that waits, or the last one claimed when none does."""
    waiting = (
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
    return func.coalesce(waiting, claimed, literal(0.0))


def next_class(session: Session, waiting: Collection[int]) -> int:
    """Of the classes that have jobs waiting, the rank of the one to serve."""
    if len(waiting) == 1:
        return next(iter(waiting))
    waited_s = {rank: float(seconds) for rank, seconds in session.execute(_WAITED)}
    return min(waiting, key=lambda rank: rank - waited_s[rank] / AGEING.total_seconds())


_WAITED: Final = text(
    "SELECT priority, coalesce(extract(epoch FROM now() - waiting_since), 0) FROM priority_class"
)


def record_service(session: Session, served: int, *, tag: float, waiting: Collection[int]) -> None:
    """The class `served` was given the microbatch with `tag`; these classes had jobs waiting.

    Only under the claim's lock: no two turns are noted at once.
    """
    session.execute(_TURN, {"served": served, "tag": tag, "waiting": list(waiting)})


_TURN: Final = text("""
    UPDATE priority_class
    SET virtual_time = CASE WHEN priority = :served THEN greatest(virtual_time, :tag)
                            ELSE virtual_time END,
        waiting_since = CASE WHEN priority = :served THEN now()
                             WHEN priority = ANY(:waiting) THEN coalesce(waiting_since, now()) END
    WHERE priority = :served OR (priority = ANY(:waiting)) = (waiting_since IS NULL)
""")
