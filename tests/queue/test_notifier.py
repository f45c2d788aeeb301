"""The doorbell: rings are hints; none of them may cost its caller anything."""

import time

import pytest
from pydantic import SecretStr
from redis import Redis

from darkroom.queue.celery_app import GENERATE
from darkroom.queue.notifier import Bell, clear
from darkroom.settings import Settings

HINTS = f"darkroom:{GENERATE}"


@pytest.fixture
def bell(redis_url):
    opened = Bell(Settings(redis_url=SecretStr(redis_url)))
    yield opened
    opened.close()


def hanging(redis_url):
    """How many hints hang there, a moment after the first of them."""
    deadline = time.monotonic() + 20
    with Redis.from_url(redis_url) as client:
        while not client.exists(HINTS) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        return client.llen(HINTS)


def test_a_ring_leaves_one_hint_for_each_slot(bell, redis_url):
    bell.ring()
    assert hanging(redis_url) == Settings().dispatches_in_flight


def test_a_thousand_rings_leave_no_more_hints_than_one(bell, redis_url):
    for _ in range(1000):
        bell.ring()
    assert hanging(redis_url) == Settings().dispatches_in_flight


def test_ringing_returns_at_once_while_redis_is_frozen(bell, redis_server):
    redis_server.freeze()
    began = time.monotonic()
    for _ in range(100):
        bell.ring()
    assert time.monotonic() - began < 1  # one that waited for Redis would take as long alone


def test_a_ring_that_failed_does_not_silence_the_next(bell, redis_server):
    redis_server.kill()
    bell.ring()
    time.sleep(0.3)
    redis_server.restart()
    bell.ring()
    assert hanging(redis_server.url) == Settings().dispatches_in_flight


@pytest.mark.parametrize("litter", ["a list", "a string"])
def test_what_hangs_in_a_queue_is_cleared_whatever_it_is(redis_url, litter):
    with Redis.from_url(redis_url) as client:
        client.lpush(HINTS, "garbage") if litter == "a list" else client.set(HINTS, "garbage")
        clear(Settings(redis_url=SecretStr(redis_url)), GENERATE)
        assert not client.exists(HINTS)


def test_a_queue_that_cannot_be_cleared_stops_nobody(redis_url, redis_server):
    redis_server.kill()
    clear(Settings(redis_url=SecretStr(redis_url)), GENERATE)
