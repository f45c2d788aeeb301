"""Background tasks run at their interval and when woken, and survive a failure."""

import logging
import threading
import time
from datetime import timedelta

import pytest

from darkroom.periodic import FAILURES, PeriodicTask


@pytest.fixture
def started():
    """Start a task that is closed at the end; return it and a semaphore of its runs."""
    tasks = []

    def start(work=lambda: None, **options):
        runs = threading.Semaphore(0)

        def counted():
            runs.release()
            work()

        tasks.append(PeriodicTask("test", counted, **options))
        tasks[-1].start()
        return tasks[-1], runs

    yield start
    for task in tasks:
        task.close()


def test_work_is_run_at_its_interval(started):
    _, runs = started(interval=timedelta(milliseconds=20))

    assert all(runs.acquire(timeout=10) for _ in range(3))


def test_without_an_interval_work_is_run_when_woken(started):
    task, runs = started()
    assert not runs.acquire(timeout=0.1)
    task.wake()

    assert runs.acquire(timeout=10)


def test_a_long_interval_does_not_delay_a_wake_or_the_close(started):
    task, runs = started(interval=timedelta(hours=1))
    task.wake()
    assert runs.acquire(timeout=10)
    before = time.monotonic()
    task.close()

    assert time.monotonic() - before < 5


def test_wakes_during_a_run_become_one_run(started):
    release = threading.Event()
    task, runs = started(release.wait)
    task.wake()
    assert runs.acquire(timeout=10)
    for _ in range(5):
        task.wake()
    release.set()

    assert runs.acquire(timeout=10)
    assert not runs.acquire(timeout=0.1)


@pytest.mark.parametrize(("error", "traceback"), [(OSError("away"), False), (KeyError("a"), True)])
def test_a_failure_is_logged_and_counted_and_work_goes_on(started, caplog, error, traceback):
    def fail():
        raise error

    before = FAILURES.labels("test")._value.get()
    with caplog.at_level(logging.WARNING, "darkroom.periodic"):
        _, runs = started(
            fail,
            interval=timedelta(milliseconds=20),
            transient=(OSError,),
            on_failure="jobs wait",
        )
        assert all(runs.acquire(timeout=10) for _ in range(3))

    record = caplog.records[0]
    assert record.getMessage() == (
        f"background task test failed: {type(error).__name__}: {error}; jobs wait"
    )
    assert bool(record.exc_info) is traceback
    assert FAILURES.labels("test")._value.get() >= before + 2


def test_a_task_that_was_never_started_can_be_closed():
    PeriodicTask("test", lambda: None).close()
