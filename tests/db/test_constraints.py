"""Constraints and triggers that keep contradictions out of the tables."""

from itertools import product

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from darkroom.db.tables import DEFAULT_TENANT, Batch, Job
from darkroom.status import FINISHED, TRANSITIONS, Status


@pytest.mark.parametrize(
    "change",
    [
        "status = 'drawn'",
        "status = 'succeeded', finished_at = now()",
        "status = 'failed', finished_at = now()",
        "status = 'running'",
        "finished_at = now()",
        "image_key = 'x'",
        "error_code = 'x'",
        "seed = -1",
        "width = 0",
        "prompt = ''",
        "priority = 7",
        "output_format = 'gif'",
        "row_number = 1",
    ],
)
def test_the_table_rejects_contradictions(sessions, queue_jobs, change):
    queue_jobs({})
    with pytest.raises(IntegrityError, match="CheckViolation"), sessions.begin() as s:
        s.execute(text(f"UPDATE job SET {change}"))


BATCH = "bat_" + "0" * 32


@pytest.fixture
def two_tenants(sessions, queue_jobs):
    queue_jobs({})
    with sessions.begin() as session:
        session.execute(text("INSERT INTO tenant (id, name) VALUES ('ten_other', 'other')"))
        session.add(Batch(id=BATCH, tenant_id="ten_other", total=1))


def copy_of_a_job(**changed):
    """Return SQL that inserts the job again with these columns changed."""
    kept = [c.name for c in Job.__table__.columns if c.name not in {"id", *changed}]
    names, values = ", ".join(changed), ", ".join(f"'{value}'" for value in changed.values())
    columns = ", ".join(kept)
    return text(
        f"INSERT INTO job (id, {names}, {columns}) SELECT 'job_2', {values}, {columns} FROM job"
    )


@pytest.mark.usefixtures("two_tenants")
@pytest.mark.parametrize(
    "owners",
    [
        {"tenant_id": "ten_unknown"},
        {"batch_id": "bat_" + "1" * 32, "row_number": 1},
        {"batch_id": BATCH, "row_number": 1},
    ],
    ids=["an unknown tenant", "an unknown batch", "another tenant's batch"],
)
def test_a_job_without_an_owner_is_rejected(sessions, owners):
    with pytest.raises(IntegrityError, match="ForeignKeyViolation"), sessions.begin() as session:
        session.execute(copy_of_a_job(**owners))


@pytest.mark.usefixtures("two_tenants")
@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM batch",
        "UPDATE batch SET id = 'bat_1'",
        f"UPDATE batch SET tenant_id = '{DEFAULT_TENANT}'",
        "UPDATE job SET tenant_id = 'ten_other'",
        f"DELETE FROM tenant WHERE id = '{DEFAULT_TENANT}'",
    ],
)
def test_no_job_loses_its_owner(sessions, change):
    with pytest.raises(IntegrityError, match="ForeignKeyViolation"), sessions.begin() as session:
        session.execute(text(change))


VALUES = {
    Status.QUEUED: "dispatch_id = NULL, finished_at = NULL, image_key = NULL, image_sha256 = NULL,"
    " image_bytes = NULL, error_code = NULL, error_message = NULL, error_retryable = NULL",
    Status.RUNNING: "dispatch_id = (SELECT max(id) FROM dispatch), finished_at = NULL,"
    " image_key = NULL, image_sha256 = NULL, image_bytes = NULL,"
    " error_code = NULL, error_message = NULL, error_retryable = NULL",
    Status.SUCCEEDED: "finished_at = now(), image_key = 'k', image_sha256 = 'h', image_bytes = 1,"
    " error_code = NULL, error_message = NULL, error_retryable = NULL",
    Status.FAILED: "finished_at = now(), image_key = NULL, image_sha256 = NULL,"
    " image_bytes = NULL, error_code = 'x', error_message = 'y', error_retryable = false",
    Status.CANCELED: "finished_at = now(), image_key = NULL, image_sha256 = NULL,"
    " image_bytes = NULL, error_code = NULL, error_message = NULL, error_retryable = NULL",
}
VALUES[Status.EXPIRED] = VALUES[Status.CANCELED]


def test_the_database_rejects_every_transition_that_is_not_in_the_table(
    sessions, queue_jobs, claim
):
    queue_jobs({})
    claim()
    allowed = {(old, new) for old, onward in TRANSITIONS.items() for new in onward}
    for old, new in product(Status, Status):
        if old == new:
            continue
        with sessions.begin() as session:  # the trigger checks transitions, this is a start
            session.execute(text("ALTER TABLE job DISABLE TRIGGER job_moves"))
            session.execute(text(f"UPDATE job SET status = '{old}', {VALUES[old]}"))
            session.execute(text("ALTER TABLE job ENABLE TRIGGER job_moves"))
        move = text(f"UPDATE job SET status = '{new}', {VALUES[new]}")
        if (old, new) in allowed:
            with sessions.begin() as session:
                session.execute(move)
            continue
        rejection = pytest.raises(IntegrityError, match=f"cannot go from {old} to {new}")
        with rejection, sessions.begin() as session:
            session.execute(move)
    assert not any(old in FINISHED for old, _ in allowed)
