"""Maintenance passes: one process leads, lapsed leases are requeued, old rows are deleted."""

import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
from redis import Redis
from sqlalchemy import func, select, update
from sqlalchemy.exc import DBAPIError

from darkroom.db.locks import AdvisoryLock, try_lock
from darkroom.db.tables import DEFAULT_TENANT, Dispatch, IdempotencyKey, Job
from tests.support.worker_context import job
from workers.maintenance.cleaner import Cleaner
from workers.maintenance.maintenance import Maintenance
from workers.maintenance.reaper import Reaper

LEASE = timedelta(seconds=30)


@pytest.fixture
def reaper(ctx):
    return Reaper(ctx.sessions, ctx.notifier, lease=LEASE, max_attempts=3)


@pytest.fixture
def cleaner(ctx):
    return Cleaner(ctx.sessions, ctx.store, retention_days=None, orphan_age=timedelta(hours=24))


def lapse_leases(ctx):
    with ctx.sessions.begin() as session:
        session.execute(update(Dispatch).values(leased_until=func.now() - timedelta(seconds=1)))


def test_jobs_of_a_lapsed_lease_are_requeued_and_workers_woken(
    ctx, reaper, queue_jobs, claim, redis_url
):
    [job_id] = queue_jobs({})
    claim()
    lapse_leases(ctx)
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
        reaper.reap()
        deadline = time.monotonic() + 20
        while not redis.llen("darkroom:generate"):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    assert (job(ctx, job_id).status, job(ctx, job_id).attempt) == ("queued", 1)


def test_an_overdue_job_expires(ctx, reaper, queue_jobs):
    [job_id] = queue_jobs({})
    with ctx.sessions.begin() as session:
        session.execute(update(Job).values(expires_at=func.now() - timedelta(seconds=1)))
    reaper.reap()

    assert job(ctx, job_id).status == "expired"


def test_no_lease_expires_for_the_length_of_one_after_a_failure(
    ctx, reaper, queue_jobs, claim, postgres_server
):
    [job_id] = queue_jobs({})
    claim()
    lapse_leases(ctx)
    failed = Reaper(ctx.sessions, ctx.notifier, lease=timedelta(hours=1), max_attempts=3)
    postgres_server.kill()
    with pytest.raises(DBAPIError):
        failed.reap()
    postgres_server.restart()
    failed.reap()
    assert job(ctx, job_id).status == "running"
    reaper.reap()

    assert job(ctx, job_id).status == "queued"


def test_only_the_leader_runs_a_pass(ctx, reaper, queue_jobs, claim):
    [job_id] = queue_jobs({})
    claim()
    lapse_leases(ctx)
    with try_lock(ctx.sessions, AdvisoryLock.REAP) as leads:
        assert leads
        reaper.reap()
        assert job(ctx, job_id).status == "running"
    reaper.reap()

    assert job(ctx, job_id).status == "queued"


class SilentSessions:
    """Transactions of a process whose network is gone in the middle of the first."""

    def __init__(self, sessions):
        self.kw, self._sessions = sessions.kw, sessions
        self.silent, self.back = threading.Event(), threading.Event()

    @contextmanager
    def begin(self):
        session = self._sessions()
        yield session
        self.silent.set()
        self.back.wait()
        session.invalidate()


def test_a_leader_that_falls_silent_in_a_pass_loses_the_lead(ctx, reaper, queue_jobs, claim):
    sessions = SilentSessions(ctx.sessions)
    leader = Reaper(sessions, ctx.notifier, lease=timedelta(seconds=30), max_attempts=3)
    thread = threading.Thread(target=leader.reap)
    thread.start()
    try:
        assert sessions.silent.wait(30)
        [job_id] = queue_jobs({})
        claim()
        lapse_leases(ctx)
        deadline = time.monotonic() + 60  # it hangs: PostgreSQL ends an idle transaction after 5 s
        while job(ctx, job_id).status == "running":
            assert time.monotonic() < deadline
            reaper.reap()
            time.sleep(0.05)
        assert job(ctx, job_id).status == "queued"
    finally:
        sessions.back.set()
        thread.join()


def test_old_idempotency_keys_are_deleted(ctx, cleaner):
    with ctx.sessions.begin() as session:
        for key, age in (("old", 25), ("new", 23)):
            session.add(
                IdempotencyKey(
                    tenant_id=DEFAULT_TENANT,
                    key=key,
                    request_sha256="0" * 64,
                    response="{}",
                    created_at=func.now() - timedelta(hours=age),
                )
            )
    cleaner.clean()

    with ctx.sessions.begin() as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["new"]


def test_maintenance_runs_the_reaper_at_its_interval(ctx, reaper, cleaner, queue_jobs, claim):
    [job_id] = queue_jobs({})
    claim()
    lapse_leases(ctx)
    maintenance = Maintenance(reaper, cleaner, interval=timedelta(seconds=0.1))
    maintenance.start()
    deadline = time.monotonic() + 20
    while job(ctx, job_id).status != "queued":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    maintenance.close()
