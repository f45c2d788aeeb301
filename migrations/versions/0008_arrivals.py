"""Submission counts per tenant for forecasts; pause and drain.

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_SUMS = ("arrived", "arrived_squares")
_INDEXES = (
    ("job_failed", "id", "status = 'failed' AND deleted_at IS NULL"),
    ("job_held", "batch_id", "status = 'queued' AND held"),
)
_MOMENTS = ("counted_since", "counted_at")


def upgrade() -> None:
    for name in _SUMS:
        op.add_column(
            "fair_share",
            sa.Column(name, sa.Float(), server_default="0", nullable=False),
        )
    for name in _MOMENTS:
        op.add_column(
            "fair_share",
            sa.Column(
                name, sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
            ),
        )
    for name, column, which in _INDEXES:
        op.create_index(name, "job", [column], postgresql_where=sa.text(which))
    op.create_table(
        "operation",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("draining_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("operation_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("operation_pk")),
    )
    op.execute("INSERT INTO operation (id) VALUES (1)")


def downgrade() -> None:
    op.drop_table("operation")
    for name, _, _ in _INDEXES:
        op.drop_index(name, table_name="job")
    for name in (*_SUMS, *_MOMENTS):
        op.drop_column("fair_share", name)
