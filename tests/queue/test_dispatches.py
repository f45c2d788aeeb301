"""Claims, leases, crashes and outcomes of dispatches, on real rows."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from darkroom.db.tables import DEFAULT_TENANT, Job
from darkroom.jobs import queries
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed, Requeued, RequeueReason
from darkroom.status import Status
from tests.conftest import LEASE
from tests.support.settling import end_backoffs, expire_lease, reap, settle, status_of, succeeded


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


def test_concurrent_claims_take_each_job_once_and_fill_their_microbatches(queue_jobs, claim):
    ids = queue_jobs(*[{}] * 40)
    with ThreadPoolExecutor(8) as workers:
        taken = [[job.id for job in batch] for batch in workers.map(claim, map(str, range(8)))]

    assert sorted(job_id for batch in taken for job_id in batch) == sorted(ids)
    assert sorted(map(len, taken)) == [0, 0, 0, 8, 8, 8, 8, 8]


def test_a_late_worker_changes_nothing(sessions, queue_jobs, claim):
    queue_jobs({})
    [stale] = claim("slow")
    expire_lease(sessions, stale.dispatch_id)
    assert reap(sessions) == 1
    [fresh] = claim("quick")

    assert not settle(sessions, stale.dispatch_id, succeeded(stale, "late.png"))
    assert settle(sessions, fresh.dispatch_id, succeeded(fresh, "right.png"))
    with sessions.begin() as session:
        assert queries.find(session, DEFAULT_TENANT, fresh.id).image_key == "right.png"


def test_a_dispatch_settles_once(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim()

    assert settle(sessions, job.dispatch_id, succeeded(job))
    assert not settle(sessions, job.dispatch_id, succeeded(job, "twice.png"))


def test_a_renewed_lease_does_not_run_out(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim("w", lease=timedelta(seconds=-1))
    with sessions.begin() as session:
        assert dispatches.renew(session, [job.dispatch_id], lease=LEASE) == {job.dispatch_id}

    assert reap(sessions) == 0
    assert status_of(sessions, job.id) == Status.RUNNING


def test_a_worker_learns_that_it_lost_a_dispatch(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim("w", lease=timedelta(seconds=-1))
    reap(sessions)

    with sessions.begin() as session:
        assert dispatches.renew(session, [job.dispatch_id], lease=LEASE) == frozenset()


def test_a_job_whose_workers_keep_dying_fails_after_its_last_attempt(sessions, queue_jobs, claim):
    [job_id] = queue_jobs({})
    for _ in range(3):
        assert status_of(sessions, job_id) == Status.QUEUED
        [job] = claim(lease=timedelta(seconds=-1))
        reap(sessions, max_attempts=3)

    with sessions.begin() as session:
        job = queries.find(session, DEFAULT_TENANT, job_id)
    assert (job.status, job.error_code, job.attempt) == (Status.FAILED, "worker_crashed", 3)


def die_with_both(sessions, claim):
    """Let one worker claim a job of each of two keys, then die."""
    taken = [job for _ in range(2) for job in claim(lease=timedelta(seconds=-1))]
    reap(sessions, max_attempts=3)
    return taken


def test_a_job_that_shared_a_worker_with_the_poison_at_three_deaths_does_not_fail(
    sessions, queue_jobs, claim
):
    innocent, poison = queue_jobs({}, {"width": 128})
    for _ in range(3):
        assert {job.id for job in die_with_both(sessions, claim)} == {innocent, poison}

    [alone] = claim()
    settle(sessions, alone.dispatch_id, succeeded(alone))
    claim(lease=timedelta(seconds=-1))
    reap(sessions, max_attempts=3)

    assert status_of(sessions, innocent) == Status.SUCCEEDED
    assert status_of(sessions, poison) == Status.FAILED


def test_jobs_fail_at_last_if_the_worker_always_dies_with_several_microbatches(
    sessions, queue_jobs, claim
):
    ids = queue_jobs({}, {"width": 128})
    for _ in range(6):
        assert [status_of(sessions, job_id) for job_id in ids] == [Status.QUEUED] * 2
        die_with_both(sessions, claim)

    assert [status_of(sessions, job_id) for job_id in ids] == [Status.FAILED] * 2


def test_one_failed_job_does_not_fail_its_microbatch(sessions, queue_jobs, claim):
    queue_jobs({}, {}, {})
    good, bad, again = claim()

    settle(
        sessions,
        good.dispatch_id,
        succeeded(good),
        Failed(bad.id, "not_finite", "came out as not a number"),
        Requeued(again.id, RequeueReason.UNAVAILABLE),
    )

    assert status_of(sessions, good.id) == Status.SUCCEEDED
    assert status_of(sessions, bad.id) == Status.FAILED
    assert status_of(sessions, again.id) == Status.QUEUED


def test_a_requeued_job_backs_off_and_loses_no_attempt(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim()
    settle(sessions, job.dispatch_id, Requeued(job.id, RequeueReason.UNAVAILABLE))

    assert claim() == []
    end_backoffs(sessions)
    [again] = claim()
    assert (again.attempt, again.requeue_count) == (1, 1)


def run_with_poison(sessions, claim, poison):
    """Run all jobs on a replica that dies of each poison; return how often it died."""
    crashes = 0
    while taken := claim():
        dispatch_id = taken[0].dispatch_id
        if poison & {job.id for job in taken}:
            crashes += 1
            with sessions.begin() as session:
                assert dispatches.crash(session, dispatch_id, max_attempts=3)
        else:
            assert settle(sessions, dispatch_id, *[succeeded(job) for job in taken])
    return crashes


def test_one_poison_in_a_microbatch_of_eight_fails_alone_after_three_crashes(
    sessions, queue_jobs, claim
):
    ids = queue_jobs(*[{}] * 8)
    crashes = run_with_poison(sessions, claim, {ids[5]})

    assert crashes == 3
    assert status_of(sessions, ids[5]) == Status.FAILED
    others = [status_of(sessions, job_id) for job_id in ids if job_id != ids[5]]
    assert others == [Status.SUCCEEDED] * 7


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.lists(st.booleans(), min_size=1, max_size=24))
def test_whatever_the_poison_all_other_jobs_succeed(sessions, queue_jobs, claim, poisoned):
    ids = queue_jobs(*[{}] * len(poisoned))
    poison = {job_id for job_id, bad in zip(ids, poisoned, strict=True) if bad}
    crashes = run_with_poison(sessions, claim, poison)

    assert crashes <= 3 * len(poison)
    for job_id in ids:
        expected = Status.FAILED if job_id in poison else Status.SUCCEEDED
        assert status_of(sessions, job_id) == expected


def test_a_crash_of_a_settled_dispatch_changes_nothing(sessions, queue_jobs, claim):
    queue_jobs({})
    [job] = claim()
    settle(sessions, job.dispatch_id, succeeded(job))

    with sessions.begin() as session:
        assert not dispatches.crash(session, job.dispatch_id, max_attempts=3)
    assert status_of(sessions, job.id) == Status.SUCCEEDED


def test_the_backoff_grows_and_stays_below_its_cap(sessions, queue_jobs, claim):
    [job_id] = queue_jobs({})
    waits = []
    for _ in range(9):
        end_backoffs(sessions)
        [job] = claim()
        settle(sessions, job.dispatch_id, Requeued(job.id, RequeueReason.UNAVAILABLE))
        with sessions.begin() as session:
            waiting = select(func.extract("epoch", Job.scheduled_at - func.now()))
            waits.append(float(session.scalar(waiting.where(Job.id == job_id))))

    assert 0.4 < waits[0] < 1.6
    assert waits[4] > waits[0]
    assert max(waits) <= dispatches.MAX_BACKOFF_S * 1.5


def test_the_jobs_of_a_stopping_worker_are_requeued_at_once(sessions, queue_jobs, claim):
    queue_jobs({}, {})
    claim("leaving")
    with sessions.begin() as session:
        assert dispatches.release(session, "leaving") == 2

    assert [job.attempt for job in claim("staying")] == [1, 1]
