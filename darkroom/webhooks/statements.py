"""Statements of the delivery queue that run all the time.

Each is built once, because building it takes several times as long as running it. So a statement
holds parameters instead of values, and one array per column for many rows. Execute it with the
connection: the session would take the parameters for the values of a row.
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

_CLAIM_COLUMNS: Final = (
    *("id", "attempt_token", "tenant_id", "endpoint_id", "message_id", "type", "event_ids"),
    *("batch_id", "job_id", "failures", "status"),
)


@functools.cache
def select_due() -> Select[*tuple[Any, ...]]:
    """Select and lock the first `limit` due deliveries; their URL is null if it is not called."""
    enabled = and_(WebhookEndpoint.disabled_at.is_(None), WebhookEndpoint.deleted_at.is_(None))
    first = (
        select(Delivery.id)
        .where(Delivery.finished_at.is_(None), Delivery.next_attempt_at <= func.now())
        .order_by(Delivery.next_attempt_at)
        .limit(bindparam("limit", type_=Integer))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    return (
        select(
            *(getattr(Delivery, name) for name in _CLAIM_COLUMNS),
            func.coalesce(Delivery.url, WebhookEndpoint.url).label("url"),
        )
        .join(first, first.c.id == Delivery.id)
        .outerjoin(WebhookEndpoint, and_(WebhookEndpoint.id == Delivery.endpoint_id, enabled))
        .order_by(Delivery.next_attempt_at)
    )


@functools.cache
def mark_sending() -> Update:
    """Move the deliveries `ids` to `sending` with a new token and this `lease`."""
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
    """Make each of `ids` due in its `wait_s` seconds."""
    waits = _table("waits", ids=Text(), wait_s=Double())
    return (
        update(Delivery)
        .where(Delivery.id == waits.c.ids)
        .values(status=DeliveryStatus.PENDING, next_attempt_at=func.now() + seconds(waits.c.wait_s))
    )


@functools.cache
def settle() -> Update:
    """Move each of `ids` whose token still matches to its next status; return their ids."""
    results = _table(
        "results", ids=Text(), tokens=Integer(), statuses=Text(), failed=Integer(), wait_s=Double()
    )
    finished = results.c.statuses != DeliveryStatus.PENDING
    return (
        update(Delivery)
        .where(
            Delivery.id == results.c.ids,
            Delivery.attempt_token == results.c.tokens,
            Delivery.status == DeliveryStatus.SENDING,
        )
        .values(
            status=results.c.statuses,
            failures=Delivery.failures + results.c.failed,
            next_attempt_at=func.now() + seconds(results.c.wait_s),
            finished_at=case((finished, func.now()), else_=null()),
        )
        .returning(Delivery.id)
    )


def seconds(count: ColumnElement[float]) -> ColumnElement[Any]:
    """Convert a number of seconds into an interval."""
    return func.make_interval(0, 0, 0, 0, 0, 0, count)


def _table(name: str, **columns: TypeEngine[Any]) -> TableValuedAlias:
    """Build a table from one array parameter per column, named like the column."""
    arrays = (bindparam(each, type_=ARRAY(kind)) for each, kind in columns.items())
    named = (column(each, kind) for each, kind in columns.items())
    return func.unnest(*arrays).table_valued(*named, name=name).render_derived()
