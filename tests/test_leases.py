"""The heartbeat keeps what is worked on, and nothing else."""

import time
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from darkroom import dispatches
from darkroom.tables import Dispatch
from workers.leases import Leases

LEASE = timedelta(seconds=0.9)


@pytest.fixture
def leases(sessions):
    beating = Leases(sessions, lease=LEASE)
    beating.start()
    yield beating
    beating.close()


def open_dispatches(sessions):
    """Those that a sweep leaves open."""
    with sessions.begin() as session:
        dispatches.expire_leases(session, max_attempts=3)
        found = session.scalars(select(Dispatch.id).where(Dispatch.status == "running"))
        return set(found)


def test_a_dispatch_is_kept_while_it_is_held_and_no_longer(sessions, queue_jobs, claim, leases):
    queue_jobs({})
    dispatch_id = claim(lease=LEASE)[0].dispatch_id
    with leases.holding(dispatch_id):
        time.sleep(2 * LEASE.total_seconds())
        assert open_dispatches(sessions) == {dispatch_id}
    time.sleep(1.5 * LEASE.total_seconds())

    assert open_dispatches(sessions) == set()


def test_a_dispatch_whose_pump_fell_over_runs_out(sessions, queue_jobs, claim, leases):
    queue_jobs({})
    dispatch_id = claim(lease=LEASE)[0].dispatch_id
    with pytest.raises(ZeroDivisionError), leases.holding(dispatch_id):
        raise ZeroDivisionError
    time.sleep(1.5 * LEASE.total_seconds())

    assert open_dispatches(sessions) == set()
    assert leases.healthy()


def test_the_holder_is_told_that_its_dispatch_was_lost(sessions, queue_jobs, claim, leases):
    queue_jobs({})
    dispatch_id = claim(lease=LEASE)[0].dispatch_id
    told = []
    with leases.holding(dispatch_id) as hold:
        hold.on_lost = lambda: told.append(dispatch_id)
        with sessions.begin() as session:
            lost = update(Dispatch).values(status="expired", finished_at=func.now())
            session.execute(lost)
        time.sleep(LEASE.total_seconds())

    assert set(told) == {dispatch_id}


def test_without_a_database_it_is_unhealthy_and_recovers(leases, postgres_server):
    assert leases.healthy()
    postgres_server.kill()
    time.sleep(LEASE.total_seconds())
    assert not leases.healthy()
    postgres_server.restart()
    time.sleep(LEASE.total_seconds())
    assert leases.healthy()
