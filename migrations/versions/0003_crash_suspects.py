"""Isolation of crash suspects, and dispatches that crashed.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_QUEUED = sa.text("status = 'queued'")


def upgrade() -> None:
    op.add_column("job", sa.Column("isolation", sa.Text(), server_default="", nullable=False))
    op.drop_index("job_claim", table_name="job")
    op.create_index(
        "job_claim",
        "job",
        ["microbatch_key", "isolation", "priority", "id"],
        postgresql_where=_QUEUED,
    )
    op.drop_constraint(op.f("dispatch_status_known"), "dispatch")
    op.create_check_constraint(
        op.f("dispatch_status_known"),
        "dispatch",
        "status IN ('crashed', 'expired', 'finished', 'released', 'running')",
    )


def downgrade() -> None:
    op.execute("UPDATE dispatch SET status = 'expired' WHERE status = 'crashed'")
    op.drop_constraint(op.f("dispatch_status_known"), "dispatch")
    op.create_check_constraint(
        op.f("dispatch_status_known"),
        "dispatch",
        "status IN ('expired', 'finished', 'released', 'running')",
    )
    op.drop_index("job_claim", table_name="job")
    op.create_index(
        "job_claim", "job", ["microbatch_key", "priority", "id"], postgresql_where=_QUEUED
    )
    op.drop_column("job", "isolation")
