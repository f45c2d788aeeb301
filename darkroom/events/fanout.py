"""Fan-out of events to webhook deliveries, in SQL.

Up to a hundred events of one type, transaction and large batch become one message; the sender joins
more of them while they are pending (`darkroom.webhooks.deliveries.claim`). Any other event is a
message of its own.
"""

from typing import Any, Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    Insert,
    Select,
    SQLColumnExpression,
    and_,
    any_,
    case,
    cast,
    func,
    insert,
    literal,
    null,
    select,
    union_all,
)
from sqlalchemy import Text as SqlText
from sqlalchemy.dialects.postgresql import aggregate_order_by, array
from sqlalchemy.orm import Session

from darkroom.db.tables import Batch, Job
from darkroom.db.webhook_tables import Delivery, WebhookEndpoint

LARGE_BATCH: Final = 5000  #: jobs; above, one POST per job would flood the receiver
MAX_EVENTS: Final = 100  #: per message; the body stays below 32 KiB
GROUPING_S: Final = 1.0  #: how long a message of a large batch waits for more events
_COLUMNS: Final = (
    "id",
    "tenant_id",
    "type",
    "batch_id",
    "job_id",
    "endpoint_id",
    "url",
    "event_ids",
    "message_id",
    "next_attempt_at",
)
#: The version digit of a UUID, after its time. It distinguishes a message of one event from the
#: message of many that begins with the same event.
_ONE: Final = "7"
_MANY: Final = "8"


def insert_deliveries(events: CTE, *, of_jobs: bool, of_batches: bool) -> Insert:
    """Return the statement that inserts the deliveries of `events`.

    `of_jobs`, `of_batches`: whether any of them may have a webhook URL of its own.
    """
    sources = [_to_endpoints(events)]
    if of_jobs:
        sources.append(_to_urls(events, Job, and_(events.c.type == any_(Job.webhook_events))))
    if of_batches:
        sources.append(_to_urls(events, Batch, events.c.job_id.is_(None)))
    return insert(Delivery).from_select(_COLUMNS, union_all(*sources))


def insert_test_delivery(
    session: Session, endpoint: WebhookEndpoint, event_id: int, kind: str
) -> str:
    """Insert a delivery to this endpoint, whatever it subscribed to; return its id."""
    return session.scalars(
        insert(Delivery)
        .values(
            id=_delivery_id(),
            tenant_id=endpoint.tenant_id,
            type=kind,
            endpoint_id=endpoint.id,
            event_ids=[event_id],
            message_id=id_of(literal(event_id), func.now()),
        )
        .returning(Delivery.id)
    ).one()


def _to_endpoints(events: CTE) -> Select[*tuple[Any, ...]]:
    """Return one row for each message and endpoint that subscribed to its type."""
    large = and_(events.c.job_id.is_not(None), func.coalesce(Batch.total, 0) > LARGE_BATCH)
    group = (WebhookEndpoint.id, events.c.type, events.c.batch_id)
    position = func.row_number().over(partition_by=group, order_by=events.c.id)
    subscribed = (
        select(
            events,
            WebhookEndpoint.id.label("endpoint"),
            large.label("large"),
            case((large, (position - 1) // MAX_EVENTS), else_=events.c.id).label("message"),
        )
        .join(WebhookEndpoint, WebhookEndpoint.tenant_id == events.c.tenant_id)
        .outerjoin(Batch, Batch.id == events.c.batch_id)
        .where(
            events.c.type == any_(WebhookEndpoint.events),
            WebhookEndpoint.disabled_at.is_(None),
            WebhookEndpoint.deleted_at.is_(None),
        )
        .subquery()
    ).c
    first, large_ = func.min(subscribed.id), subscribed.large
    return select(
        _delivery_id(),
        subscribed.tenant_id,
        subscribed.type,
        subscribed.batch_id,
        case((large_, null()), else_=func.min(subscribed.job_id)),
        subscribed.endpoint,
        cast(null(), SqlText),
        func.array_agg(aggregate_order_by(subscribed.id, subscribed.id)),
        _message_id(first, func.now(), case((large_, _MANY), else_=_ONE)),
        func.now()
        + case((large_, func.make_interval(0, 0, 0, 0, 0, 0, GROUPING_S)), else_=_AT_ONCE),
    ).group_by(
        subscribed.tenant_id,
        subscribed.type,
        subscribed.batch_id,
        subscribed.endpoint,
        large_,
        subscribed.message,
    )


def _to_urls(
    events: CTE, subject: type[Job | Batch], condition: ColumnElement[bool]
) -> Select[*tuple[Any, ...]]:
    """Return one row for each event whose job or batch has a webhook URL for it."""
    subject_id = events.c.job_id if subject is Job else events.c.batch_id
    return (
        select(
            _delivery_id(),
            events.c.tenant_id,
            events.c.type,
            events.c.batch_id,
            events.c.job_id,
            cast(null(), SqlText),
            subject.webhook_url,
            array([events.c.id]),
            id_of(events.c.id, func.now()),
            func.now(),
        )
        .join(subject, subject.id == subject_id)
        .where(subject.webhook_url.is_not(None), condition)
    )


_AT_ONCE: Final = func.make_interval()


def _delivery_id() -> ColumnElement[str]:
    """Return the SQL for `darkroom.ids.new_id("dlv")`: the time, then the rest of a random UUID."""
    random = func.replace(cast(func.gen_random_uuid(), SqlText), "-", "")
    return func.concat("dlv_", _milliseconds(func.clock_timestamp()), "7", func.substr(random, 14))


def _message_id(
    event_id: SQLColumnExpression[int], at: SQLColumnExpression[Any], version: ColumnElement[str]
) -> ColumnElement[str]:
    """Return an id that all receivers share and that does not reveal the number of events."""
    digest = func.substr(func.md5(func.concat("event ", event_id)), 1, 19)
    return func.concat("evt_", _milliseconds(at), version, digest)


def id_of(event_id: SQLColumnExpression[int], at: SQLColumnExpression[Any]) -> ColumnElement[str]:
    """Return the public id of an event and of its own message; `at` is its creation."""
    return _message_id(event_id, at, literal(_ONE))


def _milliseconds(at: SQLColumnExpression[Any]) -> ColumnElement[str]:
    milliseconds = cast(func.extract("epoch", at) * 1000, Delivery.event_ids.type.item_type)
    return func.lpad(func.to_hex(milliseconds), 12, "0")
