"""Fair queue with aging priority classes; cancel, deadlines, retry and deletion.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_MOMENT = sa.DateTime(timezone=True)
_QUEUED = sa.text("status = 'queued'")
_WAITING = sa.text("status = 'queued' AND NOT held")
_CLAIM = ["microbatch_key", "isolation", "priority"]
_RETRIED = sa.text("retried_from IS NOT NULL")

#: The arrows of `darkroom.status.TRANSITIONS`; a test compares the two.
_MOVES = """
CREATE FUNCTION job_moves() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (OLD.status, NEW.status) NOT IN (
    ('queued', 'running'), ('queued', 'canceled'), ('queued', 'expired'),
    ('running', 'queued'), ('running', 'succeeded'), ('running', 'failed'),
    ('running', 'canceled'), ('running', 'expired')
  ) THEN
    RAISE EXCEPTION 'job % cannot go from % to %', OLD.id, OLD.status, NEW.status
      USING ERRCODE = 'check_violation';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER job_moves BEFORE UPDATE OF status ON job FOR EACH ROW
  WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION job_moves();
"""


def upgrade() -> None:
    op.add_column("tenant", sa.Column("weight", sa.Float(), server_default="1", nullable=False))
    op.create_check_constraint(
        op.f("tenant_weight_range"), "tenant", "weight > 0 AND weight <= 1000"
    )
    _batch_columns()
    _job_columns()
    _job_checks()
    _job_indexes()
    _order_tables()
    op.execute(_MOVES)


def _batch_columns() -> None:
    for name in ("paused_at", "canceled_at"):
        op.add_column("batch", sa.Column(name, _MOMENT))
    op.add_column("batch", sa.Column("retried_from", sa.Text()))
    op.create_foreign_key(op.f("batch_retried_from_fk"), "batch", "batch", ["retried_from"], ["id"])
    op.create_index("batch_retried_from", "batch", ["retried_from"], postgresql_where=_RETRIED)


def _job_columns() -> None:
    op.add_column("dispatch", sa.Column("cost", sa.Float(), server_default="0", nullable=False))
    op.alter_column("dispatch", "cost", server_default=None)
    op.add_column("job", sa.Column("cost", sa.Float(), server_default="1", nullable=False))
    op.add_column("job", sa.Column("fair_tag", sa.Float(), server_default="0", nullable=False))
    op.alter_column("job", "cost", server_default=None)
    op.alter_column("job", "fair_tag", server_default=None)
    op.add_column("job", sa.Column("held", sa.Boolean(), server_default=sa.false(), nullable=False))
    for name in ("expires_at", "deadline_at", "cancel_requested_at", "deleted_at"):
        op.add_column("job", sa.Column(name, _MOMENT))
    op.add_column("job", sa.Column("retried_from", sa.Text()))
    op.create_foreign_key(op.f("job_retried_from_fk"), "job", "job", ["retried_from"], ["id"])


def _job_checks() -> None:
    op.drop_constraint(op.f("job_image_key_iff"), "job")
    op.drop_constraint(op.f("job_prompt_length"), "job")
    checks = {
        "image_key_if": "(image_key IS NOT NULL) <= (status = 'succeeded')",
        "image_key_until_deleted": (
            "(status = 'succeeded' AND deleted_at IS NULL) <= (image_key IS NOT NULL)"
        ),
        "prompt_length": "length(prompt) <= 2000",
        "prompt_until_deleted": "(length(prompt) = 0) = (deleted_at IS NOT NULL)",
        "deleted_is_over": "(deleted_at IS NOT NULL) <= (finished_at IS NOT NULL)",
        "asked_to_end": "(cancel_requested_at IS NOT NULL) <= (status <> 'queued')",
        "held_is_queued": "held <= (status = 'queued')",
        "cost_positive": "cost > 0",
    }
    for name, rule in checks.items():
        op.create_check_constraint(op.f(f"job_{name}"), "job", rule)


def _job_indexes() -> None:
    op.drop_index("job_next", table_name="job")
    op.drop_index("job_claim", table_name="job")
    op.create_index("job_next", "job", ["priority", "fair_tag", "id"], postgresql_where=_WAITING)
    op.create_index("job_claim", "job", [*_CLAIM, "fair_tag", "id"], postgresql_where=_WAITING)
    op.create_index(
        "job_expiry",
        "job",
        ["expires_at"],
        postgresql_where=sa.text("status = 'queued' AND expires_at IS NOT NULL"),
    )
    op.create_index(
        "job_retried_from", "job", ["retried_from"], unique=True, postgresql_where=_RETRIED
    )
    op.create_index(
        "job_unswept",
        "job",
        ["deleted_at"],
        postgresql_where=sa.text("deleted_at IS NOT NULL AND image_key IS NOT NULL"),
    )


def _order_tables() -> None:
    op.create_table(
        "fair_share",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("next_tag", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fair_share_tenant_id_fk")),
        sa.PrimaryKeyConstraint("tenant_id", "priority", name=op.f("fair_share_pk")),
    )
    turns = op.create_table(
        "class_turn",
        sa.Column("priority", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("virtual_time", sa.Float(), server_default="0", nullable=False),
        sa.Column("waiting_since", _MOMENT),
        sa.PrimaryKeyConstraint("priority", name=op.f("class_turn_pk")),
    )
    op.bulk_insert(turns, [{"priority": rank} for rank in range(3)])


def downgrade() -> None:
    op.execute("DROP TRIGGER job_moves ON job; DROP FUNCTION job_moves()")
    op.drop_table("class_turn")
    op.drop_table("fair_share")
    for name in ("job_unswept", "job_retried_from", "job_expiry", "job_claim", "job_next"):
        op.drop_index(name, table_name="job")
    op.create_index("job_next", "job", ["priority", "id"], postgresql_where=_QUEUED)
    op.create_index("job_claim", "job", [*_CLAIM, "id"], postgresql_where=_QUEUED)
    op.execute(
        "DELETE FROM event WHERE job_id IN (SELECT id FROM job WHERE deleted_at IS NOT NULL)"
    )
    op.execute("DELETE FROM job WHERE deleted_at IS NOT NULL")
    for name in (
        "image_key_if",
        "image_key_until_deleted",
        "prompt_length",
        "prompt_until_deleted",
        "deleted_is_over",
        "asked_to_end",
        "held_is_queued",
        "cost_positive",
    ):
        op.drop_constraint(op.f(f"job_{name}"), "job")
    op.create_check_constraint(
        op.f("job_prompt_length"), "job", "length(prompt) BETWEEN 1 AND 2000"
    )
    op.create_check_constraint(
        op.f("job_image_key_iff"), "job", "(image_key IS NOT NULL) = (status = 'succeeded')"
    )
    for table, names in {
        "job": (
            "cost",
            "fair_tag",
            "held",
            "expires_at",
            "deadline_at",
            "cancel_requested_at",
            "deleted_at",
            "retried_from",
        ),
        "batch": ("paused_at", "canceled_at", "retried_from"),
        "dispatch": ("cost",),
        "tenant": ("weight",),
    }.items():
        for name in names:
            op.drop_column(table, name)
