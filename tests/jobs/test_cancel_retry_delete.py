"""Cancel, deadlines, retry and deletion, on real rows."""

from datetime import timedelta

import pytest
from sqlalchemy import func, select, text, update

from darkroom import batches
from darkroom.db.tables import DEFAULT_TENANT, Event, Job
from darkroom.errors import Deleted, JobNotFinished, NothingToRetry
from darkroom.jobs import deletion, lifecycle, queries
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed, Requeued, RequeueReason
from darkroom.status import Status
from tests.conftest import new_job
from tests.support.settling import end_backoffs, reap, settle, succeeded


@pytest.fixture
def act(sessions):
    """Calls a verb for the default tenant, in a transaction of its own."""

    def call(verb, *arguments):
        with sessions.begin() as session:
            return verb(session, DEFAULT_TENANT, *arguments)

    return call


@pytest.fixture
def queue_batch(sessions, registry):
    """Queues a batch of that many jobs and returns its id."""

    def queue(number, **fields):
        made = [new_job(registry, fields, row_number=n) for n in range(1, number + 1)]
        with sessions.begin() as session:
            batch = batches.create(session, DEFAULT_TENANT, total=number, label="mine")
            lifecycle.submit(session, DEFAULT_TENANT, made, batch_id=batch.id)
        return batch.id

    return queue


@pytest.fixture
def events(sessions):
    """Returns the types of a subject's events, in order."""

    def types(**subject):
        with sessions.begin() as session:
            rows = select(Event.type).filter_by(**subject).order_by(Event.id)
            return session.scalars(rows).all()

    return types


def counts_of(sessions, batch_id):
    with sessions.begin() as session:
        [counts] = batches.count(session, [batches.find(session, DEFAULT_TENANT, batch_id)])
    assert sum(counts.by_status.values()) == counts.total
    return counts


def let_pass(sessions, column):
    """Let this deadline of every job pass."""
    with sessions.begin() as session:
        past = func.now() - timedelta(seconds=1)
        session.execute(update(Job).where(column.is_not(None)).values({column.key: past}))


def test_a_queued_job_is_canceled_at_once_and_stays_so(queue_jobs, claim, act, events):
    [job_id] = queue_jobs({})

    assert act(lifecycle.cancel, job_id).status == Status.CANCELED
    assert act(lifecycle.cancel, job_id).status == Status.CANCELED
    assert claim() == []
    assert events(job_id=job_id) == ["job.canceled"]


@pytest.mark.parametrize("outcome", [succeeded, lambda job: Failed(job.id, "x", "y")])
def test_a_running_job_ends_as_canceled_whatever_its_outcome(
    sessions, queue_jobs, claim, act, outcome
):
    kept, canceled = queue_jobs({}, {})
    claimed = claim()
    dispatch_id = claimed[0].dispatch_id
    assert act(lifecycle.cancel, canceled).status == Status.RUNNING
    with sessions.begin() as session:
        due = dispatches.canceled_jobs(session, [dispatch_id])
    assert due == {dispatch_id: frozenset({canceled})}
    settle(sessions, dispatch_id, *map(outcome, claimed))

    assert act(queries.find, canceled).status == Status.CANCELED
    assert act(queries.find, canceled).image_key is None
    assert act(queries.find, kept).status in {Status.SUCCEEDED, Status.FAILED}


def requeue(sessions, job):
    settle(sessions, job.dispatch_id, Requeued(job.id, RequeueReason.UNAVAILABLE))


def crash(sessions, job):
    with sessions.begin() as session:
        dispatches.crash(session, job.dispatch_id, max_attempts=3)


def lose_lease(sessions, job):
    del job
    reap(sessions)


def stop(sessions, job):
    del job
    with sessions.begin() as session:
        dispatches.release(session, "worker")


@pytest.mark.parametrize("fault", [requeue, crash, lose_lease, stop])
def test_a_canceled_job_does_not_come_back_to_the_queue(sessions, queue_jobs, claim, act, fault):
    [job_id] = queue_jobs({})
    [job] = claim(lease=timedelta(seconds=-1))
    act(lifecycle.cancel, job_id)
    fault(sessions, job)

    assert act(queries.find, job_id).status == Status.CANCELED


def test_cancel_does_not_change_a_finished_job(sessions, queue_jobs, claim, act):
    [job_id] = queue_jobs({})
    [job] = claim()
    settle(sessions, job.dispatch_id, succeeded(job))

    assert act(lifecycle.cancel, job_id).status == Status.SUCCEEDED


def test_a_canceled_batch_finishes_with_its_running_jobs(sessions, queue_batch, claim, act, events):
    batch_id = queue_batch(20)
    running = claim()
    act(lifecycle.cancel_batch, batch_id)
    before = counts_of(sessions, batch_id)
    settle(sessions, running[0].dispatch_id, *map(succeeded, running))
    after = counts_of(sessions, batch_id)

    assert before.status == after.status == "canceled"
    assert before.by_status == {"canceled": 12, "running": 8}
    assert after.by_status == {"canceled": 20}
    assert events(job_id=None) == ["batch.canceled"]
    assert act(lifecycle.cancel_batch, batch_id).finished_at is not None
    assert events(job_id=None) == ["batch.canceled"]
    assert events(type="job.canceled") == ["job.canceled"] * 20


def test_a_paused_batch_is_not_claimed_until_it_is_resumed(sessions, queue_batch, claim, act):
    batch_id = queue_batch(20)
    running = claim()
    act(lifecycle.pause_batch, batch_id)
    settle(
        sessions,
        running[0].dispatch_id,
        *[Requeued(job.id, RequeueReason.UNAVAILABLE) for job in running],
    )
    end_backoffs(sessions)

    assert claim() == []
    assert counts_of(sessions, batch_id).status == "paused"
    act(lifecycle.resume_batch, batch_id)
    assert len(claim()) == 8
    assert counts_of(sessions, batch_id).status == "running"


def test_a_paused_batch_can_be_canceled(sessions, queue_batch, act):
    batch_id = queue_batch(3)
    act(lifecycle.pause_batch, batch_id)
    act(lifecycle.cancel_batch, batch_id)

    assert counts_of(sessions, batch_id).by_status == {"canceled": 3}


def test_a_job_that_is_not_started_in_time_expires(sessions, queue_jobs, claim, act, events):
    [late, other] = queue_jobs({"start_within_s": 5}, {})
    let_pass(sessions, Job.expires_at)

    assert [job.id for job in claim()] == [other]
    with sessions.begin() as session:
        assert lifecycle.expire_overdue(session) == 1
        assert lifecycle.expire_overdue(session) == 0
    assert act(queries.find, late).status == Status.EXPIRED
    assert events(job_id=late) == ["job.expired"]


def test_a_job_that_was_started_in_time_may_take_longer(sessions, queue_jobs, claim, act):
    [job_id] = queue_jobs({"start_within_s": 5})
    [job] = claim()
    let_pass(sessions, Job.expires_at)
    settle(sessions, job.dispatch_id, succeeded(job))

    assert act(queries.find, job_id).status == Status.SUCCEEDED


def test_a_running_job_past_its_deadline_expires(sessions, queue_jobs, claim, act):
    [job_id] = queue_jobs({"deadline_s": 5})
    [job] = claim()
    let_pass(sessions, Job.deadline_at)
    with sessions.begin() as session:
        assert dispatches.canceled_jobs(session, [job.dispatch_id])
    settle(sessions, job.dispatch_id, succeeded(job))

    assert act(queries.find, job_id).status == Status.EXPIRED


def test_a_cancel_before_the_deadline_is_a_cancel(sessions, queue_jobs, claim, act):
    [job_id] = queue_jobs({"deadline_s": 5})
    [job] = claim()
    act(lifecycle.cancel, job_id)
    with sessions.begin() as session:
        earlier = func.now() - timedelta(seconds=2)
        session.execute(update(Job).values(cancel_requested_at=earlier))
    let_pass(sessions, Job.deadline_at)
    settle(sessions, job.dispatch_id, succeeded(job))

    assert act(queries.find, job_id).status == Status.CANCELED


def test_the_deadline_counts_from_the_database_s_clock(sessions, queue_jobs):
    [job_id] = queue_jobs({"start_within_s": 60, "deadline_s": 30})
    with sessions.begin() as session:
        job = queries.find(session, DEFAULT_TENANT, job_id)

    assert job.expires_at == job.deadline_at == job.created_at + timedelta(seconds=30)


def test_a_retry_has_the_same_input_and_is_one_job_however_often_requested(queue_jobs, act):
    [job_id] = queue_jobs({"seed": 7, "label": "mine", "metadata": {"a": "b"}, "deadline_s": 9})
    act(lifecycle.cancel, job_id)
    first, second = act(lifecycle.retry, job_id), act(lifecycle.retry, job_id)

    assert first.id == second.id != job_id
    assert (first.status, first.retried_from) == ("queued", job_id)
    assert (first.seed, first.label, first.metadata_) == (7, "mine", {"a": "b"})
    assert first.deadline_at is None


def test_an_unfinished_or_succeeded_job_is_not_retried(sessions, queue_jobs, claim, act):
    [job_id] = queue_jobs({})
    with pytest.raises(JobNotFinished):
        act(lifecycle.retry, job_id)
    [job] = claim()
    settle(sessions, job.dispatch_id, succeeded(job))
    with pytest.raises(NothingToRetry):
        act(lifecycle.retry, job_id)


def test_a_batch_is_retried_as_a_new_batch_of_its_failed_jobs(sessions, queue_batch, claim, act):
    batch_id = queue_batch(5)
    with pytest.raises(NothingToRetry):
        act(lifecycle.retry_batch, batch_id)
    taken = claim()
    ends = [succeeded(job) if job.row_number % 2 else Failed(job.id, "x", "y") for job in taken]
    settle(sessions, taken[0].dispatch_id, *ends)
    first, second = act(lifecycle.retry_batch, batch_id), act(lifecycle.retry_batch, batch_id)

    assert first.id == second.id != batch_id
    assert (first.total, first.retried_from, first.label) == (2, batch_id, "mine")
    assert [(job.row_number, job.batch_id) for job in claim()] == [(2, first.id), (4, first.id)]
    assert counts_of(sessions, batch_id).outcome == "partial"


def test_a_deleted_job_is_a_tombstone_without_client_data(sessions, queue_jobs, claim, act):
    secret = "the unreleased logo"
    fields = {"prompt": secret, "negative_prompt": secret, "label": secret}
    [job_id] = queue_jobs(fields | {"metadata": {"note": secret}})
    with pytest.raises(JobNotFinished):
        act(deletion.delete, job_id)
    [job] = claim()
    settle(sessions, job.dispatch_id, succeeded(job, "t/j/1.png"))

    assert act(deletion.delete, job_id) == "t/j/1.png"
    with pytest.raises(Deleted):
        act(queries.find, job_id)
    with sessions.begin() as session:
        assert secret not in session.scalar(
            select(func.array_to_string(func.array_agg(text("job::text")), "")).select_from(Job)
        )
        assert deletion.unswept_images(session, limit=9) == {job_id: "t/j/1.png"}
        deletion.forget_image(session, [job_id])
        assert deletion.unswept_images(session, limit=9) == {}
        assert queries.page(session, DEFAULT_TENANT, limit=9) == []
