"""Names of tables, columns and stored codes in the field's terms.

Revision ID: 0010
Revises: 0009
"""

from collections.abc import Iterable

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_TABLES = [
    ("class_turn", "priority_class"),
    ("operation", "queue_control"),
    ("rejected_rows", "rejected_row_chunk"),
]
_COLUMNS = [
    ("job", "isolation", "isolation_group"),
    ("job", "setbacks", "requeue_count"),
    ("job", "run_after", "scheduled_at"),
    ("job", "fair_tag", "start_tag"),
    ("job", "held", "paused"),
    ("fair_share", "next_tag", "next_start_tag"),
    ("delivery", "claims", "attempt_token"),
    ("delivery", "due_at", "next_attempt_at"),
]
_CONSTRAINTS = [
    ("job", "job_held_is_queued", "job_paused_is_queued"),
    ("priority_class", "class_turn_pk", "priority_class_pk"),
    ("queue_control", "operation_pk", "queue_control_pk"),
    ("queue_control", "operation_one_row", "queue_control_one_row"),
    ("rejected_row_chunk", "rejected_rows_pk", "rejected_row_chunk_pk"),
    ("rejected_row_chunk", "rejected_rows_batch_id_fk", "rejected_row_chunk_batch_id_fk"),
]
_INDEXES = [("job_held", "job_paused"), ("delivery_due", "delivery_next_attempt")]
_CODES = [
    ("job", "error_code", "crashed_worker", "worker_crashed"),
    ("job", "error_code", "no_answer", "model_no_output"),
    ("job", "error_code", "bad_output", "invalid_output"),
    ("delivery_attempt", "outcome", "bad_answer", "invalid_response"),
]


def upgrade() -> None:
    for old, new in _TABLES:
        op.rename_table(old, new)
    for table, old, new in _COLUMNS:
        op.alter_column(table, old, new_column_name=new)
    _rename_constraints(_CONSTRAINTS)
    for old, new in _INDEXES:
        op.execute(f"ALTER INDEX {old} RENAME TO {new}")
    for table, column, old, new in _CODES:
        _replace(table, column, old, new)


def _rename_constraints(names: Iterable[tuple[str, str, str]]) -> None:
    for table, old, new in names:
        op.execute(f"ALTER TABLE {table} RENAME CONSTRAINT {old} TO {new}")


def _replace(table: str, column: str, old: str, new: str) -> None:
    op.execute(f"UPDATE {table} SET {column} = '{new}' WHERE {column} = '{old}'")  # noqa: S608  # literals


def downgrade() -> None:
    for table, column, old, new in _CODES:
        _replace(table, column, new, old)
    for old, new in _INDEXES:
        op.execute(f"ALTER INDEX {new} RENAME TO {old}")
    _rename_constraints((table, new, old) for table, old, new in _CONSTRAINTS)
    for table, old, new in _COLUMNS:
        op.alter_column(table, new, new_column_name=old)
    for old, new in _TABLES:
        op.rename_table(new, old)
