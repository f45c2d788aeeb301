"""Hints to workers, which must not delay their caller."""

import time

import pytest
from pydantic import SecretStr
from redis import Redis

from darkroom.queue.celery_app import GENERATE_QUEUE
from darkroom.queue.notifier import WorkNotifier, clear_queue
from darkroom.settings import Settings

HINTS = f"darkroom:{GENERATE_QUEUE}"


@pytest.fixture
def notifier(redis_url):
    opened = WorkNotifier(Settings(redis_url=SecretStr(redis_url)))
    yield opened
    opened.close()


def pending_hints(redis_url):
    """Return how many hints are in Redis, a moment after the first."""
    deadline = time.monotonic() + 20
    with Redis.from_url(redis_url) as client:
        while not client.exists(HINTS) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # more would come within this time
        return client.llen(HINTS)


def test_a_notification_leaves_one_hint_for_each_slot(notifier, redis_url):
    notifier.notify_workers()
    assert pending_hints(redis_url) == Settings().worker_concurrency


def test_a_thousand_notifications_leave_no_more_hints_than_one(notifier, redis_url):
    for _ in range(1000):
        notifier.notify_workers()
    assert pending_hints(redis_url) == Settings().worker_concurrency


def test_notifying_returns_at_once_while_redis_is_frozen(notifier, redis_server):
    redis_server.freeze()
    started_at = time.monotonic()
    for _ in range(100):
        notifier.notify_workers()
    assert (
        time.monotonic() - started_at < 1
    )  # a single call that waited for Redis would take as long


def test_a_failed_notification_does_not_prevent_the_next(notifier, redis_server, caplog):
    redis_server.kill()
    notifier.notify_workers()
    deadline = time.monotonic() + 20
    while "background task wake-up-hints failed" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    redis_server.restart()
    notifier.notify_workers()
    assert pending_hints(redis_server.url) == Settings().worker_concurrency


@pytest.mark.parametrize("content", ["a list", "a string"])
def test_a_queue_is_cleared_whatever_it_holds(redis_url, content):
    with Redis.from_url(redis_url) as client:
        client.lpush(HINTS, "garbage") if content == "a list" else client.set(HINTS, "garbage")
        clear_queue(Settings(redis_url=SecretStr(redis_url)), GENERATE_QUEUE)
        assert not client.exists(HINTS)


def test_a_queue_that_cannot_be_cleared_raises_nothing(redis_url, redis_server):
    redis_server.kill()
    clear_queue(Settings(redis_url=SecretStr(redis_url)), GENERATE_QUEUE)
