"""Webhooks: endpoints, secrets, deliveries and attempts.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_TEXTS = postgresql.ARRAY(sa.Text())


def _time(name: str, *, nullable: bool = True) -> sa.Column[sa.DateTime]:
    default = None if nullable else sa.text("now()")
    return sa.Column(name, sa.DateTime(timezone=True), server_default=default, nullable=nullable)


def upgrade() -> None:
    op.create_table(
        "webhook_endpoint",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("events", _TEXTS, nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("old_secret", sa.Text()),
        _time("old_secret_until"),
        _time("created_at", nullable=False),
        _time("failing_since"),
        _time("disabled_at"),
        sa.Column("disabled_reason", sa.Text()),
        _time("deleted_at"),
        sa.CheckConstraint(
            "(old_secret IS NULL) = (old_secret_until IS NULL)",
            name=op.f("webhook_endpoint_old_secret_ends"),
        ),
        sa.CheckConstraint(
            "(disabled_at IS NULL) = (disabled_reason IS NULL)",
            name=op.f("webhook_endpoint_disabled_for_reason"),
        ),
        sa.CheckConstraint("cardinality(events) > 0", name=op.f("webhook_endpoint_has_events")),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name=op.f("webhook_endpoint_tenant_id_fk")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("webhook_endpoint_pk")),
    )
    op.create_index(
        "webhook_endpoint_live",
        "webhook_endpoint",
        ["tenant_id", "id"],
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "webhook_secret",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("old_secret", sa.Text()),
        _time("old_secret_until"),
        _time("created_at", nullable=False),
        sa.CheckConstraint(
            "(old_secret IS NULL) = (old_secret_until IS NULL)",
            name=op.f("webhook_secret_old_secret_ends"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name=op.f("webhook_secret_tenant_id_fk")
        ),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("webhook_secret_pk")),
    )
    _create_deliveries()
    _tell_of_more()


def _create_deliveries() -> None:
    op.create_table(
        "delivery",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("endpoint_id", sa.Text()),
        sa.Column("url", sa.Text()),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("event_ids", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("job_id", sa.Text()),
        sa.Column("batch_id", sa.Text()),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("failures", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("claims", sa.Integer(), server_default="0", nullable=False),
        _time("due_at", nullable=False),
        _time("created_at", nullable=False),
        _time("finished_at"),
        sa.CheckConstraint(
            "status IN ('accepted', 'exhausted', 'pending', 'sending')",
            name=op.f("delivery_status_known"),
        ),
        sa.CheckConstraint(
            "(finished_at IS NOT NULL) = (status IN ('accepted', 'exhausted'))",
            name=op.f("delivery_finished_iff_ended"),
        ),
        sa.CheckConstraint(
            "(endpoint_id IS NULL) = (url IS NOT NULL)", name=op.f("delivery_endpoint_or_url")
        ),
        sa.CheckConstraint(
            "cardinality(event_ids) BETWEEN 1 AND 100", name=op.f("delivery_events_of_a_message")
        ),
        sa.CheckConstraint("failures >= 0 AND claims >= 0", name=op.f("delivery_counters")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("delivery_tenant_id_fk")),
        sa.ForeignKeyConstraint(
            ["endpoint_id"], ["webhook_endpoint.id"], name=op.f("delivery_endpoint_id_fk")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("delivery_pk")),
    )
    for name, columns, where in (
        ("delivery_due", ["due_at"], "finished_at IS NULL"),
        ("delivery_endpoint", ["endpoint_id", "id"], None),
        ("delivery_tenant", ["tenant_id", "id"], None),
        ("delivery_job", ["job_id"], "job_id IS NOT NULL"),
        ("delivery_batch", ["batch_id"], "batch_id IS NOT NULL"),
        ("delivery_old", ["finished_at"], "finished_at IS NOT NULL"),
    ):
        op.create_index(
            name, "delivery", columns, postgresql_where=sa.text(where) if where else None
        )
    op.create_table(
        "delivery_attempt",
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        _time("at", nullable=False),
        sa.ForeignKeyConstraint(
            ["delivery_id"],
            ["delivery.id"],
            ondelete="CASCADE",
            name=op.f("delivery_attempt_delivery_id_fk"),
        ),
        sa.PrimaryKeyConstraint("delivery_id", "number", name=op.f("delivery_attempt_pk")),
    )
    # Rows of `delivery` are updated twice an attempt, as those of `job`.
    op.execute(
        "ALTER TABLE delivery SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.01,"
        " autovacuum_vacuum_threshold = 1000)"
    )


def _tell_of_more() -> None:
    """Jobs and batches that name a URL, and events of endpoints."""
    op.add_column("batch", sa.Column("webhook_url", sa.Text()))
    op.add_column("job", sa.Column("webhook_url", sa.Text()))
    op.add_column("job", sa.Column("webhook_events", _TEXTS))
    op.create_index(
        "job_webhook", "job", ["id"], postgresql_where=sa.text("webhook_url IS NOT NULL")
    )
    op.create_check_constraint(
        op.f("job_events_iff_webhook"),
        "job",
        "(webhook_url IS NULL) = (webhook_events IS NULL)",
    )
    op.add_column("event", sa.Column("endpoint_id", sa.Text()))
    op.create_foreign_key(
        op.f("event_endpoint_id_fk"), "event", "webhook_endpoint", ["endpoint_id"], ["id"]
    )
    op.drop_constraint(op.f("event_has_subject"), "event")
    op.create_check_constraint(
        op.f("event_has_subject"), "event", "num_nonnulls(job_id, batch_id, endpoint_id) > 0"
    )


def downgrade() -> None:
    op.execute("DELETE FROM event WHERE job_id IS NULL AND batch_id IS NULL")
    op.drop_constraint(op.f("event_has_subject"), "event")
    op.create_check_constraint(
        op.f("event_has_subject"), "event", "job_id IS NOT NULL OR batch_id IS NOT NULL"
    )
    op.drop_column("event", "endpoint_id")
    op.drop_column("job", "webhook_events")
    op.drop_column("job", "webhook_url")
    op.drop_column("batch", "webhook_url")
    for table in ("delivery_attempt", "delivery", "webhook_secret", "webhook_endpoint"):
        op.drop_table(table)
