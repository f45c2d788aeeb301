"""First tables: tenants, keys, batches, jobs, dispatches, events.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "dispatch",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("microbatch_key", sa.Text(), nullable=False),
        sa.Column("size", sa.SmallInteger(), nullable=False),
        sa.Column("status", sa.Text(), server_default="running", nullable=False),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(finished_at IS NULL) = (status = 'running')",
            name=op.f("dispatch_finished_iff_closed"),
        ),
        sa.CheckConstraint(
            "status IN ('expired', 'finished', 'released', 'running')",
            name=op.f("dispatch_status_known"),
        ),
        sa.CheckConstraint("size >= 1", name=op.f("dispatch_size")),
        sa.PrimaryKeyConstraint("id", name=op.f("dispatch_pk")),
    )
    op.create_index(
        "dispatch_leases",
        "dispatch",
        ["leased_until"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_index(
        "dispatch_worker",
        "dispatch",
        ["worker_id"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_table(
        "tenant",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("tenant_pk")),
    )
    op.create_table(
        "api_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "scopes <@ ARRAY['submit', 'read', 'admin']", name=op.f("api_key_scopes_known")
        ),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("api_key_sha256_is_hex")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("api_key_tenant_id_fk")),
        sa.PrimaryKeyConstraint("id", name=op.f("api_key_pk")),
        sa.UniqueConstraint("sha256", name=op.f("api_key_sha256_key")),
    )
    op.create_table(
        "batch",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("rejected", sa.Integer(), server_default="0", nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("total >= 1 AND rejected >= 0", name=op.f("batch_counts")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("batch_tenant_id_fk")),
        sa.PrimaryKeyConstraint("id", name=op.f("batch_pk")),
    )
    op.create_index(op.f("batch_tenant_id_id"), "batch", ["tenant_id", "id"], unique=False)
    op.create_table(
        "job",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=True),
        sa.Column("row_number", sa.Integer(), nullable=True),
        sa.Column("image_number", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=True),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column(
            "metadata", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False
        ),
        sa.Column("status", sa.Text(), server_default="queued", nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("microbatch_key", sa.Text(), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("setbacks", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column(
            "run_after", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("dispatch_id", sa.BigInteger(), nullable=True),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("negative_prompt", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("num_inference_steps", sa.Integer(), nullable=False),
        sa.Column("guidance_scale", sa.Double(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("output_format", sa.Text(), nullable=False),
        sa.Column("image_key", sa.Text(), nullable=True),
        sa.Column("image_sha256", sa.Text(), nullable=True),
        sa.Column("image_bytes", sa.Integer(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_retryable", sa.Boolean(), nullable=True),
        sa.Column("microbatch_size", sa.SmallInteger(), nullable=True),
        sa.Column("inference_ms", sa.Integer(), nullable=True),
        sa.Column("upload_ms", sa.Integer(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(dispatch_id IS NULL) <= (status <> 'running')", name=op.f("job_running_has_dispatch")
        ),
        sa.CheckConstraint(
            "(error_code IS NOT NULL) = (status = 'failed')", name=op.f("job_error_code_iff")
        ),
        sa.CheckConstraint(
            "(error_message IS NOT NULL) = (status = 'failed')", name=op.f("job_error_message_iff")
        ),
        sa.CheckConstraint(
            "(error_retryable IS NOT NULL) = (status = 'failed')",
            name=op.f("job_error_retryable_iff"),
        ),
        sa.CheckConstraint(
            "(finished_at IS NOT NULL) ="
            " (status IN ('canceled', 'expired', 'failed', 'succeeded'))",
            name=op.f("job_finished_iff_terminal"),
        ),
        sa.CheckConstraint(
            "(image_bytes IS NOT NULL) = (status = 'succeeded')", name=op.f("job_image_bytes_iff")
        ),
        sa.CheckConstraint(
            "(image_key IS NOT NULL) = (status = 'succeeded')", name=op.f("job_image_key_iff")
        ),
        sa.CheckConstraint(
            "(image_sha256 IS NOT NULL) = (status = 'succeeded')", name=op.f("job_image_sha256_iff")
        ),
        sa.CheckConstraint(
            "(status = 'queued') <= (dispatch_id IS NULL)", name=op.f("job_queued_has_no_dispatch")
        ),
        sa.CheckConstraint(
            "output_format IN ('jpeg', 'png', 'webp')", name=op.f("job_output_format_known")
        ),
        sa.CheckConstraint(
            "status IN ('canceled', 'expired', 'failed', 'queued', 'running', 'succeeded')",
            name=op.f("job_status_known"),
        ),
        sa.CheckConstraint(
            "(batch_id IS NULL) = (row_number IS NULL)", name=op.f("job_row_iff_batch")
        ),
        sa.CheckConstraint("attempt >= 0 AND setbacks >= 0", name=op.f("job_counters")),
        sa.CheckConstraint("length(negative_prompt) <= 2000", name=op.f("job_negative_length")),
        sa.CheckConstraint("length(prompt) BETWEEN 1 AND 2000", name=op.f("job_prompt_length")),
        sa.CheckConstraint("priority BETWEEN 0 AND 2", name=op.f("job_priority_range")),
        sa.CheckConstraint("seed BETWEEN 0 AND 9007199254740991", name=op.f("job_seed_range")),
        sa.CheckConstraint(
            "width > 0 AND height > 0 AND num_inference_steps > 0", name=op.f("job_positive_sizes")
        ),
        sa.ForeignKeyConstraint(["batch_id"], ["batch.id"], name=op.f("job_batch_id_fk")),
        sa.ForeignKeyConstraint(["dispatch_id"], ["dispatch.id"], name=op.f("job_dispatch_id_fk")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("job_tenant_id_fk")),
        sa.PrimaryKeyConstraint("id", name=op.f("job_pk")),
    )
    op.create_index(
        "job_batch",
        "job",
        ["batch_id", "row_number", "image_number"],
        unique=True,
        postgresql_where=sa.text("batch_id IS NOT NULL"),
    )
    op.create_index("job_batch_status", "job", ["batch_id", "status"], unique=False)
    op.create_index(
        "job_claim",
        "job",
        ["microbatch_key", "priority", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index(
        "job_next",
        "job",
        ["priority", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index(
        "job_running",
        "job",
        ["dispatch_id"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_index("job_tenant", "job", ["tenant_id", "id"], unique=False)
    op.create_table(
        "event",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("batch_id", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "job_id IS NOT NULL OR batch_id IS NOT NULL", name=op.f("event_has_subject")
        ),
        sa.ForeignKeyConstraint(["batch_id"], ["batch.id"], name=op.f("event_batch_id_fk")),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("event_job_id_fk")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("event_tenant_id_fk")),
        sa.PrimaryKeyConstraint("id", name=op.f("event_pk")),
    )
    op.create_index("event_batch", "event", ["batch_id", "id"], unique=False)
    op.create_index("event_job", "event", ["job_id", "id"], unique=False)

    # Rows of `job` are updated two or three times: leave room on the page, and vacuum early.
    op.execute(
        "ALTER TABLE job SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.01,"
        " autovacuum_vacuum_threshold = 1000)"
    )
    op.execute("ALTER TABLE dispatch SET (fillfactor = 70)")
    op.execute("INSERT INTO tenant (id, name) VALUES ('ten_default', 'default')")


def downgrade() -> None:
    op.drop_index("event_job", table_name="event")
    op.drop_index("event_batch", table_name="event")
    op.drop_table("event")
    op.drop_index("job_tenant", table_name="job")
    op.drop_index("job_running", table_name="job", postgresql_where=sa.text("status = 'running'"))
    op.drop_index("job_next", table_name="job", postgresql_where=sa.text("status = 'queued'"))
    op.drop_index("job_claim", table_name="job", postgresql_where=sa.text("status = 'queued'"))
    op.drop_index("job_batch_status", table_name="job")
    op.drop_index("job_batch", table_name="job", postgresql_where=sa.text("batch_id IS NOT NULL"))
    op.drop_table("job")
    op.drop_index(op.f("batch_tenant_id_id"), table_name="batch")
    op.drop_table("batch")
    op.drop_table("api_key")
    op.drop_table("tenant")
    op.drop_index(
        "dispatch_worker", table_name="dispatch", postgresql_where=sa.text("status = 'running'")
    )
    op.drop_index(
        "dispatch_leases", table_name="dispatch", postgresql_where=sa.text("status = 'running'")
    )
    op.drop_table("dispatch")
