"""Tables of webhooks: endpoints, secrets, deliveries, attempts."""

from datetime import datetime
from typing import Final

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, SmallInteger, func, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from darkroom.db.tables import Base
from darkroom.status import DeliveryStatus

_STATUSES: Final = ", ".join(f"'{status}'" for status in sorted(DeliveryStatus))


class WebhookEndpoint(Base):
    """URL that receives a tenant's events of certain types."""

    __tablename__ = "webhook_endpoint"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"))
    url: Mapped[str]
    events: Mapped[list[str]]
    secret: Mapped[str]  #: encrypted, see darkroom.webhooks.secret_box
    old_secret: Mapped[str | None]  #: also signs until `old_secret_until`
    old_secret_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    failing_since: Mapped[datetime | None]  #: of its first failure after its last success
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    deleted_at: Mapped[datetime | None]  #: its deliveries are still in the log

    __table_args__ = (
        CheckConstraint("(old_secret IS NULL) = (old_secret_until IS NULL)", "old_secret_ends"),
        CheckConstraint("(disabled_at IS NULL) = (disabled_reason IS NULL)", "disabled_for_reason"),
        CheckConstraint("cardinality(events) > 0", "has_events"),
        Index(
            "webhook_endpoint_live", "tenant_id", "id", postgresql_where=text("deleted_at IS NULL")
        ),
    )


class WebhookSecret(Base):
    """Secret that signs a tenant's webhooks to URLs of single jobs and batches."""

    __tablename__ = "webhook_secret"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"), primary_key=True)
    secret: Mapped[str]
    old_secret: Mapped[str | None]
    old_secret_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint("(old_secret IS NULL) = (old_secret_until IS NULL)", "old_secret_ends"),
    )


class Delivery(Base):
    """Message to one URL, over all its attempts. Until it finishes, the row is the queue entry.

    A message carries one event, or up to a hundred of one type and large batch.
    """

    __tablename__ = "delivery"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"))
    endpoint_id: Mapped[str | None] = mapped_column(ForeignKey("webhook_endpoint.id"))
    url: Mapped[str | None]  #: of a single job or batch, if there is no endpoint
    message_id: Mapped[str]  #: the header `webhook-id`: the same over all attempts and replays
    type: Mapped[str]
    event_ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    job_id: Mapped[str | None]
    batch_id: Mapped[str | None]

    status: Mapped[str] = mapped_column(server_default=DeliveryStatus.PENDING)
    #: failures since it was created or replayed; decides the next attempt
    failures: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    attempt_token: Mapped[int] = mapped_column(server_default="0")  #: fencing token of each write
    #: by the database's clock; while `sending`, the end of the sender's lease
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(f"status IN ({_STATUSES})", "status_known"),
        CheckConstraint(
            "(finished_at IS NOT NULL) = (status IN ('accepted', 'exhausted'))",
            "finished_iff_ended",
        ),
        CheckConstraint("(endpoint_id IS NULL) = (url IS NOT NULL)", "endpoint_or_url"),
        CheckConstraint("cardinality(event_ids) BETWEEN 1 AND 100", "events_of_a_message"),
        CheckConstraint("failures >= 0 AND attempt_token >= 0", "counters"),
        Index(
            "delivery_next_attempt", "next_attempt_at", postgresql_where=text("finished_at IS NULL")
        ),
        Index("delivery_endpoint", "endpoint_id", "id"),
        Index("delivery_tenant", "tenant_id", "id"),
        Index("delivery_job", "job_id", postgresql_where=text("job_id IS NOT NULL")),
        Index("delivery_batch", "batch_id", postgresql_where=text("batch_id IS NOT NULL")),
        Index("delivery_old", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
    )


class DeliveryAttempt(Base):
    """One POST and its outcome, without details that would map a network for a tenant."""

    __tablename__ = "delivery_attempt"

    delivery_id: Mapped[str] = mapped_column(
        ForeignKey("delivery.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    outcome: Mapped[str]
    at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (Index("delivery_attempt_at", "at"),)  #: counted for /metrics by time
