"""The moves of a job, on real rows."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError

from darkroom import batches
from darkroom.db.tables import DEFAULT_TENANT, Batch, Dispatch, Event, Job
from darkroom.errors import NotFound
from darkroom.jobs import lifecycle, queries
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed, Requeued, RequeueReason, Succeeded
from darkroom.status import FINISHED, TRANSITIONS, Status
from tests.conftest import LEASE, new_job


def drawn(job, key="a/b/1.png"):
    return Succeeded(job.id, key, "0" * 64, 10, inference_ms=5, upload_ms=1)


def status_of(sessions, job_id):
    with sessions.begin() as session:
        return session.scalar(select(Job.status).where(Job.id == job_id))


def settle(sessions, dispatch_id, *outcomes):
    with sessions.begin() as session:
        return dispatches.settle(session, dispatch_id, outcomes)


def run_out(sessions, dispatch_id):
    """Let the lease of a dispatch have ended a second ago."""
    with sessions.begin() as session:
        session.execute(
            update(Dispatch)
            .where(Dispatch.id == dispatch_id)
            .values(leased_until=func.now() - timedelta(seconds=1))
        )


def sweep(sessions, max_attempts=3):
    with sessions.begin() as session:
        return dispatches.expire_leases(session, max_attempts=max_attempts)


def make_due(sessions):
    """Let every backoff be over."""
    with sessions.begin() as session:
        session.execute(update(Job).values(scheduled_at=func.now() - timedelta(seconds=1)))


def test_jobs_that_may_share_a_batch_are_claimed_together_and_in_order(queue_jobs, claim):
    ids = queue_jobs({"seed": 1}, {"seed": 2, "num_inference_steps": 5}, {"guidance_scale": 1.0})

    assert [job.id for job in claim()] == ids


def test_a_microbatch_holds_one_size_only_and_never_more_than_the_model_allows(queue_jobs, claim):
    small = queue_jobs(*[{"width": 64, "height": 64}] * 3)
    large = queue_jobs(*[{}] * 9)

    taken = [[job.id for job in claim()] for _ in range(4)]

    assert taken == [small, large[:8], large[8:], []]


def test_an_interactive_job_goes_before_a_bulk_one_that_came_earlier(queue_jobs, claim):
    bulk = queue_jobs({"priority": "bulk", "width": 64})
    interactive = queue_jobs({"priority": "interactive"})

    assert [job.id for job in claim()] == interactive
    assert [job.id for job in claim()] == bulk


def test_claimers_at_once_take_each_job_once_and_leave_no_seat_empty(queue_jobs, claim):
    ids = queue_jobs(*[{}] * 40)
    with ThreadPoolExecutor(8) as workers:
        taken = [[job.id for job in batch] for batch in workers.map(claim, map(str, range(8)))]

    assert sorted(job_id for batch in taken for job_id in batch) == sorted(ids)
    assert sorted(map(len, taken)) == [0, 0, 0, 8, 8, 8, 8, 8]


def test_a_late_worker_changes_nothing(sessions, queue_jobs, claim):
    queue_jobs({})
    [stale] = claim("slow")
    run_out(sessions, stale.dispatch_id)
    assert sweep(sessions) == 1
    [fresh] = claim("quick")

    assert not settle(sessions, stale.dispatch_id, drawn(stale, "late.png"))
    assert settle(sessions, fresh.dispatch_id, drawn(fresh, "right.png"))
    with sessions.begin() as session:
        assert queries.find(session, DEFAULT_TENANT, fresh.id).image_key == "right.png"


def test_a_dispatch_settles_once(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim()

    assert settle(sessions, job.dispatch_id, drawn(job))
    assert not settle(sessions, job.dispatch_id, drawn(job, "twice.png"))


def test_a_renewed_lease_does_not_run_out(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim("w", lease=timedelta(seconds=-1))
    with sessions.begin() as session:
        assert dispatches.renew(session, [job.dispatch_id], lease=LEASE) == {job.dispatch_id}

    assert sweep(sessions) == 0
    assert status_of(sessions, job.id) == Status.RUNNING


def test_a_worker_learns_that_it_lost_a_dispatch(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim("w", lease=timedelta(seconds=-1))
    sweep(sessions)

    with sessions.begin() as session:
        assert dispatches.renew(session, [job.dispatch_id], lease=LEASE) == frozenset()


def test_a_job_whose_workers_keep_dying_fails_after_its_last_attempt(sessions, queue_jobs, claim):
    [job_id] = queue_jobs({})
    for _ in range(3):
        assert status_of(sessions, job_id) == Status.QUEUED
        [job] = claim(lease=timedelta(seconds=-1))
        sweep(sessions, max_attempts=3)

    with sessions.begin() as session:
        job = queries.find(session, DEFAULT_TENANT, job_id)
    assert (job.status, job.error_code, job.attempt) == (Status.FAILED, "worker_crashed", 3)


def die_with_both(sessions, claim):
    """One worker takes a job of each of two keys, and dies."""
    taken = [job for _ in range(2) for job in claim(lease=timedelta(seconds=-1))]
    sweep(sessions, max_attempts=3)
    return taken


def test_who_was_in_the_same_worker_at_three_deaths_is_not_failed_with_the_poison(
    sessions, queue_jobs, claim
):
    innocent, poison = queue_jobs({}, {"width": 128})
    for _ in range(3):
        assert {job.id for job in die_with_both(sessions, claim)} == {innocent, poison}

    [drawn_alone] = claim()
    settle(sessions, drawn_alone.dispatch_id, drawn(drawn_alone))
    claim(lease=timedelta(seconds=-1))
    sweep(sessions, max_attempts=3)

    assert status_of(sessions, innocent) == Status.SUCCEEDED
    assert status_of(sessions, poison) == Status.FAILED


def test_a_worker_that_never_dies_with_one_microbatch_only_does_not_die_for_ever(
    sessions, queue_jobs, claim
):
    ids = queue_jobs({}, {"width": 128})
    for _ in range(6):
        assert [status_of(sessions, job_id) for job_id in ids] == [Status.QUEUED] * 2
        die_with_both(sessions, claim)

    assert [status_of(sessions, job_id) for job_id in ids] == [Status.FAILED] * 2


def test_one_bad_job_does_not_fail_its_company(sessions, queue_jobs, claim):
    queue_jobs({}, {}, {})
    good, bad, again = claim()

    settle(
        sessions,
        good.dispatch_id,
        drawn(good),
        Failed(bad.id, "not_finite", "came out as not a number"),
        Requeued(again.id, RequeueReason.UNAVAILABLE),
    )

    assert status_of(sessions, good.id) == Status.SUCCEEDED
    assert status_of(sessions, bad.id) == Status.FAILED
    assert status_of(sessions, again.id) == Status.QUEUED


def test_what_was_sent_back_waits_and_has_lost_no_attempt(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim()
    settle(sessions, job.dispatch_id, Requeued(job.id, RequeueReason.UNAVAILABLE))

    assert claim() == []
    make_due(sessions)
    [again] = claim()
    assert (again.attempt, again.requeue_count) == (1, 1)


def draw_with_poison(sessions, claim, poison):
    """Draw until nothing is left, by a replica that dies of any poison; how often it died."""
    crashes = 0
    while taken := claim():
        dispatch_id = taken[0].dispatch_id
        if poison & {job.id for job in taken}:
            crashes += 1
            with sessions.begin() as session:
                assert dispatches.crash(session, dispatch_id, max_attempts=3)
        else:
            assert settle(sessions, dispatch_id, *[drawn(job) for job in taken])
    return crashes


def test_one_poison_in_a_microbatch_of_eight_fails_alone_after_three_crashes(
    sessions, queue_jobs, claim
):
    ids = queue_jobs(*[{}] * 8)
    crashes = draw_with_poison(sessions, claim, {ids[5]})

    assert crashes == 3
    assert status_of(sessions, ids[5]) == Status.FAILED
    others = [status_of(sessions, job_id) for job_id in ids if job_id != ids[5]]
    assert others == [Status.SUCCEEDED] * 7


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.lists(st.booleans(), min_size=1, max_size=24))
def test_whatever_the_poison_the_rest_is_drawn(sessions, queue_jobs, claim, poisoned):
    ids = queue_jobs(*[{}] * len(poisoned))
    poison = {job_id for job_id, bad in zip(ids, poisoned, strict=True) if bad}
    crashes = draw_with_poison(sessions, claim, poison)

    assert crashes <= 3 * len(poison)
    for job_id in ids:
        expected = Status.FAILED if job_id in poison else Status.SUCCEEDED
        assert status_of(sessions, job_id) == expected


def test_a_crash_that_others_have_dealt_with_changes_nothing(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim()
    settle(sessions, job.dispatch_id, drawn(job))

    with sessions.begin() as session:
        assert not dispatches.crash(session, job.dispatch_id, max_attempts=3)
    assert status_of(sessions, job.id) == Status.SUCCEEDED


def test_the_backoff_grows_and_stays_below_its_cap(sessions, queue_jobs, claim):
    [job_id] = queue_jobs({})
    waits = []
    for _ in range(9):
        make_due(sessions)
        [job] = claim()
        settle(sessions, job.dispatch_id, Requeued(job.id, RequeueReason.UNAVAILABLE))
        with sessions.begin() as session:
            waiting = select(func.extract("epoch", Job.scheduled_at - func.now()))
            waits.append(float(session.scalar(waiting.where(Job.id == job_id))))

    assert 0.4 < waits[0] < 1.6
    assert waits[4] > waits[0]
    assert max(waits) <= dispatches.MAX_BACKOFF_S * 1.5


def test_a_leaving_worker_hands_its_jobs_back_at_once(sessions, queue_jobs, claim):
    queue_jobs({}, {})
    claim("leaving")
    with sessions.begin() as session:
        assert dispatches.release(session, "leaving") == 2

    assert [job.attempt for job in claim("staying")] == [1, 1]


def test_a_batch_ends_once_when_its_last_job_does(sessions, registry, claim):
    with sessions.begin() as session:
        batch = batches.create(session, DEFAULT_TENANT, total=9, label=None)
        made = [new_job(registry, {}, row_number=row) for row in range(1, 10)]
        lifecycle.submit(session, DEFAULT_TENANT, made, batch_id=batch.id)
    first, last = claim("one"), claim("two")
    settle(sessions, first[0].dispatch_id, *[drawn(job) for job in first])
    with sessions.begin() as session:
        assert batches.find(session, DEFAULT_TENANT, batch.id).finished_at is None
    settle(sessions, last[0].dispatch_id, Failed(last[0].id, "invalid_output", "no picture"))

    with sessions.begin() as session:
        ended = batches.find(session, DEFAULT_TENANT, batch.id)
        [counts] = batches.count(session, [ended])
        told = session.scalars(select(Event.type).where(Event.job_id.is_(None))).all()
    assert ended.finished_at is not None
    assert (counts.status, counts.outcome) == ("completed", "partial")
    assert sum(counts.by_status.values()) == counts.total == 9
    assert told == ["batch.completed"]


def test_two_transactions_that_each_end_one_of_the_last_two_jobs_end_the_batch(
    sessions, registry, claim
):
    import threading

    with sessions.begin() as session:
        batch = batches.create(session, DEFAULT_TENANT, total=2, label=None)
        made = [
            new_job(registry, {"width": width}, row_number=row)
            for row, width in enumerate((64, 128), start=1)
        ]
        lifecycle.submit(session, DEFAULT_TENANT, made, batch_id=batch.id)
    [one], [two] = claim("one"), claim("two")
    with sessions.begin() as slow:
        dispatches.settle(slow, one.dispatch_id, [drawn(one)])
        other = threading.Thread(
            target=settle, args=(sessions, two.dispatch_id, drawn(two)), daemon=True
        )
        other.start()  # waits for the batch's row, which the slow transaction holds
        other.join(timeout=0.3)
    other.join(timeout=5)

    with sessions.begin() as session:
        assert session.get(Batch, batch.id).finished_at is not None


def test_every_end_of_a_job_leaves_one_event(sessions, queue_jobs, claim):
    queue_jobs({}, {})
    good, bad = claim()
    settle(sessions, good.dispatch_id, drawn(good), Failed(bad.id, "x", "y"))

    with sessions.begin() as session:
        told = [*map(tuple, session.execute(select(Event.job_id, Event.type).order_by(Event.id)))]
    started = [(good.id, "job.started"), (bad.id, "job.started")]
    assert sorted(told[:2]) == sorted(started)
    assert told[2:] == [(good.id, "job.succeeded"), (bad.id, "job.failed")]


def test_another_tenants_job_is_not_found(sessions, queue_jobs):
    [job_id] = queue_jobs({})
    with sessions.begin() as session, pytest.raises(NotFound):
        queries.find(session, "ten_other", job_id)


@pytest.mark.parametrize("job_id", ["", "job_", "job_\0", "job_" + "g" * 32, "bat_" + "0" * 32])
def test_what_cannot_be_an_id_is_not_found(sessions, job_id):
    with sessions.begin() as session, pytest.raises(NotFound):
        queries.find(session, DEFAULT_TENANT, job_id)


@pytest.mark.parametrize(
    "nonsense",
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
def test_the_table_refuses_nonsense(sessions, queue_jobs, nonsense):
    queue_jobs({})
    with pytest.raises(IntegrityError, match="CheckViolation"), sessions.begin() as s:
        s.execute(text(f"UPDATE job SET {nonsense}"))


BATCH = "bat_" + "0" * 32


@pytest.fixture
def two_tenants(sessions, queue_jobs):
    queue_jobs({})
    with sessions.begin() as session:
        session.execute(text("INSERT INTO tenant (id, name) VALUES ('ten_other', 'other')"))
        session.add(Batch(id=BATCH, tenant_id="ten_other", total=1))


def copy_of_a_job(**changed):
    """SQL that inserts the job once more, but for these columns."""
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
        {"tenant_id": "ten_nobody"},
        {"batch_id": "bat_" + "1" * 32, "row_number": 1},
        {"batch_id": BATCH, "row_number": 1},
    ],
    ids=["an unknown tenant", "an unknown batch", "another tenant's batch"],
)
def test_a_job_of_nobody_is_refused(sessions, owners):
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
def test_nobodys_jobs_lose_their_owner(sessions, change):
    with pytest.raises(IntegrityError, match="ForeignKeyViolation"), sessions.begin() as session:
        session.execute(text(change))


def test_finished_statuses_are_those_without_a_way_on():
    assert set(TRANSITIONS) == set(Status)
    assert {Status.SUCCEEDED, Status.FAILED, Status.CANCELED, Status.EXPIRED} == FINISHED
