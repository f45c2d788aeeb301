"""The negative controls: with one guard removed, the same rows must come out red: `make chaos`."""

import random
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import replace

import pytest
from redis import Redis

from tests.chaos import server_rows, worker_rows
from tests.chaos.checks import violations
from tests.chaos.client import ExpectedImage
from tests.chaos.run import FaultRun
from tests.chaos.system import SystemUnderTest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]
PATIENT = {"DARKROOM_MICROBATCH_TIMEOUT_S": "60"}  #: it returns images after its sleep, not a crash
SHORT_LEASE = {"DARKROOM_LEASE_S": "2"}  #: shorter than generating takes
DIES_AFTER_COMMIT = {"DARKROOM_FAULT_POINT": "after-settle-commit"}


@pytest.fixture
def own_system(backing_servers, tmp_path):
    """Apart from the other rows': whatever becomes of it, it is theirs no more."""
    opened = SystemUnderTest(backing_servers, tmp_path, workers=0, redis_database=2)
    yield opened
    opened.close()


@pytest.fixture
def control(own_system, rng, record):
    @contextmanager
    def controlled(name: str, guard: str, must_find: Collection[str], **how):
        run = FaultRun(name, guard, own_system, rng, quiet_within_s=15, **how)
        yield run
        run.quiet()
        judge(run, violations(run.evidence()), must_find, record)

    return controlled


def judge(run, found, must_find, record):
    result = replace(run.judged(found), must_find=frozenset(must_find))
    run.client.close()
    record(result)
    assert result.must_find <= result.found, f"{run.fault}: found {result.found or 'nothing'}"


def without(guard: str) -> dict[str, str]:
    return {"CHAOS_WITHOUT": guard}


def saboteur(system, guard, environment=None, **how):
    return system.start_worker(
        without(guard) | (environment or {}), module="tests.chaos.sabotage", **how
    )


def a_batch(run, prompt="a witness", size=8):
    return run.submit(*[ExpectedImage(prompt, run.rng.randrange(2**32)) for _ in range(size)])


def test_n1_without_the_fence_a_job_ends_twice(own_system, control):
    with own_system.sessions.begin() as session:  # the database would refuse it as well
        session.connection().exec_driver_sql("DROP TRIGGER job_moves ON job")
    with control("N1", "fence", {"I2", "fence"}) as run:
        sleeper = saboteur(own_system, "fence", PATIENT)
        own_system.wait_ready(sleeper)
        own_system.start_worker()
        own_system.wait_ready()
        worker_rows.frozen(run, jobs=120, sleeper=sleeper, patience_s=10)


@pytest.mark.parametrize("guarded", [True, False])
def test_n2_without_the_heartbeat_long_drawings_are_lost(own_system, control, rng, guarded):
    if guarded:  # it is the heartbeat that makes the difference
        own_system.start_worker(SHORT_LEASE)
        own_system.wait_ready()
        run = FaultRun("N2", "nothing", own_system, rng, quiet_within_s=60)
        a_batch(run, "slow:4.2 a glacier", 2)
        assert run.quiet()
        assert violations(run.evidence()) == []
        run.client.close()
        return
    with control("N2", "heartbeat", {"I1"}) as run:
        saboteur(own_system, "heartbeat", SHORT_LEASE)
        own_system.wait_ready()
        run.quiet_within_s = 40
        a_batch(run, "slow:4.2 a glacier", 2)


def test_n3_with_the_outbox_after_the_commit_ends_are_told_to_nobody(own_system, control):
    with (
        own_system.listening() as receiver,
        control(
            "N3", "outbox in the same transaction", {"I1", "I4", "I7"}, receiver=receiver
        ) as run,
    ):
        victim = saboteur(own_system, "outbox", DIES_AFTER_COMMIT, keep=False)
        own_system.wait_ready(victim)
        a_batch(run)
        own_system.wait_until(lambda: victim.running.process.poll() is not None)
        own_system.start_worker()


def test_n4_without_the_reconciler_a_flush_loses_jobs(own_system, control):
    with control("N4", "reconciler, then FLUSHALL", {"I1"}) as run:
        own_system.workers = [saboteur(own_system, "reconciler") for _ in range(2)]
        own_system.wait_ready()
        a_batch(run)
        assert run.quiet()
        own_system.wait_until(lambda: False, within_s=3)  # no worker holds a hint any more
        with Redis.from_url(own_system.redis_url) as client:
            server_rows.flushed_before_any_worker_heard(run, client)


def test_n5_with_the_upload_after_completion_pictures_are_missing(own_system, control):
    with control("N5", "upload before completion", {"I3"}) as run:
        victim = saboteur(own_system, "upload-first", DIES_AFTER_COMMIT, keep=False)
        own_system.wait_ready(victim)
        a_batch(run)
        own_system.wait_until(lambda: victim.running.process.poll() is not None)
        own_system.start_worker()


def test_n6_the_checks_find_a_doubled_and_a_missing_row(system, record):
    run = FaultRun("N6", "one row missing, one there twice", system, random.Random(6))
    a_batch(run, size=20)
    assert run.quiet()
    found = run.evidence()
    assert violations(found) == []
    _, twice, *_ = found.jobs
    doctored = replace(found, jobs=[*found.jobs[1:], twice])
    judge(run, violations(doctored), {"I1", "I2"}, record)
