"""Which jobs are claimed next and together: fairness among tenants, turns among priorities."""

from collections import Counter
from datetime import timedelta
from itertools import pairwise

import pytest
from sqlalchemy import func, insert, text, update

from darkroom.db.tables import Job, PriorityClass, Tenant
from darkroom.jobs import lifecycle
from darkroom.queue import claims, dispatches, fairness
from darkroom.queue.outcomes import Failed
from tests.conftest import LEASE, LIMITS, new_job, plan_of

ONE_STEP = {"width": 64, "height": 64, "num_inference_steps": 1}


@pytest.fixture
def tenant(sessions):
    """Creates a tenant of some weight and returns its id."""

    def make(tenant_id, weight=1.0):
        with sessions.begin() as session:
            session.execute(insert(Tenant).values(id=tenant_id, name=tenant_id, weight=weight))
        return tenant_id

    return make


@pytest.fixture
def queue_for(sessions, registry):
    """Queues equal jobs of a tenant in one transaction and returns their ids."""

    def queue(tenant_id, number, **fields):
        made = [new_job(registry, ONE_STEP | fields)] * number
        with sessions.begin() as session:
            return lifecycle.submit(session, tenant_id, made)

    return queue


@pytest.fixture
def take(sessions):
    """Claims a microbatch, fails its jobs and returns them."""

    def claimed(**options):
        with sessions.begin() as session:
            taken = claims.claim(session, "worker", max_microbatch=LIMITS, lease=LEASE, **options)
            if taken:
                ends = [Failed(job.id, "x", "y") for job in taken]
                dispatches.settle(session, taken[0].dispatch_id, ends)
        return taken

    return claimed


def test_a_small_tenant_does_not_wait_behind_a_large_one(tenant, queue_for, take):
    queue_for(tenant("ten_large"), 500)
    take()
    small = queue_for(tenant("ten_small"), 3)

    assert set(small) <= {job.id for job in take()}


def test_an_interactive_job_is_in_the_next_microbatch_after_ten_thousand_bulk_ones(
    tenant, queue_for, take
):
    queue_for(tenant("ten_a"), 10_000, priority="bulk")
    take()
    [job_id] = queue_for(tenant("ten_b"), 1, priority="interactive", width=128)

    assert [job.id for job in take()] == [job_id]


@pytest.mark.parametrize("distinct", [True, False])
def test_weights_of_one_and_two_share_one_to_two(tenant, queue_for, take, distinct):
    light, heavy = tenant("ten_light"), tenant("ten_heavy", weight=2)
    queue_for(light, 300, num_inference_steps=2)
    queue_for(heavy, 300, **({"width": 128} if distinct else {"num_inference_steps": 2}))

    served = Counter(job.tenant_id for _ in range(36) for job in take())

    assert served[heavy] / served[light] == pytest.approx(2, rel=0.1)


def test_a_share_is_of_the_work_and_not_of_the_number_of_jobs(tenant, queue_for, take):
    quick, slow = tenant("ten_quick"), tenant("ten_slow")
    queue_for(quick, 300, num_inference_steps=1)
    queue_for(slow, 300, num_inference_steps=5)

    served = Counter(job.tenant_id for _ in range(30) for job in take())

    assert served[quick] / served[slow] == pytest.approx(5, rel=0.1)


def test_a_tenant_that_returns_starts_at_the_present_and_not_in_the_past(tenant, queue_for, take):
    busy, away = tenant("ten_busy"), tenant("ten_away")
    queue_for(away, 1)
    queue_for(busy, 400)
    for _ in range(20):
        take()
    queue_for(away, 100)

    served = Counter(job.tenant_id for _ in range(10) for job in take())

    assert served[busy] == pytest.approx(served[away], rel=0.15)


def test_canceled_jobs_are_not_charged(sessions, tenant, queue_for, take):
    canceler, other = tenant("ten_canceler"), tenant("ten_other")
    canceled = queue_for(canceler, 40)
    with sessions.begin() as session:
        for job_id in canceled:
            lifecycle.cancel(session, canceler, job_id)
    queue_for(other, 40)
    queue_for(canceler, 40)

    served = Counter(job.tenant_id for _ in range(5) for job in take())

    assert served[canceler] == pytest.approx(served[other], abs=2)


def test_bulk_jobs_fill_a_microbatch_of_interactive_ones(tenant, queue_for, take):
    bulk = queue_for(tenant("ten_a"), 20, priority="bulk")
    urgent = queue_for(tenant("ten_b"), 2, priority="interactive")

    taken = [job.id for job in take()]

    assert taken[:2] == urgent
    assert taken[2:] == bulk[:6]


def wait(sessions, priority, seconds):
    """Let a priority class have waited for so long."""
    with sessions.begin() as session:
        session.execute(
            update(PriorityClass)
            .where(PriorityClass.priority == priority)
            .values(waiting_since=func.now() - timedelta(seconds=seconds))
        )


@pytest.mark.parametrize(("waited", "served"), [(1.9, "interactive"), (2.1, "bulk")])
def test_a_class_that_has_waited_long_goes_once_before_the_others(
    sessions, tenant, queue_for, take, waited, served
):
    owner = tenant("ten_a")
    queue_for(owner, 30, priority="bulk", width=128)
    queue_for(owner, 30, priority="interactive")
    take()
    wait(sessions, 2, waited * fairness.AGEING.total_seconds())

    assert {job.priority for job in take()} == {["interactive", "normal", "bulk"].index(served)}
    assert {job.priority for job in take()} == {0}


def test_a_worker_keeps_its_key_but_not_forever(tenant, queue_for, take):
    one, other = tenant("ten_one"), tenant("ten_other")
    queue_for(one, 160, num_inference_steps=2)
    queue_for(other, 160, width=128)
    keys, last = [], None
    while taken := take(last_key=last):
        last = taken[0].microbatch_key
        keys.append(last)

    runs = [1]
    for before, after in pairwise(keys):
        runs = [*runs[:-1], runs[-1] + 1] if before == after else [*runs, 1]
    assert len(keys) == 40
    assert 2 <= len(runs) < 20
    assert max(runs[:-1]) <= 2 * (claims.AFFINITY_MICROBATCHES + 1)


def test_a_microbatch_that_is_not_full_lingers_while_the_worker_is_busy(
    sessions, tenant, queue_for, take
):
    [job_id] = queue_for(tenant("ten_a"), 1)

    assert take(idle=False) == []
    with sessions.begin() as session:
        session.execute(update(Job).values(created_at=func.now() - max(claims.LINGER)))
    assert [job.id for job in take(idle=False)] == [job_id]


def test_a_full_microbatch_does_not_linger(tenant, queue_for, take):
    queue_for(tenant("ten_a"), LIMITS["darkroom-demo"])

    assert len(take(idle=False)) == LIMITS["darkroom-demo"]


def test_jobs_of_an_unknown_model_are_not_claimed(sessions, tenant, queue_for, take):
    queue_for(tenant("ten_a"), 3)
    with sessions.begin() as session:
        session.execute(update(Job).values(model="retired"))

    assert take() == []


def test_a_claim_reads_its_indexes_and_no_more_however_long_the_queue_is(
    sessions, tenant, queue_for
):
    owner = tenant("ten_a")
    [first] = queue_for(owner, 1, priority="bulk")
    changed = {"id", "start_tag", "microbatch_key"}
    columns = ", ".join(c.name for c in Job.__table__.columns if c.name not in changed)
    with sessions.begin() as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))  # on a busy machine
        session.execute(
            text(
                f"INSERT INTO job (id, start_tag, microbatch_key, {columns}) SELECT 'job_' || "
                f"md5(n::text), n, 'key ' || n % 20, {columns} "
                "FROM job, generate_series(1, 50000) n WHERE id = :first"
            ),
            {"first": first},
        )
        session.execute(text("ANALYZE job"))
        head = plan_of(session, claims.first_queued(Job.priority == 2))
        candidates = plan_of(
            session,
            claims.candidates_query(
                Job.microbatch_key == "key 7", Job.isolation_group == "", Job.priority == 2
            ).limit(8),
        )
    assert "job_next" in head
    assert "job_claim" in candidates
    for plan in (head, candidates):
        assert "Seq Scan" not in plan, plan
        assert "Sort" not in plan, plan
