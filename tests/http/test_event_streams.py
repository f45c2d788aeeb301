"""Event streams as clients follow them: a real API process, its events written by hand."""

import asyncio
import signal
import threading
from contextlib import contextmanager, suppress

import httpx2
import psutil
import pytest
from redis import Redis
from sqlalchemy import text

from darkroom.accounts import api_keys
from darkroom.db.tables import DEFAULT_TENANT, Tenant
from darkroom.ids import new_id
from darkroom.jobs import lifecycle, progress
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from darkroom.status import Scope
from tests.conftest import LEASE, LIMITS
from tests.support.api_server import CSV, assert_problem, serve, stop, without_forecast

SOON_S = 30
UNLIMITED = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


@pytest.fixture(scope="module", autouse=True)
def keep_alive(api_url, api_sessions):
    """Set when a stream without events has sent a sign of life, every 15 s; open from the start."""
    with httpx2.Client(base_url=api_url) as client:
        batch = submit_batch(client, 1)
    with api_sessions.begin() as session:
        lifecycle.pause_batch(session, DEFAULT_TENANT, batch["id"])
    opened, alive = threading.Event(), threading.Event()

    def listen():
        with (
            suppress(httpx2.TransportError),  # the server may exit before it has to send one
            httpx2.stream("GET", api_url + batch["urls"]["events"], timeout=SOON_S) as response,
        ):
            opened.set()
            for line in response.iter_lines():
                if line.startswith(":"):
                    alive.set()
                    return

    threading.Thread(target=listen, daemon=True).start()
    assert opened.wait(SOON_S)
    return alive


@pytest.fixture(autouse=True)
def _queue(empty_queue):
    """Only the jobs of the test can be claimed."""


@pytest.fixture
def work(sessions):
    """Claim every queued job; with `settle=True` all of them succeed."""

    def run(*, settle=True):
        taken = []
        while True:
            with sessions.begin() as session:
                claimed = claims.claim(session, "worker", max_microbatch=LIMITS, lease=LEASE)
            if not claimed:
                return taken
            taken += claimed
            if settle:
                finish(sessions, claimed)

    return run


def finish(sessions, claimed, **failed):
    with sessions.begin() as session:
        outcomes = [
            Failed(job.id, **failed)
            if failed
            else Succeeded(job.id, f"a/{job.id}.png", "0" * 64, 10, inference_ms=5, upload_ms=1)
            for job in claimed
        ]
        assert dispatches.settle(session, claimed[0].dispatch_id, outcomes)


def submit(http, **fields):
    return http.post("/v1/jobs", json={"prompt": "a red apple"} | fields).json()


def submit_batch(http, total):
    text = "prompt\n" + "a cat\n" * total
    return http.post("/v1/batches", content=text, headers=CSV).json()


@contextmanager
def following(http, thing, last_id=None):
    """The stream of a job or batch, from its urls."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    with http.sse(thing["urls"]["events"], headers=headers) as stream:
        assert stream.response.status_code == 200, stream.response.read()
        yield iter(stream)


def follow(http, thing, last_id=None):
    with following(http, thing, last_id) as stream:
        return list(stream)


def numbered(received):
    """Without what has no id: progress and counts."""
    return [event for event in received if event.event not in {"progress", "counts"}]


def test_a_job_is_followed_from_its_snapshot_to_its_last_event(http, sessions, work):
    job = submit(http)
    with following(http, job) as stream:
        first = next(stream)
        [running] = work(settle=False)
        started = next(stream)
        finish(sessions, [running])
        rest = numbered(stream)

    assert (first.event, without_forecast(first.json())) == ("snapshot", without_forecast(job))
    assert started.event == "job.started"
    assert [event.event for event in rest] == ["job.succeeded"]
    data = rest[0].json()
    assert [data[key] for key in ("id", "object", "type")] == [rest[0].id, "event", rest[0].event]
    assert data["data"] == {
        "id": job["id"],
        "object": "job",
        "status": "succeeded",
        "batch_id": None,
        "row_number": None,
        "custom_id": None,
        "error": None,
        "urls": job["urls"],
    }
    assert len({first.id, started.id, rest[0].id}) == 3
    assert first.retry >= 1000


def test_a_stream_has_its_media_type_and_may_not_be_cached(http, work):
    job = submit(http)
    work()
    with http.sse(job["urls"]["events"]) as stream:
        headers = stream.response.headers

    assert headers["content-type"].startswith("text/event-stream")
    assert "no-cache" in headers["cache-control"]
    assert headers["x-accel-buffering"] == "no"


def test_a_finished_job_is_a_snapshot_and_no_more(http, work):
    job = submit(http)
    work()
    [only] = follow(http, job)

    assert (only.event, only.json()["status"]) == ("snapshot", "succeeded")


def test_a_failed_job_has_its_error_in_the_event(http, sessions, work):
    job = submit(http)
    with following(http, job) as stream:
        next(stream)
        finish(sessions, work(settle=False), code="invalid_output", message="no image")
        [*_, last] = stream

    assert last.event == "job.failed"
    assert last.json()["data"]["error"] == {
        "code": "invalid_output",
        "message": "no image",
        "retryable": False,
    }


def test_a_batch_is_followed_with_its_jobs_and_counts_to_its_end(http, work):
    batch = submit_batch(http, 20)
    with following(http, batch) as stream:
        first = next(stream)
        work()
        received = list(stream)

    assert (first.event, without_forecast(first.json())) == ("snapshot", without_forecast(batch))
    events = numbered(received)
    assert sorted(event.event for event in events[:-1]) == (
        ["job.started"] * 20 + ["job.succeeded"] * 20
    )
    rows = [
        event.json()["data"]["row_number"] for event in events if event.event == "job.succeeded"
    ]
    assert sorted(rows) == list(range(1, 21))
    assert events[-1].event == "batch.completed"
    assert events[-1].json()["data"]["status"] == "completed"
    assert len({event.id for event in events}) == 41


def test_counts_are_sent_at_each_change(http, sessions, work):
    batch = submit_batch(http, 8)
    with following(http, batch) as stream:
        next(stream)
        running = work(settle=False)
        counts = next(event for event in stream if event.event == "counts")
        finish(sessions, running)
        rest = numbered(stream)

    assert counts.json() == batch["counts"] | {"queued": 0, "running": 8}
    assert rest[-1].event == "batch.completed"


def test_a_canceled_batch_ends_its_stream(http, sessions):
    batch = submit_batch(http, 3)
    with following(http, batch) as stream:
        next(stream)
        with sessions.begin() as session:
            lifecycle.cancel_batch(session, DEFAULT_TENANT, batch["id"])
        events = numbered(stream)

    assert [event.event for event in events] == ["job.canceled"] * 3 + ["batch.canceled"]
    assert events[-1].json()["data"]["status"] == "canceled"


def test_progress_is_sent_while_a_job_runs_and_only_when_it_changes(
    http, sessions, work, redis_server
):
    job = submit(http)
    with Redis.from_url(redis_server.url) as progress_redis, following(http, job) as stream:
        next(stream)
        [running] = work(settle=False)
        assert next(stream).event == "job.started"
        progress.publish(progress_redis, {running.dispatch_id: {job["id"]: (3, 12)}})
        third = next(stream)
        progress.publish(progress_redis, {running.dispatch_id: {job["id"]: (4, 12)}})
        fourth = next(stream)
        finish(sessions, [running])
        rest = [event.event for event in stream]

    assert [step.event for step in (third, fourth)] == ["progress"] * 2
    assert [step.json() for step in (third, fourth)] == [
        {"step": 3, "steps": 12},
        {"step": 4, "steps": 12},
    ]
    assert rest == ["job.succeeded"]


def test_after_any_last_event_the_rest_comes_without_gap_or_repetition(http, work):
    batch = submit_batch(http, 3)
    with following(http, batch) as stream:
        everything = [next(stream)]
        work()
        everything += numbered(stream)

    for number, event in enumerate(everything[:-1], start=1):
        rest = numbered(follow(http, batch, last_id=event.id))
        assert [again.id for again in rest] == [later.id for later in everything[number:]]
    last = http.get(batch["urls"]["events"], headers={"Last-Event-ID": everything[-1].id})
    assert (last.status_code, last.content) == (204, b"")


def test_an_unknown_last_event_is_answered_with_a_snapshot(http, work):
    job = submit(http)
    work()
    [only] = follow(http, job, last_id="evt_" + "f" * 32)

    assert only.event == "snapshot"


@contextmanager
def serving(environment, log):
    """An API process of the test's own, and a client of it."""
    process, url = serve(environment, log)
    try:
        with httpx2.Client(base_url=url, timeout=SOON_S) as client:
            yield process, client
    finally:
        stop(process)


def test_a_stream_survives_the_restart_of_the_api(api_environment, sessions, work, tmp_path):
    with serving(api_environment, tmp_path / "one") as (process, http):
        batch = submit_batch(http, 3)
        with following(http, batch) as stream:
            received = [next(stream)]
            running = work(settle=False)
            received.append(next(stream))
            process.send_signal(signal.SIGTERM)
            received += stream  # to its end, which is no error
        process.wait(SOON_S)
    assert "graceful shutdown exceeded" not in (tmp_path / "one").read_text()
    finish(sessions, running)
    with serving(api_environment, tmp_path / "two") as (_, http):
        seen = numbered(received)
        seen += numbered(follow(http, batch, last_id=seen[-1].id))

    assert [event.event for event in seen] == [
        "snapshot",
        *["job.started"] * 3,
        *["job.succeeded"] * 3,
        "batch.completed",
    ]
    assert len({event.id for event in seen}) == 8


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/jobs/job_" + "0" * 32 + "/events", {}, 404),
        ("/v1/jobs/%00/events", {}, 404),
        ("/v1/batches/bat_" + "0" * 32 + "/events", {}, 404),
        ("/v1/batches/job_" + "0" * 32 + "/events", {}, 404),
        ("/v1/jobs/job_" + "0" * 32 + "/events", {"Last-Event-ID": "17"}, 422),
        ("/v1/jobs/job_" + "0" * 32 + "/events", {"Last-Event-ID": "evt_" + "g" * 32}, 422),
    ],
)
def test_what_cannot_be_followed_is_a_problem(http, path, headers, status):
    assert_problem(http.get(path, headers=headers), status)


def test_another_tenants_job_cannot_be_followed(keyed_api, sessions, http):
    job, batch = submit(http), submit_batch(http, 1)
    other_tenant = new_id("ten")
    with sessions.begin() as session:
        session.add(Tenant(id=other_tenant, name=other_tenant))
        session.flush()
        mine = api_keys.create(session, DEFAULT_TENANT, [Scope.READ]).secret
        other = api_keys.create(session, other_tenant, [Scope.READ]).secret

    def ask(thing, secret):
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        url = keyed_api.url + thing["urls"]["events"]
        with httpx2.stream("GET", url, headers=headers) as response:
            if response.is_error:
                response.read()
            return response

    for thing in (job, batch):
        assert ask(thing, mine).status_code == 200
        assert_problem(ask(thing, other), 404)
        assert_problem(ask(thing, None), 401)


def test_a_stream_ends_when_its_key_is_revoked(keyed_api, sessions, http):
    batch = submit_batch(http, 1)
    with sessions.begin() as session:
        key = api_keys.create(session, DEFAULT_TENANT, [Scope.READ])
    headers = {"Authorization": f"Bearer {key.secret}"}
    with (
        httpx2.Client(base_url=keyed_api.url, headers=headers, timeout=SOON_S) as client,
        following(client, batch) as stream,
    ):
        assert next(stream).event == "snapshot"
        with sessions.begin() as session:
            api_keys.revoke(session, key.id)
        assert numbered(stream) == []


def test_idle_streams_hold_no_threads_and_no_connections(api, sessions, http, work):
    batch = submit_batch(http, 1)
    held = []

    async def follow_all(number):
        """Open them all, look at the server while they wait, and read them to their ends."""
        async with httpx2.AsyncClient(base_url=api.url, timeout=SOON_S, limits=UNLIMITED) as client:
            opened, ended = asyncio.Semaphore(0), []

            async def one():
                async with client.sse(batch["urls"]["events"]) as stream:
                    async for event in stream:
                        if event.event == "snapshot":
                            opened.release()
                ended.append(event.event)

            waiting = [asyncio.create_task(one()) for _ in range(number)]
            for _ in waiting:
                await asyncio.wait_for(opened.acquire(), SOON_S)
            held.append((psutil.Process(api.process.pid).num_threads(), connections(sessions)))
            await asyncio.to_thread(work)
            await asyncio.wait_for(asyncio.gather(*waiting), SOON_S)
            return ended

    assert asyncio.run(follow_all(200)) == ["batch.completed"] * 200
    [(threads, open_connections)] = held
    assert threads < 100  # 40 answer requests, whatever these are
    assert open_connections <= 16  # a pool of at most 12, and ours


def connections(sessions):
    with sessions.begin() as session:
        return session.scalar(
            text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        )


def test_a_stream_without_events_is_kept_alive(keep_alive):
    assert keep_alive.wait(SOON_S)
