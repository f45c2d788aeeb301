"""The statements of the delivery queue that run all the time.

Each is worded once: that takes several times as long as to run it. So they know no values, only
parameters, and an array a column where there are many rows. To be executed by the connection: the
session would take the parameters for the values of a row.
"""

import functools
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Double,
    Integer,
    Interval,
    Select,
    TableValuedAlias,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    case,
    column,
    func,
    null,
    select,
    update,
)
from sqlalchemy.types import TypeEngine

from darkroom.db.webhook_tables import Delivery, WebhookEndpoint
from darkroom.status import DeliveryStatus

_CLAIMED: Final = (
    *("id", "attempt_token", "tenant_id", "endpoint_id", "message_id", "type", "event_ids"),
    *("batch_id", "job_id", "failures", "status"),
)


@functools.cache
def due() -> Select[*tuple[Any, ...]]:
    """The first `most` due deliveries, locked; without a URL where the endpoint wants no more."""
    wants = and_(WebhookEndpoint.disabled_at.is_(None), WebhookEndpoint.deleted_at.is_(None))
    first = (
        select(Delivery.id)
        .where(Delivery.finished_at.is_(None), Delivery.next_attempt_at <= func.now())
        .order_by(Delivery.next_attempt_at)
        .limit(bindparam("most", type_=Integer))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    return (
        select(
            *(getattr(Delivery, name) for name in _CLAIMED),
            func.coalesce(Delivery.url, WebhookEndpoint.url).label("url"),
        )
        .join(first, first.c.id == Delivery.id)
        .outerjoin(WebhookEndpoint, and_(WebhookEndpoint.id == Delivery.endpoint_id, wants))
        .order_by(Delivery.next_attempt_at)
    )


@functools.cache
def opened() -> Update:
    """The deliveries `ids` are being sent, for as long as `lease`."""
    return (
        update(Delivery)
        .where(Delivery.id == any_(bindparam("ids", type_=ARRAY(Text))))
        .values(
            status=DeliveryStatus.SENDING,
            attempt_token=Delivery.attempt_token + 1,
            next_attempt_at=func.now() + bindparam("lease", type_=Interval),
        )
    )


@functools.cache
def defer() -> Update:
    """Each of `ids` is to be looked at again in its `wait_s`."""
    until = _table("until", ids=Text(), wait_s=Double())
    return (
        update(Delivery)
        .where(Delivery.id == until.c.ids)
        .values(status=DeliveryStatus.PENDING, next_attempt_at=func.now() + seconds(until.c.wait_s))
    )


@functools.cache
def closed() -> Update:
    """Each of `ids` moves on, if its token still holds; the ids of those."""
    moves = _table(
        "moves", ids=Text(), tokens=Integer(), statuses=Text(), failed=Integer(), wait_s=Double()
    )
    ended = moves.c.statuses != DeliveryStatus.PENDING
    return (
        update(Delivery)
        .where(
            Delivery.id == moves.c.ids,
            Delivery.attempt_token == moves.c.tokens,
            Delivery.status == DeliveryStatus.SENDING,
        )
        .values(
            status=moves.c.statuses,
            failures=Delivery.failures + moves.c.failed,
            next_attempt_at=func.now() + seconds(moves.c.wait_s),
            finished_at=case((ended, func.now()), else_=null()),
        )
        .returning(Delivery.id)
    )


def seconds(count: ColumnElement[float]) -> ColumnElement[Any]:
    """So many, as an interval."""
    return func.make_interval(0, 0, 0, 0, 0, 0, count)


def _table(name: str, **columns: TypeEngine[Any]) -> TableValuedAlias:
    """Rows that come as one array a column; the parameters have the columns' names."""
    arrays = (bindparam(each, type_=ARRAY(kind)) for each, kind in columns.items())
    named = (column(each, kind) for each, kind in columns.items())
    return func.unnest(*arrays).table_valued(*named, name=name).render_derived()
