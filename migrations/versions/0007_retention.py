"""Indexes that find jobs due for deletion.

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "batch_kept", "batch", ["finished_at"], postgresql_where=sa.text("deleted_at IS NULL")
    )
    op.create_index(
        "job_kept_alone",
        "job",
        ["finished_at"],
        postgresql_where=sa.text(
            "batch_id IS NULL AND finished_at IS NOT NULL AND deleted_at IS NULL"
        ),
    )


def downgrade() -> None:
    op.drop_index("job_kept_alone", table_name="job")
    op.drop_index("batch_kept", table_name="batch")
    op.drop_column("batch", "deleted_at")
