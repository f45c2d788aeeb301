"""Tables. CHECK constraints enforce facts that must agree."""

from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    SmallInteger,
    Text,
    TextClause,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from darkroom.generation.params import MAX_PROMPT_CHARS, MAX_SEED
from darkroom.status import FINISHED, PRIORITY_RANK, DispatchStatus, OutputFormat, Status

DEFAULT_TENANT: Final = "ten_default"  #: owner of everything while authentication is off

#: claimable rows; the indexes that a claim reads cover only them
_WAITING: Final = text("status = 'queued' AND NOT paused")


class Base(DeclarativeBase):
    """Base of all tables; constraint names follow one convention, which migrations use."""

    metadata = MetaData(
        naming_convention={
            "ix": "%(table_name)s_%(column_0_N_name)s",
            "ck": "%(table_name)s_%(constraint_name)s",
            "fk": "%(table_name)s_%(column_0_N_name)s_fk",
            "pk": "%(table_name)s_pk",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
        }
    )
    type_annotation_map = {  # noqa: RUF012  # SQLAlchemy reads it from the class
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        dict[str, str]: JSONB,
        list[str]: ARRAY(Text),
    }


def _one_of(column: str, values: object) -> str:
    """Return `column IN (…)` over an enum's members."""
    listed = ", ".join(f"'{value}'" for value in sorted(values))  # type: ignore[call-overload]
    return f"{column} IN ({listed})"


def _given(column: str) -> TextClause:
    return text(f"{column} IS NOT NULL")


def _created_at() -> Mapped[datetime]:
    return mapped_column(server_default=func.now())


class Tenant(Base):
    """Owner of keys, batches and jobs; every query of a client is restricted to one."""

    __tablename__ = "tenant"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    #: share of the machine while several tenants wait; 2 gets twice what 1 gets
    weight: Mapped[float] = mapped_column(server_default="1")
    #: days until its images and prompts are deleted; null: the installation's setting
    retention_days: Mapped[int | None]
    created_at: Mapped[datetime] = _created_at()

    __table_args__ = (
        CheckConstraint("weight > 0 AND weight <= 1000", "weight_range"),
        CheckConstraint("retention_days >= 1", "retention"),
    )


class ApiKey(Base):
    """Bearer key, stored as its SHA-256 and a prefix by which a list shows it."""

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"))
    prefix: Mapped[str]
    sha256: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = _created_at()
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint("length(sha256) = 64", "sha256_is_hex"),
        CheckConstraint("scopes <@ ARRAY['submit', 'read', 'admin']", "scopes_known"),
    )


class Batch(Base):
    """Submission of many jobs. Counts are not stored but counted from the jobs."""

    __tablename__ = "batch"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"))
    label: Mapped[str | None]
    total: Mapped[int]
    rejected: Mapped[int] = mapped_column(server_default="0")
    #: days until its images and prompts are deleted; null: the tenant's
    retention_days: Mapped[int | None]
    deleted_at: Mapped[datetime | None]  #: all of its jobs are tombstones
    created_at: Mapped[datetime] = _created_at()
    #: when its last job finished; set once, in the transaction that finished that job
    finished_at: Mapped[datetime | None]
    paused_at: Mapped[datetime | None]  #: its queued jobs are not claimed until it is resumed
    canceled_at: Mapped[datetime | None]  #: its running jobs are canceled by their workers
    #: the batch whose failed jobs these repeat
    retried_from: Mapped[str | None] = mapped_column(ForeignKey("batch.id"))
    webhook_url: Mapped[str | None]  #: receives an event when the batch finishes

    __table_args__ = (
        CheckConstraint("total >= 1 AND rejected >= 0", "counts"),
        CheckConstraint("retention_days >= 1", "retention"),
        Index("batch_kept", "finished_at", postgresql_where=text("deleted_at IS NULL")),
        Index("batch_retried_from", "retried_from", postgresql_where=_given("retried_from")),
        Index(None, "tenant_id", "id"),
    )


class RejectedRowChunk(Base):
    """Chunk of a batch's errors.csv, see `darkroom.imports.rejected_rows`."""

    __tablename__ = "rejected_row_chunk"

    batch_id: Mapped[str] = mapped_column(ForeignKey("batch.id"), primary_key=True)
    piece: Mapped[int] = mapped_column(primary_key=True)
    csv: Mapped[bytes]


class Dispatch(Base):
    """Claim of a microbatch with its lease; its id is the fencing token of every later write."""

    __tablename__ = "dispatch"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    worker_id: Mapped[str]
    microbatch_key: Mapped[str]
    size: Mapped[int] = mapped_column(SmallInteger)
    cost: Mapped[float]  #: sum of its jobs', see `params.cost`
    status: Mapped[str] = mapped_column(server_default=DispatchStatus.RUNNING)
    leased_until: Mapped[datetime]  #: by the database's clock
    created_at: Mapped[datetime] = _created_at()
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(_one_of("status", DispatchStatus), "status_known"),
        CheckConstraint("size >= 1", "size"),
        CheckConstraint("(finished_at IS NULL) = (status = 'running')", "finished_iff_closed"),
        Index("dispatch_leases", "leased_until", postgresql_where=text("status = 'running'")),
        Index(
            "dispatch_worker",
            "worker_id",
            postgresql_where=text("status IN ('expired', 'running')"),
        ),
    )


class Job(Base):
    """One prompt and its image. While it is `queued`, the row itself is the queue entry."""

    __tablename__ = "job"

    id: Mapped[str] = mapped_column(primary_key=True)
    # No foreign keys: their checks per row were a third of the server's cost of a file. Triggers
    # check once per statement that the two exist (decision 19).
    tenant_id: Mapped[str]
    batch_id: Mapped[str | None]
    row_number: Mapped[int | None]  #: in the batch's file; its first row of values is 1
    image_number: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    custom_id: Mapped[str | None]
    label: Mapped[str | None]
    metadata_: Mapped[dict[str, str]] = mapped_column("metadata", server_default="{}")

    status: Mapped[str] = mapped_column(server_default=Status.QUEUED)
    priority: Mapped[int] = mapped_column(SmallInteger)
    microbatch_key: Mapped[str]
    #: jobs share a microbatch only within a group; set after a crash, see `dispatches.crash`
    isolation_group: Mapped[str] = mapped_column(server_default="")
    #: claims that count: finished ones, and crashes that this job may have caused
    attempt: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    #: how often it was requeued for a fault that was not its own; decides the backoff
    requeue_count: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    scheduled_at: Mapped[datetime] = _created_at()  #: not claimed before
    dispatch_id: Mapped[int | None] = mapped_column(ForeignKey("dispatch.id"))

    cost: Mapped[float]  #: see `params.cost`
    start_tag: Mapped[float]  #: its place among the queued jobs of its priority, see `fairness`
    paused: Mapped[bool] = mapped_column(server_default=false())  #: its batch is paused
    expires_at: Mapped[datetime | None]  #: it must have started by then
    deadline_at: Mapped[datetime | None]  #: it must have finished by then
    cancel_requested_at: Mapped[datetime | None]  #: while running: settled as canceled or expired
    retried_from: Mapped[str | None] = mapped_column(ForeignKey("job.id"))
    deleted_at: Mapped[datetime | None]  #: the row is a tombstone without client data

    prompt: Mapped[str]
    negative_prompt: Mapped[str]
    model: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    num_inference_steps: Mapped[int]
    guidance_scale: Mapped[float]
    seed: Mapped[int] = mapped_column(BigInteger)
    output_format: Mapped[str]

    image_key: Mapped[str | None]
    image_sha256: Mapped[str | None]
    image_bytes: Mapped[int | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_retryable: Mapped[bool | None]
    microbatch_size: Mapped[int | None] = mapped_column(SmallInteger)
    inference_ms: Mapped[int | None]
    upload_ms: Mapped[int | None]
    webhook_url: Mapped[str | None]
    webhook_events: Mapped[list[str] | None]  #: event types for that URL

    created_at: Mapped[datetime] = _created_at()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(_one_of("status", Status), "status_known"),
        CheckConstraint(
            f"(finished_at IS NOT NULL) = ({_one_of('status', FINISHED)})", "finished_iff_terminal"
        ),
        CheckConstraint("(dispatch_id IS NULL) <= (status <> 'running')", "running_has_dispatch"),
        CheckConstraint("(status = 'queued') <= (dispatch_id IS NULL)", "queued_has_no_dispatch"),
        *(
            CheckConstraint(f"({column} IS NOT NULL) = (status = 'succeeded')", f"{column}_iff")
            for column in ("image_sha256", "image_bytes")
        ),
        CheckConstraint("(image_key IS NOT NULL) <= (status = 'succeeded')", "image_key_if"),
        CheckConstraint(
            "(status = 'succeeded' AND deleted_at IS NULL) <= (image_key IS NOT NULL)",
            "image_key_until_deleted",
        ),
        *(
            CheckConstraint(f"({column} IS NOT NULL) = (status = 'failed')", f"{column}_iff")
            for column in ("error_code", "error_message", "error_retryable")
        ),
        CheckConstraint("(batch_id IS NULL) = (row_number IS NULL)", "row_iff_batch"),
        CheckConstraint(f"length(prompt) <= {MAX_PROMPT_CHARS}", "prompt_length"),
        CheckConstraint("(length(prompt) = 0) = (deleted_at IS NOT NULL)", "prompt_until_deleted"),
        CheckConstraint("(deleted_at IS NOT NULL) <= (finished_at IS NOT NULL)", "deleted_is_over"),
        CheckConstraint(
            "(cancel_requested_at IS NOT NULL) <= (status <> 'queued')", "asked_to_end"
        ),
        CheckConstraint("paused <= (status = 'queued')", "paused_is_queued"),
        CheckConstraint("cost > 0", "cost_positive"),
        CheckConstraint(f"length(negative_prompt) <= {MAX_PROMPT_CHARS}", "negative_length"),
        CheckConstraint("width > 0 AND height > 0 AND num_inference_steps > 0", "positive_sizes"),
        CheckConstraint(f"seed BETWEEN 0 AND {MAX_SEED}", "seed_range"),
        CheckConstraint(_one_of("output_format", OutputFormat), "output_format_known"),
        CheckConstraint(f"priority BETWEEN 0 AND {len(PRIORITY_RANK) - 1}", "priority_range"),
        CheckConstraint("attempt >= 0 AND requeue_count >= 0", "counters"),
        CheckConstraint("(webhook_url IS NULL) = (webhook_events IS NULL)", "events_iff_webhook"),
        Index("job_next", "priority", "start_tag", "id", postgresql_where=_WAITING),
        Index(
            "job_claim",
            "microbatch_key",
            "isolation_group",
            "priority",
            "start_tag",
            "id",
            postgresql_where=_WAITING,
        ),
        Index(
            "job_expiry",
            "expires_at",
            postgresql_where=text("status = 'queued' AND expires_at IS NOT NULL"),
        ),
        Index(
            "job_retried_from",
            "retried_from",
            unique=True,
            postgresql_where=_given("retried_from"),
        ),
        Index(
            "job_unswept",
            "deleted_at",
            postgresql_where=text("deleted_at IS NOT NULL AND image_key IS NOT NULL"),
        ),
        Index(
            "job_kept_alone",
            "finished_at",
            postgresql_where=text(
                "batch_id IS NULL AND finished_at IS NOT NULL AND deleted_at IS NULL"
            ),
        ),
        Index(
            "job_failed", "id", postgresql_where=text("status = 'failed' AND deleted_at IS NULL")
        ),
        Index("job_paused", "batch_id", postgresql_where=text("status = 'queued' AND paused")),
        Index("job_running", "dispatch_id", postgresql_where=text("status = 'running'")),
        Index(
            "job_batch",
            "batch_id",
            "row_number",
            "image_number",
            unique=True,
            postgresql_where=text("batch_id IS NOT NULL"),
        ),
        Index("job_batch_status", "batch_id", "status"),
        Index("job_tenant", "tenant_id", "id"),
        Index("job_webhook", "id", postgresql_where=_given("webhook_url")),
    )


class FairShare(Base):
    """Virtual time of a tenant in one priority; see `darkroom.queue.fairness`."""

    __tablename__ = "fair_share"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"), primary_key=True)
    priority: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    next_start_tag: Mapped[float]
    #: sum of submitted costs, and of squared costs per submission; both decay
    arrived: Mapped[float] = mapped_column(server_default="0")
    arrived_squares: Mapped[float] = mapped_column(server_default="0")
    counted_since: Mapped[datetime] = _created_at()
    counted_at: Mapped[datetime] = _created_at()  #: up to when they have decayed


class PriorityClass(Base):
    """Service record of a priority class; see `darkroom.queue.fairness`."""

    __tablename__ = "priority_class"

    priority: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    virtual_time: Mapped[float] = mapped_column(server_default="0")  #: the last tag claimed
    waiting_since: Mapped[datetime | None]  #: null while no job of this class is queued


class QueueControl(Base):
    """Pause and drain, one row; see `darkroom.queue.control`."""

    __tablename__ = "queue_control"

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    paused_at: Mapped[datetime | None]  #: nothing is claimed
    draining_at: Mapped[datetime | None]  #: nothing new is accepted

    __table_args__ = (CheckConstraint("id = 1", "one_row"),)


class IdempotencyKey(Base):
    """First response to a request that a client may repeat."""

    __tablename__ = "idempotency_key"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    response: Mapped[str]
    created_at: Mapped[datetime] = _created_at()

    __table_args__ = (
        CheckConstraint("length(key) BETWEEN 1 AND 255", "key_length"),
        Index("idempotency_key_age", "created_at"),
    )


class Event(Base):
    """Event, written in the transaction of the change."""

    __tablename__ = "event"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"))
    type: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("job.id"))
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batch.id"))
    endpoint_id: Mapped[str | None] = mapped_column(ForeignKey("webhook_endpoint.id"))
    created_at: Mapped[datetime] = _created_at()

    __table_args__ = (
        CheckConstraint("num_nonnulls(job_id, batch_id, endpoint_id) > 0", "has_subject"),
        Index("event_job", "job_id", "id"),
        Index("event_batch", "batch_id", "id"),
    )
