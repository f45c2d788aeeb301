"""Delivery log: the deliveries of a tenant, their attempts, and replays."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import ColumnElement, Update, and_, any_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from darkroom.db.tables import Event, Job
from darkroom.db.webhook_tables import Delivery, DeliveryAttempt, WebhookEndpoint
from darkroom.errors import NotFound
from darkroom.ids import is_id
from darkroom.status import DeliveryStatus
from darkroom.webhooks.endpoints import EndpointDisabled

RETENTION: Final = timedelta(days=30)  #: after a delivery finished
_DELETE_BATCH: Final = 5000


@dataclass(frozen=True)
class DeliveryFilter:
    """Conditions that a listed delivery meets; None matches all."""

    endpoint_id: str | None = None
    job_id: str | None = None
    batch_id: str | None = None
    status: DeliveryStatus | None = None


def page(
    session: Session,
    tenant_id: str,
    filters: DeliveryFilter,
    *,
    limit: int,
    after: str | None = None,
) -> Sequence[Delivery]:
    """Return one page of deliveries, newest first, after the id `after`."""
    query = select(Delivery).where(Delivery.tenant_id == tenant_id)
    if filters.job_id is not None:
        query = query.where(_mentions_job(filters.job_id))
    for column, wanted in (
        (Delivery.endpoint_id, filters.endpoint_id),
        (Delivery.batch_id, filters.batch_id),
        (Delivery.status, filters.status),
    ):
        if wanted is not None:
            query = query.where(column == wanted)
    if after is not None:
        query = query.where(Delivery.id < after)
    return session.scalars(query.order_by(Delivery.id.desc()).limit(limit)).all()


def _mentions_job(job_id: str) -> ColumnElement[bool]:
    """Match deliveries of the job alone, and lists of a large batch that contain it."""
    batch_id = select(Job.batch_id).where(Job.id == job_id).scalar_subquery()
    events = select(Event.id).where(Event.job_id == job_id, Event.id == any_(Delivery.event_ids))
    return or_(
        Delivery.job_id == job_id,
        and_(Delivery.batch_id == batch_id, Delivery.job_id.is_(None), events.exists()),
    )


def find(session: Session, tenant_id: str, delivery_id: str) -> Delivery:
    """Return the tenant's delivery. Raise NotFound, also if it is another tenant's."""
    query = select(Delivery).where(Delivery.tenant_id == tenant_id, Delivery.id == delivery_id)
    delivery = session.scalar(query) if is_id("dlv", delivery_id) else None
    if delivery is None:
        raise NotFound("delivery", delivery_id)
    return delivery


def attempts(
    session: Session, deliveries: Sequence[Delivery]
) -> dict[str, Sequence[DeliveryAttempt]]:
    """Return the attempts of each delivery, in order, by delivery id."""
    rows = session.scalars(
        select(DeliveryAttempt)
        .where(DeliveryAttempt.delivery_id.in_([each.id for each in deliveries]))
        .order_by(DeliveryAttempt.number)
    ).all()
    by_delivery: dict[str, list[DeliveryAttempt]] = {each.id: [] for each in deliveries}
    for row in rows:
        by_delivery[row.delivery_id].append(row)
    return dict(by_delivery)


def replay(session: Session, tenant_id: str, delivery_id: str) -> Delivery:
    """Send a delivery again under the same message id; its attempts stay in the log.

    A pending delivery becomes due at once; one that is being sent is left alone. Raise NotFound, or
    EndpointDisabled when its endpoint is disabled or deleted.
    """
    delivery = find(session, tenant_id, delivery_id)
    sendable = select(Delivery.id).where(Delivery.id == delivery.id, _is_sendable())
    if session.scalar(sendable) is None:
        raise EndpointDisabled("its webhook endpoint is disabled or deleted; enable it first")
    idle = and_(Delivery.id == delivery.id, Delivery.status != DeliveryStatus.SENDING)
    return session.scalar(_send_again(idle).returning(Delivery)) or delivery


def replay_failed(
    session: Session, tenant_id: str, *, since: datetime, endpoint_id: str | None = None
) -> int:
    """Send all sendable deliveries again that were exhausted since then; return how many."""
    failed = [
        Delivery.tenant_id == tenant_id,
        Delivery.status == DeliveryStatus.EXHAUSTED,
        Delivery.finished_at >= since,
        _is_sendable(),
    ]
    if endpoint_id is not None:
        failed.append(Delivery.endpoint_id == endpoint_id)
    return len(session.scalars(_send_again(and_(*failed)).returning(Delivery.id)).all())


def _is_sendable() -> ColumnElement[bool]:
    """Match deliveries to a URL of a job or batch, or to an enabled endpoint."""
    enabled = select(WebhookEndpoint.id).where(
        WebhookEndpoint.id == Delivery.endpoint_id,
        WebhookEndpoint.disabled_at.is_(None),
        WebhookEndpoint.deleted_at.is_(None),
    )
    return or_(Delivery.endpoint_id.is_(None), enabled.exists())


def _send_again(condition: ColumnElement[bool]) -> Update:
    return (
        update(Delivery)
        .where(condition)
        .values(
            status=DeliveryStatus.PENDING, failures=0, next_attempt_at=func.now(), finished_at=None
        )
        .execution_options(populate_existing=True)
    )


def delete_expired(session: Session) -> None:
    """Delete up to 5,000 deliveries that finished more than 30 days ago."""
    expired = (
        select(Delivery.id)
        .where(Delivery.finished_at < func.now() - RETENTION)
        .limit(_DELETE_BATCH)
        .with_for_update(skip_locked=True)
    )
    session.execute(delete(Delivery).where(Delivery.id.in_(expired.scalar_subquery())))
