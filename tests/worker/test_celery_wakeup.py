"""Celery's event loop: a real worker process takes a hint as soon as one of its slots is free."""

import statistics
import subprocess
import sys
import time

import pytest
from pydantic import SecretStr
from redis import Redis

from darkroom.queue.celery_app import GENERATE_QUEUE, PROCESS_QUEUE, celery_app
from darkroom.settings import Settings

SLOTS = 2
WORKER = """
import sys, time
from pydantic import SecretStr
from redis import Redis
from darkroom.queue.celery_app import GENERATE_QUEUE, PROCESS_QUEUE, celery_app
from darkroom.settings import Settings
from workers.generation.celery_wakeup import SlotFreedWakeup

url, slots = sys.argv[1:]
app = celery_app(Settings(redis_url=SecretStr(url)), socket_timeout_s=5)
app.steps["consumer"].add(SlotFreedWakeup)
redis = Redis.from_url(url)

@app.task(name=PROCESS_QUEUE)
def process_queue():
    redis.rpush("started", time.time())
    time.sleep(0.05)
    redis.rpush("finished", time.time())

app.worker_main(
    ["worker", "--pool=threads", f"--concurrency={slots}", f"--queues={GENERATE_QUEUE}",
     "--without-gossip", "--without-mingle", "--without-heartbeat"]
)
"""


@pytest.fixture
def worker(redis_url):
    command = [sys.executable, "-c", WORKER, redis_url, str(SLOTS)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield process
    process.terminate()
    process.wait(timeout=20)


def wait_for(redis, key, many):
    deadline = time.monotonic() + 30
    while redis.llen(key) < many:
        assert time.monotonic() < deadline, f"{redis.llen(key)} of {many} {key}"
        time.sleep(0.005)
    return float(redis.lindex(key, -1))


@pytest.mark.usefixtures("worker")
def test_a_hint_published_just_after_all_slots_were_taken_is_taken_at_once(redis_url):
    app = celery_app(Settings(redis_url=SecretStr(redis_url)), socket_timeout_s=5)
    waits, sent = [], 0
    with Redis.from_url(redis_url) as redis:
        for _ in range(9):
            for _ in range(SLOTS):
                app.send_task(PROCESS_QUEUE, queue=GENERATE_QUEUE)
            sent += SLOTS
            wait_for(redis, "finished", sent)
            time.sleep(0.1)  # into the second for which the loop would sleep by itself
            asked = time.time()
            app.send_task(PROCESS_QUEUE, queue=GENERATE_QUEUE)
            sent += 1
            waits.append(wait_for(redis, "started", sent) - asked)
            wait_for(redis, "finished", sent)
    # without the step, the event loop runs once a second
    assert statistics.median(waits) < 0.1, waits
