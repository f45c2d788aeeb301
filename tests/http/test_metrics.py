"""Counters and histograms that a scrape reads from the database, on real rows."""

import time
from datetime import timedelta

import pytest
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import insert, text, update
from sqlalchemy.exc import OperationalError

from api.activity import ActivityCollector
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.db.webhook_tables import Delivery, DeliveryAttempt
from darkroom.event_types import EventType
from darkroom.ids import new_id
from darkroom.jobs import lifecycle
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from tests.conftest import LIMITS

MODEL = {"model": "darkroom-demo"}
AGE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def _queue(empty_queue):
    """Only the jobs of the test can be claimed."""


@pytest.fixture
def activity(sessions):
    return ActivityCollector(sessions, LIMITS)


def scrape(activity):
    """The samples by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in activity.collect()
        for sample in metric.samples
    }


def finished(samples, status):
    labels = {"status": status} | MODEL
    return samples["darkroom_jobs_finished_total", *sorted(labels.items())]


def attempts(samples, outcome):
    return samples["darkroom_webhook_attempts_total", ("outcome", outcome)]


def settle(sessions, claimed, **failed):
    with sessions.begin() as session:
        outcomes = [
            Failed(job.id, **failed)
            if failed
            else Succeeded(job.id, f"a/{job.id}.png", "0" * 64, 10, inference_ms=300, upload_ms=20)
            for job in claimed
        ]
        assert dispatches.settle(session, claimed[0].dispatch_id, outcomes)


def record_attempt(sessions, outcome, age=AGE):
    with sessions.begin() as session:
        delivery_id = new_id("dlv")
        delivery = {
            "id": delivery_id,
            "tenant_id": DEFAULT_TENANT,
            "url": "https://example.org",
            "message_id": "evt",
            "type": EventType.JOB_FAILED,
            "event_ids": [1],
        }
        session.execute(insert(Delivery), [delivery])
        session.execute(
            insert(DeliveryAttempt), [{"delivery_id": delivery_id, "number": 1, "outcome": outcome}]
        )
        session.execute(
            update(DeliveryAttempt)
            .where(DeliveryAttempt.delivery_id == delivery_id)
            .values(at=text(f"now() - interval '{age.total_seconds()} s'"))
        )


def started_earlier(activity):
    """As if the process had been started two minutes ago."""
    activity._started = time.monotonic() - 120
    return activity


def test_every_series_is_there_from_the_start(activity):
    samples = scrape(activity)

    for status in ("succeeded", "failed", "canceled", "expired"):
        assert finished(samples, status) == 0
    assert attempts(samples, "http_2xx") == 0
    assert samples["darkroom_job_queue_seconds_count", ("model", "darkroom-demo")] == 0


def test_a_finished_job_is_counted_once_with_its_durations(activity, sessions, queue_jobs, claim):
    queue_jobs({}, {}, {})
    scrape(activity)
    settle(sessions, claim())

    for _ in range(2):
        samples = scrape(activity)
        assert finished(samples, "succeeded") == 3
        assert samples[
            "darkroom_inference_seconds_sum", ("model", "darkroom-demo")
        ] == pytest.approx(0.9)
        assert samples["darkroom_image_upload_seconds_count", ("model", "darkroom-demo")] == 3
        assert samples["darkroom_job_queue_seconds_count", ("model", "darkroom-demo")] == 3


def test_failed_and_canceled_jobs_are_counted_by_status(activity, sessions, queue_jobs, claim):
    queue_jobs({})
    settle(sessions, claim(), code="cuda_error", message="the device is lost")
    [job_id] = queue_jobs({})
    with sessions.begin() as session:
        lifecycle.cancel(session, DEFAULT_TENANT, job_id)

    samples = scrape(activity)
    assert finished(samples, "failed") == finished(samples, "canceled") == 1
    assert samples["darkroom_job_queue_seconds_count", ("model", "darkroom-demo")] == 1


def test_jobs_that_finished_before_the_process_started_are_not_counted(sessions, queue_jobs, claim):
    queue_jobs({})
    settle(sessions, claim())
    activity = ActivityCollector(sessions, LIMITS)
    queue_jobs({}, {})
    settle(sessions, claim())

    assert finished(scrape(activity), "succeeded") == 2


def test_an_event_that_becomes_visible_late_is_counted(activity, sessions, queue_jobs, claim):
    queue_jobs({}, {"width": 128, "height": 128})
    scrape(activity)
    slow, fast = claim(), claim()
    with sessions.begin() as session:
        outcomes = [Failed(job.id, "cuda_error", "the device is lost") for job in slow]
        assert dispatches.settle(session, slow[0].dispatch_id, outcomes)
        settle(sessions, fast)  # its event has the larger number and is visible first
        assert finished(scrape(activity), "succeeded") == 1

    samples = scrape(activity)
    assert (finished(samples, "succeeded"), finished(samples, "failed")) == (1, 1)


def test_two_processes_count_the_same(sessions, queue_jobs, claim):
    activities = [ActivityCollector(sessions, LIMITS) for _ in range(2)]
    queue_jobs({}, {})
    settle(sessions, claim())

    first, second = (scrape(activity) for activity in activities)
    assert finished(first, "succeeded") == finished(second, "succeeded") == 2


def test_webhook_attempts_are_counted_once_by_outcome(activity, sessions):
    started_earlier(activity)
    record_attempt(sessions, "http_2xx", age=timedelta(minutes=10))  # before the start
    record_attempt(sessions, "http_2xx")
    record_attempt(sessions, "timeout")
    record_attempt(sessions, "timeout")

    for _ in range(2):
        samples = scrape(activity)
        assert (attempts(samples, "http_2xx"), attempts(samples, "timeout")) == (1, 2)


def test_a_scrape_without_a_database_yields_the_last_counts(activity, sessions, queue_jobs, claim):
    queue_jobs({})
    settle(sessions, claim())
    scrape(activity)
    engine = sessions.kw["bind"]

    def refuse(*_):
        raise OperationalError("SELECT", {}, Exception("gone"))

    sqlalchemy_event.listen(engine, "before_cursor_execute", refuse)
    try:
        assert finished(scrape(activity), "succeeded") == 1
    finally:
        sqlalchemy_event.remove(engine, "before_cursor_execute", refuse)
