"""From events to deliveries: who asked to be told, and in how many messages. SQL alone.

Of a large batch, up to a hundred alike events of one transaction become one message; the sender
joins more of them while they wait (`darkroom.deliveries.claim`). All others stand alone.
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

LARGE_BATCH: Final = 5000  #: jobs; above, a POST for each would drown its receiver
MAX_EVENTS: Final = 100  #: of one message; the body stays below 32 KiB
GROUPING_S: Final = 1.0  #: how long the message of a large batch waits for company
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
#: The digit after the time in a UUID: its version. It sets apart a message of one event from the
#: message of many that begins with the same event.
_ONE: Final = "7"
_MANY: Final = "8"


def insert_deliveries(noted: CTE, *, of_jobs: bool, of_batches: bool) -> Insert:
    """The statement that makes the deliveries of the events in `noted`.

    `of_jobs`, `of_batches`: whether any of them may have named a URL of its own.
    """
    told = [_to_endpoints(noted)]
    if of_jobs:
        told.append(_to_urls(noted, Job, and_(noted.c.type == any_(Job.webhook_events))))
    if of_batches:
        told.append(_to_urls(noted, Batch, noted.c.job_id.is_(None)))
    return insert(Delivery).from_select(_COLUMNS, union_all(*told))


def insert_test_delivery(
    session: Session, endpoint: WebhookEndpoint, event_id: int, kind: str
) -> str:
    """Deliver the event to this endpoint, whatever it subscribed to; the delivery's id."""
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


def _to_endpoints(noted: CTE) -> Select[*tuple[Any, ...]]:
    """One row for each message and endpoint that subscribed to its type."""
    large = and_(noted.c.job_id.is_not(None), func.coalesce(Batch.total, 0) > LARGE_BATCH)
    alike = (WebhookEndpoint.id, noted.c.type, noted.c.batch_id)
    place = func.row_number().over(partition_by=alike, order_by=noted.c.id)
    wanted = (
        select(
            noted,
            WebhookEndpoint.id.label("endpoint"),
            large.label("large"),
            case((large, (place - 1) // MAX_EVENTS), else_=noted.c.id).label("message"),
        )
        .join(WebhookEndpoint, WebhookEndpoint.tenant_id == noted.c.tenant_id)
        .outerjoin(Batch, Batch.id == noted.c.batch_id)
        .where(
            noted.c.type == any_(WebhookEndpoint.events),
            WebhookEndpoint.disabled_at.is_(None),
            WebhookEndpoint.deleted_at.is_(None),
        )
        .subquery()
    ).c
    first, large_ = func.min(wanted.id), wanted.large
    return select(
        _delivery_id(),
        wanted.tenant_id,
        wanted.type,
        wanted.batch_id,
        case((large_, null()), else_=func.min(wanted.job_id)),
        wanted.endpoint,
        cast(null(), SqlText),
        func.array_agg(aggregate_order_by(wanted.id, wanted.id)),
        _message_id(first, func.now(), case((large_, _MANY), else_=_ONE)),
        func.now()
        + case((large_, func.make_interval(0, 0, 0, 0, 0, 0, GROUPING_S)), else_=_AT_ONCE),
    ).group_by(
        wanted.tenant_id, wanted.type, wanted.batch_id, wanted.endpoint, large_, wanted.message
    )


def _to_urls(
    noted: CTE, subject: type[Job | Batch], wanted: ColumnElement[bool]
) -> Select[*tuple[Any, ...]]:
    """One row for each event whose job or batch named a URL for it."""
    subject_id = noted.c.job_id if subject is Job else noted.c.batch_id
    return (
        select(
            _delivery_id(),
            noted.c.tenant_id,
            noted.c.type,
            noted.c.batch_id,
            noted.c.job_id,
            cast(null(), SqlText),
            subject.webhook_url,
            array([noted.c.id]),
            id_of(noted.c.id, func.now()),
            func.now(),
        )
        .join(subject, subject.id == subject_id)
        .where(subject.webhook_url.is_not(None), wanted)
    )


_AT_ONCE: Final = func.make_interval()


def _delivery_id() -> ColumnElement[str]:
    """As `darkroom.ids.new_id("dlv")`, in SQL: the time, then a random UUID's rest."""
    random = func.replace(cast(func.gen_random_uuid(), SqlText), "-", "")
    return func.concat("dlv_", _milliseconds(func.clock_timestamp()), "7", func.substr(random, 14))


def _message_id(
    event_id: SQLColumnExpression[int], at: SQLColumnExpression[Any], version: ColumnElement[str]
) -> ColumnElement[str]:
    """The same for all who are told of the event; its digits say nothing of how many there are."""
    digest = func.substr(func.md5(func.concat("event ", event_id)), 1, 19)
    return func.concat("evt_", _milliseconds(at), version, digest)


def id_of(event_id: SQLColumnExpression[int], at: SQLColumnExpression[Any]) -> ColumnElement[str]:
    """The public id of an event, and of the message that tells of it alone; `at`: its creation."""
    return _message_id(event_id, at, literal(_ONE))


def _milliseconds(at: SQLColumnExpression[Any]) -> ColumnElement[str]:
    milliseconds = cast(func.extract("epoch", at) * 1000, Delivery.event_ids.type.item_type)
    return func.lpad(func.to_hex(milliseconds), 12, "0")
