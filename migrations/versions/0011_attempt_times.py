"""Webhook attempts are indexed by time, so that /metrics counts the newest without a scan.

Revision ID: 0011
Revises: 0010
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("delivery_attempt_at", "delivery_attempt", ["at"])


def downgrade() -> None:
    op.drop_index("delivery_attempt_at", "delivery_attempt")
