"""Delivery log: filters, tenants, and retention."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, update

from darkroom.db.tables import DEFAULT_TENANT
from darkroom.db.webhook_tables import Delivery
from darkroom.errors import NotFound
from darkroom.event_types import EventType
from darkroom.events import fanout
from darkroom.webhooks import delivery_log, endpoints
from darkroom.webhooks.deliveries import AttemptOutcome
from darkroom.webhooks.delivery_log import DeliveryFilter

LARGE = fanout.LARGE_BATCH + 1


def test_a_job_filter_also_finds_lists_with_the_job(
    sessions, queue_batch, endpoint, cancel, advance, claim_due
):
    endpoint(EventType.JOB_CANCELED)
    batch_id, ids = queue_batch(10, total=LARGE)
    cancel(*ids[:5])
    advance(5)
    claim_due()
    cancel(*ids[5:])

    with sessions.begin() as session:
        [found] = delivery_log.page(
            session, DEFAULT_TENANT, DeliveryFilter(job_id=ids[7]), limit=10
        )
        assert len(found.event_ids) == 1
        both = delivery_log.page(
            session, DEFAULT_TENANT, DeliveryFilter(batch_id=batch_id), limit=10
        )
        assert len(both) == 6


def test_a_tenant_sees_only_its_own_deliveries(sessions, queue_jobs, cancel, endpoint, rows):
    endpoint()
    cancel(*queue_jobs({}))
    [delivery] = rows()

    with sessions.begin() as session:
        assert delivery_log.page(session, "ten_other", DeliveryFilter(), limit=10) == []
        for act in (delivery_log.find, delivery_log.replay):
            with pytest.raises(NotFound):
                act(session, "ten_other", delivery.id)
        for act in (endpoints.find, endpoints.remove, endpoints.enable, endpoints.send_test):
            with pytest.raises(NotFound):
                act(session, "ten_other", delivery.endpoint_id)
        since = datetime(2000, 1, 1, tzinfo=UTC)
        assert delivery_log.replay_failed(session, "ten_other", since=since) == 0


def test_finished_deliveries_are_deleted_after_a_month(
    sessions, queue_jobs, cancel, endpoint, claim_due, settle, rows
):
    endpoint()
    cancel(*queue_jobs({}, {}))
    old, young = claim_due()
    settle([old, young], AttemptOutcome.HTTP_2XX)
    with sessions.begin() as session:
        session.execute(
            update(Delivery)
            .where(Delivery.id == old.id)
            .values(finished_at=func.now() - timedelta(days=31))
        )
        delivery_log.delete_expired(session)

    assert [delivery.id for delivery in rows()] == [young.id]
