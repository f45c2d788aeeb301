"""Step progress in Redis: written by workers, read by the API, never required."""

import time
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr
from sqlalchemy import func, update

from darkroom.db.connection import open_sessions
from darkroom.db.tables import DEFAULT_TENANT, Dispatch, Job
from darkroom.jobs import progress, queries
from darkroom.queue import dispatches
from darkroom.settings import Settings


@pytest.fixture
def redis(redis_url):
    with progress.open_progress_redis(Settings(redis_url=SecretStr(redis_url))) as opened:
        yield opened


@pytest.fixture
def running(queue_jobs, claim):
    queue_jobs(*[{}] * 3)
    return claim()


def published(redis, running, *steps):
    ids = [job.id for job in running]
    progress.publish(redis, {running[0].dispatch_id: dict(zip(ids, steps, strict=False))})


def test_published_steps_are_read(redis, running):
    published(redis, running, (3, 20), (1, 8))

    first, second, _ = running
    assert progress.read(redis, running) == {first.id: (3, 20), second.id: (1, 8)}


def test_the_last_published_step_counts(redis, running):
    published(redis, running, (3, 20), (1, 8))
    published(redis, running, (4, 20))

    assert list(progress.read(redis, running).values()) == [(4, 20), (1, 8)]


def test_a_requeued_job_does_not_show_its_last_attempt(redis, sessions, running, claim):
    published(redis, running, (3, 20))
    with sessions.begin() as session:
        dispatches.release(session, "worker")

    assert progress.read(redis, claim()) == {}


def test_a_queued_job_has_no_progress(redis, sessions, queue_jobs):
    [job_id] = queue_jobs({})
    with sessions.begin() as session:
        queued = queries.find(session, DEFAULT_TENANT, job_id)

    assert progress.read(redis, [queued]) == {}


def test_it_expires(redis, running):
    published(redis, running, (3, 20))

    [key] = redis.keys("darkroom:progress:*")
    assert 0 < redis.ttl(key) <= 60


@pytest.mark.parametrize("garbage", [b"", b"3", b"3/x", b"-1/2", b"1/2/3", b"\xff\x00", b"9" * 99])
def test_garbage_is_not_read(redis, running, garbage):
    redis.hset(f"darkroom:progress:{running[0].dispatch_id}", running[0].id, garbage)
    assert progress.read(redis, running) == {}


def test_a_key_of_another_type_is_not_read(redis, running):
    redis.rpush(f"darkroom:progress:{running[0].dispatch_id}", "garbage")
    assert progress.read(redis, running) == {}


def test_without_redis_progress_is_soon_unknown(redis, running, redis_server):
    published(redis, running, (3, 20))
    redis_server.freeze()
    started_at = time.monotonic()

    assert progress.read(redis, running) == {}
    assert time.monotonic() - started_at < 5


def running_row(api_database, job_id):
    """Return the job's row as a claim would leave it."""
    sessions = open_sessions(api_database, pool_size=1)
    with sessions.begin() as session:
        dispatch = Dispatch(
            worker_id="worker",
            microbatch_key="key",
            size=1,
            cost=1,
            leased_until=datetime.now(UTC),
        )
        session.add(dispatch)
        session.flush()
        running = {"status": "running", "dispatch_id": dispatch.id, "started_at": func.now()}
        session.execute(update(Job).where(Job.id == job_id).values(running))
        row = session.get(Job, job_id)
    sessions.kw["bind"].dispose()
    return row


def test_a_running_job_shows_its_steps_alone_and_in_a_list(http, api_database, redis):
    job = {"prompt": "a red apple", "num_inference_steps": 9}
    row = running_row(api_database, http.post("/v1/jobs", json=job).json()["id"])
    before = http.get(f"/v1/jobs/{row.id}")
    assert before.json()["progress"] == {"step": None, "steps": 9}
    progress.publish(redis, {row.dispatch_id: {row.id: (4, 9)}})

    alone = http.get(f"/v1/jobs/{row.id}", headers={"If-None-Match": before.headers["etag"]})
    assert alone.json()["progress"] == {"step": 4, "steps": 9}
    listed = http.get("/v1/jobs?limit=100").json()["data"]
    assert [one["progress"] for one in listed if one["id"] == row.id] == [{"step": 4, "steps": 9}]
