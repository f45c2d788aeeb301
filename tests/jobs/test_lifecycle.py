"""Jobs and their batches from submission to the end, on real rows."""

import threading

import pytest
from sqlalchemy import select

from darkroom import batches
from darkroom.db.tables import DEFAULT_TENANT, Batch, Event
from darkroom.errors import NotFound
from darkroom.jobs import lifecycle, queries
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed
from darkroom.status import FINISHED, TRANSITIONS, Status
from tests.conftest import new_job
from tests.support.settling import settle, succeeded


def test_a_batch_finishes_once_when_its_last_job_does(sessions, registry, claim):
    with sessions.begin() as session:
        batch = batches.create(session, DEFAULT_TENANT, total=9, label=None)
        made = [new_job(registry, {}, row_number=row) for row in range(1, 10)]
        lifecycle.submit(session, DEFAULT_TENANT, made, batch_id=batch.id)
    first, last = claim("one"), claim("two")
    settle(sessions, first[0].dispatch_id, *[succeeded(job) for job in first])
    with sessions.begin() as session:
        assert batches.find(session, DEFAULT_TENANT, batch.id).finished_at is None
    settle(sessions, last[0].dispatch_id, Failed(last[0].id, "invalid_output", "no image"))

    with sessions.begin() as session:
        finished = batches.find(session, DEFAULT_TENANT, batch.id)
        [counts] = batches.count(session, [finished])
        events = session.scalars(select(Event.type).where(Event.job_id.is_(None))).all()
    assert finished.finished_at is not None
    assert (counts.status, counts.outcome) == ("completed", "partial")
    assert sum(counts.by_status.values()) == counts.total == 9
    assert events == ["batch.completed"]


def test_two_transactions_that_each_finish_one_of_the_last_two_jobs_finish_the_batch(
    sessions, registry, claim
):
    with sessions.begin() as session:
        batch = batches.create(session, DEFAULT_TENANT, total=2, label=None)
        made = [
            new_job(registry, {"width": width}, row_number=row)
            for row, width in enumerate((64, 128), start=1)
        ]
        lifecycle.submit(session, DEFAULT_TENANT, made, batch_id=batch.id)
    [one], [two] = claim("one"), claim("two")
    with sessions.begin() as slow:
        dispatches.settle(slow, one.dispatch_id, [succeeded(one)])
        other = threading.Thread(
            target=settle, args=(sessions, two.dispatch_id, succeeded(two)), daemon=True
        )
        other.start()  # waits for the batch's row, which the slow transaction holds
        other.join(timeout=0.3)
    other.join(timeout=5)

    with sessions.begin() as session:
        assert session.get(Batch, batch.id).finished_at is not None


def test_every_finished_job_leaves_one_event(sessions, queue_jobs, claim):
    queue_jobs({}, {})
    good, bad = claim()
    settle(sessions, good.dispatch_id, succeeded(good), Failed(bad.id, "x", "y"))

    with sessions.begin() as session:
        events = [*map(tuple, session.execute(select(Event.job_id, Event.type).order_by(Event.id)))]
    started = [(good.id, "job.started"), (bad.id, "job.started")]
    assert sorted(events[:2]) == sorted(started)
    assert events[2:] == [(good.id, "job.succeeded"), (bad.id, "job.failed")]


def test_another_tenants_job_is_not_found(sessions, queue_jobs):
    [job_id] = queue_jobs({})
    with sessions.begin() as session, pytest.raises(NotFound):
        queries.find(session, "ten_other", job_id)


@pytest.mark.parametrize("job_id", ["", "job_", "job_\0", "job_" + "g" * 32, "bat_" + "0" * 32])
def test_a_malformed_id_is_not_found(sessions, job_id):
    with sessions.begin() as session, pytest.raises(NotFound):
        queries.find(session, DEFAULT_TENANT, job_id)


def test_finished_statuses_are_those_without_a_transition():
    assert set(TRANSITIONS) == set(Status)
    assert {Status.SUCCEEDED, Status.FAILED, Status.CANCELED, Status.EXPIRED} == FINISHED
