"""Fan-out: which deliveries an event makes, and how events share messages."""

from datetime import timedelta

import pytest
from sqlalchemy import func, select

from darkroom.db.tables import DEFAULT_TENANT, Event, Tenant
from darkroom.db.webhook_tables import Delivery
from darkroom.event_types import EventType
from darkroom.events import fanout
from darkroom.ids import is_id
from darkroom.jobs import lifecycle
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from darkroom.webhooks.deliveries import AttemptOutcome

OWN_URL = "https://mine.example/hook"
LARGE = fanout.LARGE_BATCH + 1


def test_without_a_subscription_there_is_no_delivery(queue_jobs, cancel, rows):
    cancel(*queue_jobs({}, {}))

    assert rows() == []


def test_each_endpoint_gets_the_types_it_subscribed_to(queue_jobs, cancel, endpoint, rows):
    wants = endpoint(EventType.JOB_CANCELED, EventType.JOB_FAILED)
    endpoint(EventType.JOB_SUCCEEDED)
    [job_id] = queue_jobs({})
    cancel(job_id)

    [delivery] = rows()
    assert (delivery.endpoint_id, delivery.type, delivery.job_id) == (
        wants,
        "job.canceled",
        job_id,
    )
    assert is_id("dlv", delivery.id)
    assert is_id("evt", delivery.message_id)


def test_another_tenants_endpoint_gets_nothing(sessions, queue_jobs, cancel, endpoint, rows):
    with sessions.begin() as session:
        session.add(Tenant(id="ten_other", name="other"))
    endpoint(tenant="ten_other")
    cancel(*queue_jobs({}))

    assert rows() == []


def test_all_deliveries_of_an_event_share_one_message_id(queue_jobs, cancel, endpoint, rows):
    endpoint()
    endpoint()
    cancel(*queue_jobs({"webhook_url": OWN_URL}))

    found = rows()
    assert len(found) == 3
    assert len({delivery.message_id for delivery in found}) == 1
    assert len({delivery.id for delivery in found}) == 3


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, ["job.failed", "job.succeeded"]),
        (["job.started"], ["job.started", "job.started"]),
        (["job.failed"], ["job.failed"]),
    ],
)
def test_the_url_of_a_job_gets_final_events_or_the_types_it_names(
    sessions, queue_jobs, claim, rows, wanted, found
):
    queue_jobs(*[{"webhook_url": OWN_URL} | ({"webhook_events": wanted} if wanted else {})] * 2)
    good, bad = claim()
    with sessions.begin() as session:
        succeeded = Succeeded(good.id, "a/b/1.png", "0" * 64, 10, inference_ms=5, upload_ms=1)
        failed = Failed(bad.id, "invalid_output", "it is black")
        dispatches.settle(session, good.dispatch_id, [succeeded, failed])

    assert sorted(delivery.type for delivery in rows()) == found
    assert {delivery.url for delivery in rows()} == {OWN_URL}


def test_the_url_of_a_batch_gets_only_its_final_event(queue_batch, cancel, rows):
    batch_id, ids = queue_batch(2, webhook_url=OWN_URL)
    cancel(*ids)

    [delivery] = rows()
    assert (delivery.type, delivery.batch_id, delivery.job_id) == (
        "batch.completed",
        batch_id,
        None,
    )


def test_a_canceled_batch_sends_batch_canceled(sessions, queue_batch, endpoint, rows):
    endpoint(EventType.BATCH_CANCELED)
    batch_id, _ = queue_batch(3, webhook_url=OWN_URL)
    with sessions.begin() as session:
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)

    assert [delivery.type for delivery in rows()] == ["batch.canceled"] * 2


def test_a_retried_job_keeps_the_url_of_the_first(sessions, queue_jobs, cancel, rows):
    [job_id] = queue_jobs({"webhook_url": OWN_URL, "webhook_events": ["job.canceled"]})
    cancel(job_id)
    with sessions.begin() as session:
        again = lifecycle.retry(session, DEFAULT_TENANT, job_id).id
    cancel(again)

    assert [delivery.job_id for delivery in rows()] == [job_id, again]


def test_a_rollback_leaves_no_delivery(sessions, queue_jobs, endpoint, rows):
    endpoint()
    [job_id] = queue_jobs({})
    session = sessions()
    lifecycle.cancel(session, DEFAULT_TENANT, job_id)
    assert session.scalar(select(func.count()).select_from(Delivery)) == 1
    session.rollback()
    session.close()

    assert rows() == []


def test_events_of_a_large_batch_are_sent_in_lists(sessions, queue_batch, endpoint, rows):
    endpoint(EventType.JOB_CANCELED)
    batch_id, ids = queue_batch(250, total=LARGE)
    with sessions.begin() as session:
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)

    found = rows()
    assert sorted(len(delivery.event_ids) for delivery in found) == [50, 100, 100]
    assert len({delivery.message_id for delivery in found}) == 3
    grouping = timedelta(seconds=fanout.GROUPING_S)
    assert all(delivery.next_attempt_at - delivery.created_at >= grouping for delivery in found)
    with sessions.begin() as session:
        listed = select(Event.job_id).where(
            Event.id.in_([each for delivery in found for each in delivery.event_ids])
        )
        assert sorted(session.scalars(listed)) == ids


def test_a_small_batch_gets_a_message_for_each_job(queue_batch, endpoint, cancel, rows):
    endpoint(EventType.JOB_CANCELED)
    _, ids = queue_batch(12)
    cancel(*ids)

    assert sorted(delivery.job_id for delivery in rows()) == ids


def test_pending_messages_of_a_large_batch_are_merged(
    queue_batch, endpoint, cancel, advance, claim_due, rows, body_of
):
    endpoint(EventType.JOB_CANCELED)
    _, ids = queue_batch(130, total=LARGE)
    for first in range(0, 130, 10):
        cancel(*ids[first : first + 10])
    advance(5)

    claimed = claim_due(500)
    assert sorted(len(claim.event_ids) for claim in claimed) == [30, 100]
    found = [each["id"] for claim in claimed for each in body_of(claim)["data"]["data"]]
    assert sorted(found) == ids
    assert len(rows()) == 2


def test_messages_of_two_endpoints_are_not_merged(
    queue_batch, endpoint, cancel, advance, claim_due
):
    both = {endpoint(EventType.JOB_CANCELED), endpoint(EventType.JOB_CANCELED)}
    _, ids = queue_batch(20, total=LARGE)
    cancel(*ids)
    advance(5)

    claimed = claim_due()
    assert {claim.endpoint_id for claim in claimed} == both
    assert [len(claim.event_ids) for claim in claimed] == [20, 20]


def test_a_message_that_was_sent_is_not_merged(
    queue_batch, endpoint, cancel, advance, claim_due, settle
):
    endpoint(EventType.JOB_CANCELED)
    _, ids = queue_batch(20, total=LARGE)
    cancel(*ids[:10])
    advance(5)
    settle(claim_due(), AttemptOutcome.HTTP_5XX)
    cancel(*ids[10:])
    advance()

    assert [len(claim.event_ids) for claim in claim_due()] == [10, 10]


def test_canceling_thousands_inserts_their_deliveries_in_one_statement(
    sessions, queue_batch, endpoint, rows
):
    endpoint(EventType.JOB_CANCELED)
    batch_id, ids = queue_batch(3000, total=LARGE)
    with sessions.begin() as session:
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)

    assert sum(len(delivery.event_ids) for delivery in rows()) == 3000
    assert len(rows()) == 30
    assert len(ids) == 3000
