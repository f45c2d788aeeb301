"""Payloads: what a webhook says."""

import json
from datetime import datetime

from sqlalchemy import update

from darkroom.db.tables import DEFAULT_TENANT, Job
from darkroom.event_types import EventType
from darkroom.events import fanout
from darkroom.jobs import lifecycle
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from darkroom.webhooks import payloads

OWN_URL = "https://mine.example/hook"
LARGE = fanout.LARGE_BATCH + 1


def test_a_failed_job_carries_its_error(sessions, queue_jobs, claim, claim_due, body_of):
    queue_jobs({"webhook_url": OWN_URL, "label": "mine", "metadata": {"a": "b"}})
    [job] = claim()
    with sessions.begin() as session:
        dispatches.settle(
            session, job.dispatch_id, [Failed(job.id, "invalid_output", "it is black " * 100)]
        )
    [claimed] = claim_due()
    body = body_of(claimed)

    assert body.keys() == {"type", "timestamp", "data"}
    assert body["type"] == "job.failed"
    assert body["data"]["error"]["code"] == "invalid_output"
    assert len(body["data"]["error"]["message"]) == 500
    assert body["data"]["urls"] == {
        "self": f"/v1/jobs/{job.id}",
        "image": f"/v1/jobs/{job.id}/image",
    }
    assert "prompt" not in json.dumps(body)
    assert datetime.fromisoformat(body["timestamp"]).tzinfo is not None


def test_an_event_carries_the_status_it_had_then(sessions, queue_jobs, claim, claim_due, body_of):
    queue_jobs({"webhook_url": OWN_URL, "webhook_events": ["job.started", "job.succeeded"]})
    [job] = claim()
    with sessions.begin() as session:
        succeeded = Succeeded(job.id, "a/b/1.png", "0" * 64, 10, inference_ms=5, upload_ms=1)
        dispatches.settle(session, job.dispatch_id, [succeeded])

    said = {body_of(each)["type"]: body_of(each) for each in claim_due()}
    assert said["job.started"]["data"]["status"] == "running"
    assert said["job.succeeded"]["data"]["status"] == "succeeded"


def test_a_batch_carries_its_counts(queue_batch, cancel, claim_due, body_of):
    batch_id, ids = queue_batch(3, webhook_url=OWN_URL)
    cancel(*ids)
    [claimed] = claim_due()
    data = body_of(claimed)["data"]

    assert (data["id"], data["status"], data["outcome"]) == (batch_id, "completed", "all_failed")
    assert data["counts"]["total"] == data["counts"]["canceled"] == 3


def test_no_body_reaches_32_kib(sessions, queue_batch, endpoint, advance, claim_due):
    endpoint(EventType.JOB_CANCELED)
    widest = "\U0001f5bc" * 200
    batch_id, _ = queue_batch(100, total=LARGE, label=widest)
    with sessions.begin() as session:
        session.execute(update(Job).values(custom_id="\U0001f5bc" * 15, row_number=Job.row_number))
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)
    queue_batch(1, webhook_url=OWN_URL, label=widest)
    advance(5)
    with sessions.begin() as session:
        made = payloads.bodies(session, claim_due())

    assert max(map(len, made.values())) > 20_000
    assert max(map(len, made.values())) < payloads.MAX_BYTES


def test_a_long_custom_id_is_left_out(sessions, queue_jobs, cancel, claim_due, body_of):
    [short, long] = queue_jobs(*[{"webhook_url": OWN_URL}] * 2)
    with sessions.begin() as session:
        session.execute(update(Job).where(Job.id == short).values(custom_id="c" * 200))
        session.execute(update(Job).where(Job.id == long).values(custom_id="c" * 2000))
    cancel(short, long)

    said = {body["data"]["id"]: body["data"] for body in (body_of(c) for c in claim_due())}
    assert said[short]["custom_id"] == "c" * 200
    assert said[long]["custom_id"] is None
