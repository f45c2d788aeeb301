"""Rejected rows of a batch, and its retention period.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "rejected_rows",
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("piece", sa.Integer(), nullable=False),
        sa.Column("csv", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batch.id"], name=op.f("rejected_rows_batch_id_fk")),
        sa.PrimaryKeyConstraint("batch_id", "piece", name=op.f("rejected_rows_pk")),
    )
    for table in ("tenant", "batch"):
        op.add_column(table, sa.Column("retention_days", sa.Integer(), nullable=True))
        op.create_check_constraint(op.f(f"{table}_retention"), table, "retention_days >= 1")


def downgrade() -> None:
    for table in ("tenant", "batch"):
        op.drop_column(table, "retention_days")
    op.drop_table("rejected_rows")
