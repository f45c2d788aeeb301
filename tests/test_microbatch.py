"""The heart of a worker, with real rows and a real store; only what draws is given by hand."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
from conftest import LEASE
from pydantic import SecretStr
from sqlalchemy import func, select, update
from test_storage import store_of

from darkroom import jobs
from darkroom.errors import (
    GeneratorGone,
    GeneratorUnavailable,
    MicrobatchCrashed,
    StorageUnavailable,
)
from darkroom.queue import Bell
from darkroom.settings import Settings
from darkroom.tables import DEFAULT_TENANT, Dispatch, Job
from workers.app import Crew, run_pump
from workers.generator import Mishap, Picture
from workers.janitor import Janitor
from workers.leases import Leases
from workers.microbatch import Workshop, pump
from workers.sweep import Sweeper


class ByHand:
    """A generator that answers what the test says: drawings, or an error to raise."""

    def __init__(self, answer):
        self.answer = answer

    def begin(self, microbatch):
        self.microbatch = microbatch
        return self

    def result(self, timeout_s):  # noqa: ARG002  # nothing here takes long
        answer = self.answer(self.microbatch)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self):
        raise AssertionError("nobody asked for this")


def pictures_of(microbatch):
    return [Picture(np.zeros((p.height, p.width, 3), np.uint8), 1) for p in microbatch]


@pytest.fixture
def shop(sessions, catalogue, s3_settings, redis_url):
    bell = Bell(Settings(redis_url=SecretStr(redis_url)))
    with ThreadPoolExecutor(4) as encoders:
        yield Workshop(
            worker_id="worker",
            sessions=sessions,
            catalogue=catalogue,
            generator=ByHand(pictures_of),
            store=store_of(s3_settings),
            leases=Leases(sessions, lease=LEASE),
            bell=bell,
            encoders=encoders,
            lease=LEASE,
            generate_timeout_s=5,
            max_attempts=3,
        )
    bell.close()


def job(shop, job_id):
    with shop.sessions.begin() as session:
        return jobs.find(session, DEFAULT_TENANT, job_id)


def run(shop, answer=pictures_of):
    shop.generator.answer = answer
    return pump(shop, stopping=lambda: False)


def open_dispatches(shop):
    with shop.sessions.begin() as session:
        running = select(func.count()).select_from(Dispatch).where(Dispatch.status == "running")
        return session.scalar(running)


def test_a_pump_draws_until_nothing_is_left(shop, queue_jobs):
    ids = queue_jobs(*[{"width": 64, "height": 64}] * 19)

    assert run(shop) == 3
    assert {job(shop, job_id).status for job_id in ids} == {"succeeded"}
    assert open_dispatches(shop) == 0


def test_a_picture_of_the_wrong_size_is_an_error_never_a_result(shop, queue_jobs):
    right, wrong = queue_jobs({}, {})

    def answer(microbatch):
        return [pictures_of(microbatch)[0], Picture(np.zeros((8, 8, 3), np.uint8), 1)]

    run(shop, answer)
    assert job(shop, right).status == "succeeded"
    assert (job(shop, wrong).status, job(shop, wrong).error_code) == ("failed", "bad_output")


def test_a_mishap_fails_its_own_job_only(shop, queue_jobs):
    good, bad = queue_jobs({}, {})
    run(shop, lambda asked: [pictures_of(asked)[0], Mishap("not_finite", "not a number")])

    assert job(shop, good).status == "succeeded"
    assert (job(shop, bad).status, job(shop, bad).error_code) == ("failed", "not_finite")


@pytest.mark.parametrize("answer", [lambda _: [], lambda _: MicrobatchCrashed("died")])
def test_a_crash_or_a_wrong_count_makes_suspects(shop, queue_jobs, answer):
    [job_id] = queue_jobs({})
    shop.generator.answer = answer
    for _ in range(3):
        pump(shop, stopping=lambda: False)

    ended = job(shop, job_id)
    assert (ended.status, ended.error_code, ended.attempt) == ("failed", "crashed_worker", 3)
    assert open_dispatches(shop) == 0


def test_without_a_replica_the_jobs_go_back_and_lose_no_attempt(shop, queue_jobs):
    [job_id] = queue_jobs({})
    with pytest.raises(GeneratorUnavailable):
        run(shop, lambda _: GeneratorUnavailable("no replica"))

    waiting = job(shop, job_id)
    assert (waiting.status, waiting.attempt, waiting.setbacks) == ("queued", 0, 1)
    assert open_dispatches(shop) == 0


def test_a_store_that_fails_in_mid_drawing_sends_the_job_back(shop, queue_jobs, s3_server):
    [job_id] = queue_jobs({})

    def answer(microbatch):
        s3_server.kill()
        return pictures_of(microbatch)

    run(shop, answer)
    waiting = job(shop, job_id)
    assert (waiting.status, waiting.attempt, waiting.setbacks) == ("queued", 0, 1)


def test_nothing_is_claimed_that_could_not_be_stored(shop, queue_jobs, s3_server):
    [job_id] = queue_jobs({})
    s3_server.kill()
    with pytest.raises(StorageUnavailable):
        run(shop)
    assert (job(shop, job_id).status, job(shop, job_id).setbacks) == ("queued", 0)


def test_a_worker_whose_cluster_is_gone_leaves_at_the_second_time(shop, queue_jobs):
    queue_jobs({})
    left = []
    sweeper = Sweeper(
        shop.sessions, shop.bell, every=timedelta(seconds=5), lease=LEASE, max_attempts=3
    )
    janitor = Janitor(
        shop.sessions,
        shop.store,
        every=timedelta(seconds=60),
        retention_days=None,
        orphan_age=timedelta(hours=24),
    )
    crew = Crew(shop, sweeper, janitor, leave=lambda: left.append(True))
    shop.generator.answer = lambda _: GeneratorGone("no cluster")
    for expected in ([], [True]):
        with shop.sessions.begin() as session:
            session.execute(update(Job).values(run_after=func.now() - timedelta(seconds=1)))
        run_pump(crew)
        assert left == expected
