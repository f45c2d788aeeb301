"""Webhooks while senders die, receivers hang or are down, and time passes.

Small volumes show the rules; the promised numbers are marked `chaos` (`make chaos`). The tests
print what they measured: `pytest -rP` shows it.
"""

import asyncio
import random
import signal
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy import func, select, text, update

from darkroom.db.tables import DEFAULT_TENANT, Job
from darkroom.db.webhook_tables import Delivery, DeliveryAttempt, WebhookEndpoint
from darkroom.event_types import JOB_ENDS, EventType
from darkroom.jobs import lifecycle
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from darkroom.settings import Settings
from darkroom.webhooks import delivery_log, endpoints
from darkroom.webhooks.secret_box import SecretBox
from darkroom.webhooks.url_policy import policy_of
from tests.conftest import new_job
from tests.support.many_receivers import many_receivers
from tests.support.webhook_servers import SenderProcess
from workers.webhooks.circuit_breaker import DestinationLimiter
from workers.webhooks.resolver import SystemResolver
from workers.webhooks.sender import Sender
from workers.webhooks.transport import WebhookTransport, tls_context

SECRET_BOX = SecretBox("")
pytestmark = pytest.mark.timeout(400)


def register(sessions, urls, *kinds):
    """Creates endpoints at these URLs, without the API."""
    with sessions.begin() as session:
        return [
            endpoints.create(
                session,
                DEFAULT_TENANT,
                url=url,
                event_types=set(kinds),
                secret_box=SECRET_BOX,
                max_endpoints=10_000,
            ).endpoint.id
            for url in urls
        ]


def cancel(sessions, job_ids):
    for job_id in job_ids:
        with sessions.begin() as session:
            lifecycle.cancel(session, DEFAULT_TENANT, job_id)


def statuses(sessions):
    """Counts deliveries by status."""
    with sessions.begin() as session:
        counted = select(Delivery.status, func.count()).group_by(Delivery.status)
        return dict(session.execute(counted).all())


def until(true, *, within_s=100):
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def report(figures):
    print(figures)  # noqa: T201  # for `pytest -rP`


# --- processes ------------------------------------------------------------------------------------


@pytest.fixture
def sender_process(database_url, redis_url, webhook_environment, tmp_path):
    environment = webhook_environment | {
        "DARKROOM_DATABASE_URL": database_url,
        "DARKROOM_REDIS_URL": redis_url,
    }
    process = SenderProcess(environment, tmp_path)
    yield process
    process.stop()


def test_a_sender_killed_before_it_settles_sends_again_under_the_same_id(
    sessions, database_url, queue_jobs, sender_process
):
    with psycopg.connect(database_url) as blocking, psycopg.connect(database_url) as watching:
        watching.autocommit = True

        def reply(_):
            """Answers 200, but locks the row so that the result cannot be stored."""
            blocking.execute("SELECT 1 FROM delivery FOR UPDATE")
            return 200

        with many_receivers(reply) as receivers:
            register(sessions, [receivers.url("/hook")], EventType.JOB_CANCELED)
            cancel(sessions, queue_jobs({}))
            sender_process.start()
            until(lambda: waits_for_lock(watching))
            sender_process.kill()
            blocking.rollback()
            assert statuses(sessions) == {"sending": 1}

            with sessions.begin() as session:  # its lease has lapsed
                session.execute(update(Delivery).values(next_attempt_at=func.now()))
            receivers.reply = lambda _: 200
            sender_process.start()
            until(lambda: statuses(sessions) == {"accepted": 1})

    assert len(receivers.posts) == 2
    assert len({post.id for post in receivers.posts}) == 1
    assert outcomes(sessions) == ["interrupted", "http_2xx"]


def waits_for_lock(connection):
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return connection.execute(waiting).fetchone()[0] > 0


def outcomes(sessions):
    """Outcomes of all attempts, in order."""
    with sessions.begin() as session:
        made = select(DeliveryAttempt.outcome).order_by(DeliveryAttempt.number)
        return session.scalars(made).all()


def test_a_sender_that_stops_finishes_the_attempts_in_flight(sessions, queue_jobs, sender_process):
    came, stopping = threading.Event(), threading.Event()

    def reply(_):
        came.set()
        assert stopping.wait(60)
        return 200

    with many_receivers(reply) as receivers:
        register(sessions, [receivers.url("/hook")], EventType.JOB_CANCELED)
        cancel(sessions, queue_jobs({}))
        sender_process.start()
        assert came.wait(60)
        sender_process.process.terminate()
        until(lambda: "Warm shutdown" in sender_process.log.read_text())
        stopping.set()
        assert sender_process.process.wait(45) in {0, -signal.SIGTERM}

    assert statuses(sessions) == {"accepted": 1}


@pytest.mark.parametrize(
    ("hanging", "healthy"), [(190, 10), pytest.param(950, 50, marks=pytest.mark.chaos)]
)
def test_hanging_receivers_do_not_delay_healthy_ones(
    sessions, queue_jobs, sender_process, hanging, healthy
):
    """95 of 100 endpoints hang, for longer than the test would wait."""
    hang_s = 45
    with many_receivers(lambda post: None if post.path.startswith("/hang") else 200) as receivers:
        paths = [f"/hang{n}" for n in range(hanging)] + [f"/good{n}" for n in range(healthy)]
        random.Random(1).shuffle(paths)
        register(sessions, map(receivers.url, paths), EventType.JOB_CANCELED)
        ids = queue_jobs(*[{}] * 4)
        sender_process.start(DARKROOM_WEBHOOK_TIMEOUT_S=str(hang_s))
        delays = []
        for number, job_id in enumerate(ids, 1):
            began = time.time()
            cancel(sessions, [job_id])
            until(lambda: len(to_good(receivers)) >= healthy * number)  # noqa: B023
            delays += [post.at - began for post in to_good(receivers)[-healthy:]]
        sender_process.kill()  # a stop would wait for those that hang

    delays.sort()
    p95 = delays[int(0.95 * len(delays))]
    report(f"{hanging} of {hanging + healthy} hang: healthy p95 {p95:.2f} s of {len(delays)}")
    assert p95 < 5
    assert len({post.path for post in receivers.posts if "/hang" in post.path}) == hanging


def to_good(receivers):
    return [post for post in receivers.posts if "/good" in post.path]


# --- simulated time -------------------------------------------------------------------------------


class SimulatedSender:
    """Sender in this process whose waits can be skipped, in the database and in its limiter."""

    def __init__(self, sessions, *, timeout_s=20.0):
        self._sessions = sessions
        self.skipped_s = 0.0
        policy = policy_of(Settings(webhook_allow_private=True))
        transport = WebhookTransport(
            policy, SystemResolver(), tls=tls_context(None), timeout_s=timeout_s
        )
        self._make = lambda: Sender(
            sessions,
            transport.post,
            DestinationLimiter(1000, clock=self.clock),
            secret_box=SECRET_BOX,
        )
        self._loop = asyncio.new_event_loop()
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def clock(self):
        return time.monotonic() + self.skipped_s

    def _run(self):
        async def send():
            self._sender = self._make()
            self._began.set()
            await self._sender.run()

        self._loop.run_until_complete(send())
        self._loop.close()

    def __enter__(self):
        self._thread.start()
        self._began.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._sender.stop)
        self._thread.join()

    def skip(self):
        """Skips to a quarter of the wait after the next delivery is due; False if none is pending.

        Late, never early: deliveries that failed together are sent together, whatever the jitter.
        """
        soonest = text(
            "SELECT extract(epoch FROM min(next_attempt_at) - now()) FROM delivery"
            " WHERE status = 'pending'"
        )
        until(self._is_idle)
        with self._sessions.begin() as session:
            seconds = session.scalar(soonest)
            if seconds is None:
                return False
            seconds = max(float(seconds), 0) * 1.25 + 5
            session.execute(
                update(Delivery)
                .where(Delivery.status == "pending")
                .values(next_attempt_at=Delivery.next_attempt_at - timedelta(seconds=seconds))
            )
        self.skipped_s += seconds
        return True

    def _is_idle(self):
        """Wakes the sender; True if no delivery is being sent or due."""
        due = text(
            "SELECT count(*) FROM delivery WHERE finished_at IS NULL"
            " AND (status = 'sending' OR next_attempt_at <= now())"
        )
        self._loop.call_soon_threadsafe(self._sender.wake)
        with self._sessions.begin() as session:
            return session.scalar(due) == 0

    def run_out(self, *, until_s=10**9):
        """Skips until no delivery is pending, or so much time has passed."""
        while self.skipped_s < until_s and self.skip():
            pass


def test_a_receiver_that_is_down_for_two_hours_gets_each_event_once(sessions, queue_jobs):
    with many_receivers(lambda _: 200) as receivers, SimulatedSender(sessions) as sender:
        accepted = []

        def reply(post):
            if sender.skipped_s < 2 * 3600:
                return 503
            accepted.append(post)
            return 200

        receivers.reply = reply
        register(sessions, [receivers.url("/hook")], EventType.JOB_CANCELED)
        cancel(sessions, queue_jobs(*[{}] * 6))
        sender.run_out()

    assert statuses(sessions) == {"accepted": 6}
    assert 2 * 3600 < sender.skipped_s < 12 * 3600
    tries = Counter(post.id for post in receivers.posts)
    report(f"down for 2 h: 6 events accepted, tried {sorted(tries.values())} times by their ids")
    assert len(tries) == 6
    assert max(tries.values()) <= 8
    assert Counter(post.id for post in accepted) == dict.fromkeys(tries, 1)


def test_a_receiver_that_stays_down_exhausts_deliveries_and_a_replay_delivers_them(
    sessions, queue_jobs
):
    began = datetime.now(UTC) - timedelta(minutes=1)
    with many_receivers(lambda _: 500) as receivers, SimulatedSender(sessions) as sender:
        register(sessions, [receivers.url("/hook")], EventType.JOB_CANCELED)
        cancel(sessions, queue_jobs(*[{}] * 6))
        sender.run_out()
        assert statuses(sessions) == {"exhausted": 6}
        assert Counter(Counter(post.id for post in receivers.posts).values()) == {8: 6}
        assert 31 * 3600 < sender.skipped_s < 50 * 3600

        receivers.reply = lambda _: 200
        ids = {post.id for post in receivers.posts}
        with sessions.begin() as session:
            assert delivery_log.replay_failed(session, DEFAULT_TENANT, since=began) == 6
        sender.run_out()

    assert statuses(sessions) == {"accepted": 6}
    assert {post.id for post in receivers.posts[-6:]} == ids
    report("down for good: 6 events exhausted after 8 tries each; replayed: 6 accepted, same ids")


@pytest.mark.parametrize("count", [250, pytest.param(2000, marks=pytest.mark.chaos)])
def test_each_final_event_of_many_jobs_is_accepted_or_exhausted(sessions, registry, count):
    """Two receivers answer at random; one of them answers 410 after ten POSTs."""
    dice = random.Random(2)
    accepted = []

    def reply(post):
        status = dice.choice([200] * 6 + [500, 503, 404, 302, 429])
        if post.path == "/gone" and sum(each.path == "/gone" for each in receivers.posts) > 10:
            return 410
        if post.path == "/healthy" and status == 200:
            accepted.append(post.id)
        return status

    with many_receivers(reply) as receivers, SimulatedSender(sessions) as sender:
        [healthy_id] = register(sessions, [receivers.url("/healthy")], *JOB_ENDS)
        [gone] = register(sessions, [receivers.url("/gone")], EventType.JOB_FAILED)
        counts = finish_jobs(sessions, registry, dice, count)
        sender.run_out()

    assert sum(counts.values()) == count
    assert {"succeeded", "failed", "canceled"} == counts.keys()
    finals = select(Delivery).join(
        Job, (Job.id == Delivery.job_id) & (Delivery.type == "job." + Job.status)
    )
    with sessions.begin() as session:
        rows = session.scalars(finals).all()
        assert endpoint_reason(session, gone) == "gone"
    assert {row.status for row in rows} <= {"accepted", "exhausted"}
    of_healthy = [row for row in rows if row.endpoint_id == healthy_id]
    report(f"{counts}: {dict(Counter(row.status for row in of_healthy))}, none missing")
    assert len({row.job_id for row in of_healthy}) == len(of_healthy) == count
    assert sorted(row.message_id for row in of_healthy if row.status == "accepted") == sorted(
        accepted
    )
    assert {row.status for row in rows if row.endpoint_id == gone} == {"accepted", "exhausted"}


def endpoint_reason(session, endpoint_id):
    return session.get(WebhookEndpoint, endpoint_id).disabled_reason


def finish_jobs(sessions, registry, dice, count):
    """Generates, fails and cancels jobs as workers do; counts them by status."""
    with sessions.begin() as session:
        made = [new_job(registry, {"seed": number}) for number in range(count)]
        ids = lifecycle.submit(session, DEFAULT_TENANT, made)
    cancel(sessions, dice.sample(ids, count // 20))
    while True:
        with sessions.begin() as session:
            claimed = claims.claim(
                session, "w", max_microbatch={"darkroom-demo": 250}, lease=timedelta(seconds=60)
            )
            if not claimed:
                break
            dispatches.settle(
                session, claimed[0].dispatch_id, [_outcome(job, dice) for job in claimed]
            )
    with sessions.begin() as session:
        counted = select(Job.status, func.count()).group_by(Job.status)
        return dict(session.execute(counted).all())


def _outcome(job, dice):
    if dice.random() < 0.1:
        return Failed(job.id, "invalid_output", "it is black")
    return Succeeded(job.id, "a/b/1.png", "0" * 64, 10, inference_ms=5, upload_ms=1)
