"""Following jobs and batches as clients do: a real API process, its events written by hand."""

import asyncio
import signal
import threading
import uuid
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime

import httpx2
import psutil
import psycopg
import pytest
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from api.schemas.jobs import StepProgress
from api.stream_hub import LiveValue, StreamHub
from darkroom.accounts import api_keys
from darkroom.db.connection import open_sessions
from darkroom.db.tables import DEFAULT_TENANT, Tenant
from darkroom.event_types import EventType
from darkroom.events.feed import EventCursor, EventScope, FeedEvent
from darkroom.jobs import lifecycle, progress
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from darkroom.status import Scope
from tests.conftest import LEASE, LIMITS
from tests.support.api_server import CSV, assert_problem, serve, stop

SOON_S = 30
FORECAST = {"queue", "eta_s_p50", "eta_s_p90"}
UNLIMITED = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


@pytest.fixture(scope="module")
def database(_postgres, migrated_template):
    """A database of this module's own: nobody else's jobs are claimed here."""
    name = f"streams_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_template}")
    return f"{_postgres.url.rpartition('/')[0]}/{name}"


@pytest.fixture(scope="module")
def environment(api_environment, database):
    return api_environment | {"DARKROOM_DATABASE_URL": database}


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    process, url = serve(environment, tmp_path_factory.mktemp("streams") / "log")
    yield process, url
    stop(process)


@pytest.fixture
def http(server):
    with httpx2.Client(base_url=server[1], timeout=SOON_S) as client:
        yield client


@pytest.fixture(scope="module")
def sessions(database):
    opened = open_sessions(database, pool_size=2)
    yield opened
    opened.kw["bind"].dispose()


@pytest.fixture(scope="module", autouse=True)
def heartbeat(server, sessions):
    """Set when a stream on which nothing happens has sent a sign of life; open from the start."""
    with httpx2.Client(base_url=server[1]) as client:
        held = submit_batch(client, 1)
    with sessions.begin() as session:
        lifecycle.pause_batch(session, DEFAULT_TENANT, held["id"])
    alive = threading.Event()

    def listen():
        url = server[1] + held["urls"]["events"]
        with (
            suppress(httpx2.TransportError),  # the server may leave before it has to send one
            httpx2.stream("GET", url, timeout=SOON_S) as response,
        ):
            for line in response.iter_lines():
                if line.startswith(":"):
                    alive.set()
                    return

    threading.Thread(target=listen, daemon=True).start()
    return alive


@pytest.fixture
def draw(sessions):
    """Claims all that waits; `settle=True` then has it all drawn."""

    def work(*, settle=True):
        taken = []
        while True:
            with sessions.begin() as session:
                claimed = claims.claim(session, "worker", max_microbatch=LIMITS, lease=LEASE)
            if not claimed:
                return taken
            taken += claimed
            if settle:
                finish(sessions, claimed)

    return work


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
def following(http, thing, seen=None):
    """The stream of a job or batch, from its urls; iterates over what comes."""
    headers = {} if seen is None else {"Last-Event-ID": seen}
    with http.sse(thing["urls"]["events"], headers=headers) as stream:
        assert stream.response.status_code == 200, stream.response.read()
        yield iter(stream)


def follow(http, thing, seen=None):
    with following(http, thing, seen) as stream:
        return list(stream)


def numbered(received):
    """Without what is not sent again: progress and counts."""
    return [event for event in received if event.event not in {"progress", "counts"}]


def without_forecast(resource):
    """Without what changes from one look at the queue to the next."""
    return {key: value for key, value in resource.items() if key not in FORECAST}


def test_a_job_is_followed_from_its_snapshot_to_its_last_event(http, sessions, draw):
    job = submit(http)
    with following(http, job) as stream:
        first = next(stream)
        [running] = draw(settle=False)
        started = next(stream)
        finish(sessions, [running])
        rest = numbered(stream)

    assert (first.event, without_forecast(first.json())) == ("snapshot", without_forecast(job))
    assert started.event == "job.started"
    assert [event.event for event in rest] == ["job.succeeded"]
    told = rest[0].json()
    assert (told["id"], told["object"], told["type"]) == (rest[0].id, "event", "job.succeeded")
    assert told["data"] == {
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


def test_a_stream_says_what_kind_it_is_and_that_nobody_is_to_keep_it(http, draw):
    job = submit(http)
    draw()
    with http.sse(job["urls"]["events"]) as stream:
        headers = stream.response.headers

    assert headers["content-type"].startswith("text/event-stream")
    assert "no-cache" in headers["cache-control"]
    assert headers["x-accel-buffering"] == "no"


def test_a_job_that_has_ended_is_a_snapshot_and_no_more(http, draw):
    job = submit(http)
    draw()
    [only] = follow(http, job)

    assert (only.event, only.json()["status"]) == ("snapshot", "succeeded")


def test_a_failure_tells_why(http, sessions, draw):
    job = submit(http)
    with following(http, job) as stream:
        next(stream)
        finish(sessions, draw(settle=False), code="invalid_output", message="no picture")
        [*_, last] = stream

    assert last.event == "job.failed"
    assert last.json()["data"]["error"] == {
        "code": "invalid_output",
        "message": "no picture",
        "retryable": False,
    }


def test_a_batch_is_followed_with_its_jobs_and_counts_to_its_end(http, draw):
    batch = submit_batch(http, 20)
    with following(http, batch) as stream:
        first = next(stream)
        draw()
        received = list(stream)

    assert (first.event, without_forecast(first.json())) == ("snapshot", without_forecast(batch))
    told = numbered(received)
    assert sorted(event.event for event in told[:-1]) == (
        ["job.started"] * 20 + ["job.succeeded"] * 20
    )
    rows = [event.json()["data"]["row_number"] for event in told if event.event == "job.succeeded"]
    assert sorted(rows) == list(range(1, 21))
    assert told[-1].event == "batch.completed"
    assert told[-1].json()["data"]["status"] == "completed"
    assert len({event.id for event in told}) == 41


def test_counts_come_when_they_change_and_again_when_they_change_again(http, sessions, draw):
    batch = submit_batch(http, 8)
    with following(http, batch) as stream:
        next(stream)
        running = draw(settle=False)
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
        told = numbered(stream)

    assert [event.event for event in told] == ["job.canceled"] * 3 + ["batch.canceled"]
    assert told[-1].json()["data"]["status"] == "canceled"


def test_steps_are_told_while_a_job_runs_and_only_when_they_change(
    http, sessions, draw, redis_server
):
    job = submit(http)
    with Redis.from_url(redis_server.url) as board, following(http, job) as stream:
        next(stream)
        [running] = draw(settle=False)
        assert next(stream).event == "job.started"
        progress.publish(board, {running.dispatch_id: {job["id"]: (3, 12)}})
        third = next(stream)
        progress.publish(board, {running.dispatch_id: {job["id"]: (4, 12)}})
        fourth = next(stream)
        finish(sessions, [running])
        rest = [event.event for event in stream]

    assert [step.event for step in (third, fourth)] == ["progress"] * 2
    assert [step.json() for step in (third, fourth)] == [
        {"step": 3, "steps": 12},
        {"step": 4, "steps": 12},
    ]
    assert rest == ["job.succeeded"]


def test_whatever_was_received_last_the_rest_comes_without_gap_or_repetition(http, draw):
    batch = submit_batch(http, 3)
    with following(http, batch) as stream:
        everything = [next(stream)]
        draw()
        everything += numbered(stream)

    for number, event in enumerate(everything[:-1], start=1):
        rest = numbered(follow(http, batch, seen=event.id))
        assert [again.id for again in rest] == [later.id for later in everything[number:]]
    last = http.get(batch["urls"]["events"], headers={"Last-Event-ID": everything[-1].id})
    assert (last.status_code, last.content) == (204, b"")


def test_a_place_that_this_database_never_reached_is_answered_with_a_snapshot(http, draw):
    job = submit(http)
    draw()
    [only] = follow(http, job, seen="evt_" + "f" * 32)

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


def test_a_stream_survives_the_restart_of_the_api(environment, sessions, draw, tmp_path):
    with serving(environment, tmp_path / "one") as (process, http):
        batch = submit_batch(http, 3)
        with following(http, batch) as stream:
            received = [next(stream)]
            running = draw(settle=False)
            received.append(next(stream))
            process.send_signal(signal.SIGTERM)
            received += stream  # to its end, which is no error
        process.wait(SOON_S)
    assert "graceful shutdown exceeded" not in (tmp_path / "one").read_text()
    finish(sessions, running)
    with serving(environment, tmp_path / "two") as (_, http):
        seen = numbered(received)
        seen += numbered(follow(http, batch, seen=seen[-1].id))

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


@pytest.fixture(scope="module")
def guarded_url(environment, tmp_path_factory):
    """An API process that asks for keys."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    with serving(environment | {"DARKROOM_AUTH": "on"}, log) as (_, client):
        yield str(client.base_url)


def test_another_tenants_job_cannot_be_followed(guarded_url, sessions, http):
    job, batch = submit(http), submit_batch(http, 1)
    with sessions.begin() as session:
        session.add(Tenant(id="ten_other", name="other"))
        session.flush()
        mine = api_keys.create(session, DEFAULT_TENANT, [Scope.READ]).secret
        other = api_keys.create(session, "ten_other", [Scope.READ]).secret

    def ask(thing, secret):
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        url = guarded_url + thing["urls"]["events"]
        with httpx2.stream("GET", url, headers=headers) as response:
            if response.is_error:
                response.read()
            return response

    for thing in (job, batch):
        assert ask(thing, mine).status_code == 200
        assert_problem(ask(thing, other), 404)
        assert_problem(ask(thing, None), 401)


def test_a_stream_ends_when_its_key_is_revoked(guarded_url, sessions, http):
    batch = submit_batch(http, 1)
    with sessions.begin() as session:
        key = api_keys.create(session, DEFAULT_TENANT, [Scope.READ])
    headers = {"Authorization": f"Bearer {key.secret}"}
    with (
        httpx2.Client(base_url=guarded_url, headers=headers, timeout=SOON_S) as client,
        following(client, batch) as stream,
    ):
        assert next(stream).event == "snapshot"
        with sessions.begin() as session:
            api_keys.revoke(session, key.id)
        assert numbered(stream) == []


def test_waiting_streams_hold_no_threads_and_no_connections(server, sessions, http, draw):
    process, url = server
    batch = submit_batch(http, 1)
    held = []

    async def follow_all(number):
        """Opens them all, looks at the server while they wait, and reads them to their ends."""
        async with httpx2.AsyncClient(base_url=url, timeout=SOON_S, limits=UNLIMITED) as client:
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
            held.append((psutil.Process(process.pid).num_threads(), connections(sessions)))
            await asyncio.to_thread(draw)
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


def test_a_stream_on_which_nothing_happens_is_kept_alive(heartbeat):
    assert heartbeat.wait(SOON_S)


def streams_of(since, **more):
    """Streams that are fed by a function instead of a database."""
    return StreamHub(stirred=lambda _: (0, None), since=since, **more)


def happening(sequence, type_=EventType.JOB_STARTED):
    now = datetime.now(UTC)
    about = (now, "job_1", "bat_1", None, None, None, None, None)
    return FeedEvent(sequence, f"evt_{sequence}", type_, *about)


def test_a_slow_reader_is_given_a_page_when_it_has_passed_on_the_last():
    place = EventCursor(EventScope("ten", "bat_1"), 0)
    read = []

    def pages(places):
        read.extend(places)
        return {at: [happening(at.sequence + number) for number in (1, 2, 3)] for at in places}

    async def follow():
        streams = streams_of(pages)
        feeding = asyncio.create_task(streams.run())
        with streams.open(place) as slow, streams.open(place) as fast:
            theirs = aiter(slow)
            seen = [(await anext(theirs)).sequence]
            async for event in fast:
                if event.sequence == 9:
                    break
            assert read.count(place) == 1  # for both at once
            assert [at.sequence for at in read] == [0, 3, 6]  # for the fast one alone
            seen += [(await anext(theirs)).sequence for _ in range(5)]
        feeding.cancel()
        return seen

    assert asyncio.run(asyncio.wait_for(follow(), SOON_S)) == [1, 2, 3, 4, 5, 6]


def test_only_streams_of_what_has_stirred_are_read_on_and_now_and_then_all():
    places = [EventCursor(EventScope("ten", f"bat_{number}"), 0) for number in range(3)]
    looks, read = iter([(5, {"bat_1"}), (6, {"bat_2"}), (6, set()), (6, set())]), []

    def since(asked):
        read.append({place.subject.id for place in asked})
        return {}

    async def follow():
        streams = StreamHub(stirred=lambda _: next(looks), since=since)
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(streams.open(place))
            await streams._hand_out(now=100)  # new ones may all have missed something
            await streams._hand_out(now=101)
            await streams._hand_out(now=102)
            await streams._hand_out(now=105)

    asyncio.run(follow())
    assert read == [{"bat_0", "bat_1", "bat_2"}, {"bat_2"}, {"bat_0", "bat_1", "bat_2"}]


def test_streams_go_on_when_the_database_is_back():
    answers = iter([OperationalError("", {}, Exception()), RuntimeError("a bug"), None])

    def read(places):
        answer = next(answers)
        if answer is not None:
            raise answer
        return {place: [happening(7, EventType.JOB_SUCCEEDED)] for place in places}

    async def follow():
        streams = streams_of(read)
        feeding = asyncio.create_task(streams.run())
        with streams.open(EventCursor(EventScope("ten", "job_" + "0" * 32), 0)) as stream:
            received = [event.sequence async for event in stream]
        feeding.cancel()
        return received

    assert asyncio.run(asyncio.wait_for(follow(), SOON_S)) == [7]


def test_nobody_is_kept_waiting_by_a_process_that_leaves():
    async def follow():
        streams = streams_of(lambda _: {})
        with streams.open(EventCursor(EventScope("ten", "bat_1"), 0)) as before:
            streams.end()
            with streams.open(EventCursor(EventScope("ten", "bat_1"), 0)) as after:
                return [event async for event in before], [event async for event in after]

    assert asyncio.run(asyncio.wait_for(follow(), SOON_S)) == ([], [])


def test_a_gauge_is_read_of_what_moves_and_told_when_it_changed():
    moving, still = EventScope("ten", "bat_1"), EventScope("ten", "bat_2")
    asked = []

    def measure(subjects):
        asked.extend(subjects)
        return {subject: StepProgress(step=len(asked) // 3, steps=9) for subject in subjects}

    async def follow():
        gauge = LiveValue("progress", of_jobs=False, every_s=0, read=measure, rests=False)
        streams = streams_of(lambda _: {}, gauges=[gauge])
        feeding = asyncio.create_task(streams.run())
        with (
            streams.open(EventCursor(moving, 0)) as stream,
            streams.open(EventCursor(still, 0), moving=False),
        ):
            told = aiter(stream)
            received = [(await anext(told)).value.step for _ in range(3)]
        feeding.cancel()
        return received

    assert asyncio.run(asyncio.wait_for(follow(), SOON_S)) == [0, 1, 2]
    assert set(asked) == {moving}
    assert len(asked) > 3
