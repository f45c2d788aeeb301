"""Triggers that check tenant and batch of jobs once per statement, see decision 19.

And an index of dispatches by worker.

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

#: Of a file's rows, all have the same owner: one lookup for 5,000 of them.
_BELONGS = """
CREATE FUNCTION job_belongs() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  owner record;
BEGIN
  FOR owner IN SELECT DISTINCT tenant_id, batch_id FROM arrived LOOP
    IF NOT EXISTS (SELECT FROM tenant WHERE id = owner.tenant_id) THEN
      RAISE EXCEPTION 'there is no tenant %', owner.tenant_id
        USING ERRCODE = 'foreign_key_violation';
    END IF;
    IF owner.batch_id IS NOT NULL AND NOT EXISTS (
      SELECT FROM batch WHERE id = owner.batch_id AND tenant_id = owner.tenant_id
    ) THEN
      RAISE EXCEPTION 'tenant % has no batch %', owner.tenant_id, owner.batch_id
        USING ERRCODE = 'foreign_key_violation';
    END IF;
  END LOOP;
  RETURN NULL;
END $$;
CREATE TRIGGER job_belongs AFTER INSERT ON job REFERENCING NEW TABLE AS arrived
  FOR EACH STATEMENT EXECUTE FUNCTION job_belongs();

CREATE FUNCTION keep_owner() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '% % keeps its id and its owner', TG_TABLE_NAME, OLD.id
    USING ERRCODE = 'foreign_key_violation';
END $$;
CREATE TRIGGER batch_keeps_owner BEFORE DELETE OR UPDATE OF id, tenant_id ON batch
  FOR EACH ROW EXECUTE FUNCTION keep_owner();
CREATE TRIGGER job_keeps_owner BEFORE UPDATE OF tenant_id, batch_id ON job
  FOR EACH ROW EXECUTE FUNCTION keep_owner();
"""


def upgrade() -> None:
    for name in ("tenant", "batch"):
        op.drop_constraint(op.f(f"job_{name}_id_fk"), "job", type_="foreignkey")
    op.execute(_BELONGS)
    _find_workers("status IN ('expired', 'running')")


def _find_workers(which: str) -> None:
    op.drop_index("dispatch_worker", table_name="dispatch")
    where = sa.text(which)
    op.create_index("dispatch_worker", "dispatch", ["worker_id"], postgresql_where=where)


def downgrade() -> None:
    _find_workers("status = 'running'")
    op.execute("DROP TRIGGER job_keeps_owner ON job; DROP TRIGGER batch_keeps_owner ON batch")
    op.execute("DROP TRIGGER job_belongs ON job; DROP FUNCTION keep_owner(), job_belongs()")
    for name in ("tenant", "batch"):
        op.create_foreign_key(op.f(f"job_{name}_id_fk"), "job", name, [f"{name}_id"], ["id"])
