"""The negative controls: with one guard removed, the same rows must come out red: `make chaos`."""

import random
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import replace

import pytest
from redis import Redis

from tests.chaos import server_rows, worker_rows
from tests.chaos.checks import violations
from tests.chaos.client import Wanted
from tests.chaos.lab import Lab
from tests.chaos.run import Run

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]
PATIENT = {
    "DARKROOM_MICROBATCH_TIMEOUT_S": "60"
}  #: it brings pictures after its sleep, not a crash
SHORT_LEASE = {"DARKROOM_LEASE_S": "2"}  #: shorter than what is drawn takes
DIES_AFTER_COMMIT = {"DARKROOM_FAULT_POINT": "after-settle-commit"}


@pytest.fixture
def own_lab(ground, tmp_path):
    """Apart from the other rows': whatever becomes of it, it is theirs no more."""
    opened = Lab(ground, tmp_path, workers=0, redis_database=2)
    yield opened
    opened.close()


@pytest.fixture
def control(own_lab, dice, record):
    @contextmanager
    def controlled(name: str, guard: str, must_find: Collection[str], **how):
        run = Run(name, guard, own_lab, dice, quiet_within_s=15, **how)
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


def saboteur(lab, guard, environment=None, **how):
    return lab.hire(without(guard) | (environment or {}), module="tests.chaos.sabotage", **how)


def a_batch(run, prompt="a witness", size=8):
    return run.submit(*[Wanted(prompt, run.dice.randrange(2**32)) for _ in range(size)])


def test_n1_without_the_fence_a_job_ends_twice(own_lab, control):
    with own_lab.sessions.begin() as session:  # the database would refuse it as well
        session.connection().exec_driver_sql("DROP TRIGGER job_moves ON job")
    with control("N1", "fence", {"I2", "fence"}) as run:
        sleeper = saboteur(own_lab, "fence", PATIENT)
        own_lab.wait_ready(sleeper)
        own_lab.hire()
        own_lab.wait_ready()
        worker_rows.frozen(run, jobs=120, sleeper=sleeper, patience_s=10)


@pytest.mark.parametrize("guarded", [True, False])
def test_n2_without_the_heartbeat_long_drawings_are_lost(own_lab, control, dice, guarded):
    if guarded:  # it is the heartbeat that makes the difference
        own_lab.hire(SHORT_LEASE)
        own_lab.wait_ready()
        run = Run("N2", "nothing", own_lab, dice, quiet_within_s=60)
        a_batch(run, "slow:4.2 a glacier", 2)
        assert run.quiet()
        assert violations(run.evidence()) == []
        run.client.close()
        return
    with control("N2", "heartbeat", {"I1"}) as run:
        saboteur(own_lab, "heartbeat", SHORT_LEASE)
        own_lab.wait_ready()
        run.quiet_within_s = 40
        a_batch(run, "slow:4.2 a glacier", 2)


def test_n3_with_the_outbox_after_the_commit_ends_are_told_to_nobody(own_lab, control):
    with (
        own_lab.listening() as receiver,
        control(
            "N3", "outbox in the same transaction", {"I1", "I4", "I7"}, receiver=receiver
        ) as run,
    ):
        victim = saboteur(own_lab, "outbox", DIES_AFTER_COMMIT, keep=False)
        own_lab.wait_ready(victim)
        a_batch(run)
        own_lab.wait_until(lambda: victim.running.process.poll() is not None)
        own_lab.hire()


def test_n4_without_the_reconciler_a_flush_loses_jobs(own_lab, control):
    with control("N4", "reconciler, then FLUSHALL", {"I1"}) as run:
        own_lab.workers = [saboteur(own_lab, "reconciler") for _ in range(2)]
        own_lab.wait_ready()
        a_batch(run)
        assert run.quiet()
        own_lab.wait_until(lambda: False, within_s=3)  # nobody holds a hint that still rang
        with Redis.from_url(own_lab.redis_url) as client:
            server_rows.flushed_before_anybody_heard(run, client)


def test_n5_with_the_upload_after_completion_pictures_are_missing(own_lab, control):
    with control("N5", "upload before completion", {"I3"}) as run:
        victim = saboteur(own_lab, "upload-first", DIES_AFTER_COMMIT, keep=False)
        own_lab.wait_ready(victim)
        a_batch(run)
        own_lab.wait_until(lambda: victim.running.process.poll() is not None)
        own_lab.hire()


def test_n6_the_checks_find_a_doubled_and_a_missing_row(lab, record):
    run = Run("N6", "one row missing, one there twice", lab, random.Random(6))
    a_batch(run, size=20)
    assert run.quiet()
    found = run.evidence()
    assert violations(found) == []
    _, twice, *_ = found.jobs
    doctored = replace(found, jobs=[*found.jobs[1:], twice])
    judge(run, violations(doctored), {"I1", "I2"}, record)
