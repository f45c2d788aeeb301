"""The heartbeat keeps what is worked on, and nothing else."""

import threading
import time
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from darkroom.db.tables import Dispatch
from darkroom.queue import dispatches
from tests.support.servers import ServerProcess
from workers.generation.heartbeat import LeaseHeartbeat

LEASE = timedelta(seconds=0.9)


class Call:
    """A call that only notes when it is canceled."""

    def __init__(self):
        self.canceled = threading.Event()

    def cancel(self):
        self.canceled.set()


@pytest.fixture
def heartbeat(sessions):
    beating = LeaseHeartbeat(sessions, lease=LEASE)
    beating.start()
    yield beating
    beating.close()


def open_dispatches(sessions):
    """Those that a sweep leaves open."""
    with sessions.begin() as session:
        dispatches.expire_leases(session, max_attempts=3)
        found = session.scalars(select(Dispatch.id).where(Dispatch.status == "running"))
        return set(found)


def test_a_dispatch_is_kept_while_it_is_held_and_no_longer(sessions, queue_jobs, claim, heartbeat):
    queue_jobs({})
    dispatch_id = claim(lease=LEASE)[0].dispatch_id
    with heartbeat.keep(dispatch_id):
        time.sleep(2 * LEASE.total_seconds())
        assert open_dispatches(sessions) == {dispatch_id}
    time.sleep(1.5 * LEASE.total_seconds())

    assert open_dispatches(sessions) == set()


def test_a_dispatch_whose_pump_fell_over_runs_out(sessions, queue_jobs, claim, heartbeat):
    queue_jobs({})
    dispatch_id = claim(lease=LEASE)[0].dispatch_id
    with pytest.raises(ZeroDivisionError), heartbeat.keep(dispatch_id):
        raise ZeroDivisionError
    time.sleep(1.5 * LEASE.total_seconds())

    assert open_dispatches(sessions) == set()
    assert heartbeat.healthy()


def test_the_holder_is_told_that_its_dispatch_was_lost(sessions, queue_jobs, claim, heartbeat):
    queue_jobs({})
    dispatch_id = claim(lease=LEASE)[0].dispatch_id
    call = Call()
    with heartbeat.keep(dispatch_id) as in_flight, in_flight.generating(call, ["job"]):
        with sessions.begin() as session:
            lost = update(Dispatch).values(status="expired", finished_at=func.now())
            session.execute(lost)
        assert call.canceled.wait(10)


@pytest.mark.parametrize("fault", [ServerProcess.kill, ServerProcess.freeze])
def test_what_cannot_be_renewed_is_given_up(heartbeat, postgres_server, fault):
    call = Call()
    with heartbeat.keep(1) as in_flight, in_flight.generating(call, ["job"]):
        fault(postgres_server)
        assert call.canceled.wait(10)
    assert not heartbeat.healthy()


def test_what_is_claimed_after_the_retirement_is_given_up_at_once(heartbeat):
    heartbeat.stop_accepting()
    call = Call()
    with heartbeat.keep(1) as in_flight, in_flight.generating(call, ["job"]):
        assert call.canceled.is_set()


def test_who_waits_for_idleness_waits_for_the_last_hold(heartbeat):
    assert heartbeat.wait_idle(0)
    with heartbeat.keep(1):
        assert not heartbeat.wait_idle(0.05)
    assert heartbeat.wait_idle(0)


def test_without_a_database_it_is_unhealthy_and_recovers(heartbeat, postgres_server):
    assert heartbeat.healthy()
    postgres_server.kill()
    time.sleep(LEASE.total_seconds())
    assert not heartbeat.healthy()
    postgres_server.restart()
    time.sleep(LEASE.total_seconds())
    assert heartbeat.healthy()
