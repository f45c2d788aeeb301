"""What became of webhooks: the deliveries of a tenant, their attempts, and sending them anew."""

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

KEPT: Final = timedelta(days=30)  #: after its end
_DELETED_AT_ONCE: Final = 5000


@dataclass(frozen=True)
class DeliveryFilter:
    """Of a tenant's deliveries, those that all of these are true of."""

    endpoint_id: str | None = None
    job_id: str | None = None
    batch_id: str | None = None
    status: DeliveryStatus | None = None


def page(
    session: Session, tenant_id: str, which: DeliveryFilter, *, limit: int, after: str | None = None
) -> Sequence[Delivery]:
    """Newest first; `after` is the last id already seen."""
    theirs = select(Delivery).where(Delivery.tenant_id == tenant_id)
    if which.job_id is not None:
        theirs = theirs.where(_of_job(which.job_id))
    for column, wanted in (
        (Delivery.endpoint_id, which.endpoint_id),
        (Delivery.batch_id, which.batch_id),
        (Delivery.status, which.status),
    ):
        if wanted is not None:
            theirs = theirs.where(column == wanted)
    if after is not None:
        theirs = theirs.where(Delivery.id < after)
    return session.scalars(theirs.order_by(Delivery.id.desc()).limit(limit)).all()


def _of_job(job_id: str) -> ColumnElement[bool]:
    """Its own deliveries, and those of its large batch that tell of it among others."""
    batch_id = select(Job.batch_id).where(Job.id == job_id).scalar_subquery()
    among = select(Event.id).where(Event.job_id == job_id, Event.id == any_(Delivery.event_ids))
    return or_(
        Delivery.job_id == job_id,
        and_(Delivery.batch_id == batch_id, Delivery.job_id.is_(None), among.exists()),
    )


def find(session: Session, tenant_id: str, delivery_id: str) -> Delivery:
    """The tenant's delivery. Raises NotFound, also for another tenant's."""
    theirs = select(Delivery).where(Delivery.tenant_id == tenant_id, Delivery.id == delivery_id)
    delivery = session.scalar(theirs) if is_id("dlv", delivery_id) else None
    if delivery is None:
        raise NotFound("delivery", delivery_id)
    return delivery


def attempts(
    session: Session, deliveries: Sequence[Delivery]
) -> dict[str, Sequence[DeliveryAttempt]]:
    """The attempts of each delivery, in order."""
    rows = session.scalars(
        select(DeliveryAttempt)
        .where(DeliveryAttempt.delivery_id.in_([each.id for each in deliveries]))
        .order_by(DeliveryAttempt.number)
    ).all()
    made: dict[str, list[DeliveryAttempt]] = {each.id: [] for each in deliveries}
    for row in rows:
        made[row.delivery_id].append(row)
    return dict(made)


def replay(session: Session, tenant_id: str, delivery_id: str) -> Delivery:
    """Send it anew under the same message id, with all its attempts before it.

    One that waits is tried at once; one that is being sent is left alone. Raises NotFound, and
    EndpointDisabled when its webhook is called no more.
    """
    delivery = find(session, tenant_id, delivery_id)
    callable_ = select(Delivery.id).where(Delivery.id == delivery.id, _may_be_sent())
    if session.scalar(callable_) is None:
        raise EndpointDisabled("its webhook is disabled or deleted; enable it first")
    idle = and_(Delivery.id == delivery.id, Delivery.status != DeliveryStatus.SENDING)
    return session.scalar(_send_again(idle).returning(Delivery)) or delivery


def replay_failed(
    session: Session, tenant_id: str, *, since: datetime, endpoint_id: str | None = None
) -> int:
    """Send anew all that ended exhausted since then and may be sent; how many."""
    failed = [
        Delivery.tenant_id == tenant_id,
        Delivery.status == DeliveryStatus.EXHAUSTED,
        Delivery.finished_at >= since,
        _may_be_sent(),
    ]
    if endpoint_id is not None:
        failed.append(Delivery.endpoint_id == endpoint_id)
    return len(session.scalars(_send_again(and_(*failed)).returning(Delivery.id)).all())


def _may_be_sent() -> ColumnElement[bool]:
    """To a URL of its own, or to an endpoint that is called."""
    called = select(WebhookEndpoint.id).where(
        WebhookEndpoint.id == Delivery.endpoint_id,
        WebhookEndpoint.disabled_at.is_(None),
        WebhookEndpoint.deleted_at.is_(None),
    )
    return or_(Delivery.endpoint_id.is_(None), called.exists())


def _send_again(which: ColumnElement[bool]) -> Update:
    return (
        update(Delivery)
        .where(which)
        .values(
            status=DeliveryStatus.PENDING, failures=0, next_attempt_at=func.now(), finished_at=None
        )
        .execution_options(populate_existing=True)
    )


def delete_old(session: Session) -> None:
    """Drop what ended a month ago, a part at a time."""
    old = (
        select(Delivery.id)
        .where(Delivery.finished_at < func.now() - KEPT)
        .limit(_DELETED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    session.execute(delete(Delivery).where(Delivery.id.in_(old.scalar_subquery())))
