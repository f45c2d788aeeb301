"""Health of endpoints: 410, failures, deletion, and the maximum per tenant."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import func, update

from darkroom.db.tables import DEFAULT_TENANT
from darkroom.db.webhook_tables import WebhookEndpoint
from darkroom.errors import NotFound
from darkroom.event_types import EventType
from darkroom.webhooks import deliveries, endpoints
from darkroom.webhooks.deliveries import AttemptOutcome
from darkroom.webhooks.endpoints import TooManyEndpoints
from darkroom.webhooks.secret_box import SecretBox

OWN_URL = "https://mine.example/hook"
SECRET_BOX = SecretBox("a key")


def endpoint_row(sessions, endpoint_id):
    with sessions.begin() as session:
        return session.get(WebhookEndpoint, endpoint_id)


def failing_for(sessions, endpoint_id, days):
    with sessions.begin() as session:
        session.execute(
            update(WebhookEndpoint)
            .where(WebhookEndpoint.id == endpoint_id)
            .values(failing_since=func.now() - timedelta(days=days))
        )


def test_a_410_disables_the_endpoint(
    sessions, queue_jobs, cancel, endpoint, claim_due, settle, rows
):
    gone = endpoint(EventType.JOB_CANCELED)
    cancel(*queue_jobs({}, {}, {}))
    first, *_others = claim_due(1)
    settle([first], AttemptOutcome.HTTP_410)

    assert endpoint_row(sessions, gone).disabled_reason == "gone"
    assert {delivery.status for delivery in rows()} == {"exhausted"}
    cancel(*queue_jobs({}))
    assert len(rows()) == 3
    assert claim_due() == []


def test_five_days_of_failures_disable_an_endpoint_and_notify_the_others(
    sessions, queue_jobs, cancel, endpoint, claim_due, settle, rows, body_of
):
    tired = endpoint(EventType.JOB_CANCELED)
    watching = endpoint(EventType.WEBHOOK_DISABLED)
    cancel(*queue_jobs({}, {}))
    first, second = claim_due()
    settle([first], AttemptOutcome.TIMEOUT)
    assert endpoint_row(sessions, tired).failing_since is not None
    failing_for(sessions, tired, 4.9)
    settle([second], AttemptOutcome.TIMEOUT)
    assert endpoint_row(sessions, tired).disabled_at is None

    failing_for(sessions, tired, 5.1)
    cancel(*queue_jobs({}))
    settle(claim_due(), AttemptOutcome.HTTP_4XX)

    assert endpoint_row(sessions, tired).disabled_reason == "failing"
    found = [row for row in rows() if row.endpoint_id == watching]
    assert [row.type for row in found] == ["webhook.disabled"]
    assert {row.status for row in rows() if row.endpoint_id == tired} == {"exhausted"}
    [claim] = claim_due()
    body = body_of(claim)
    assert body["data"] == {"id": tired, "object": "webhook", "reason": "failing"}


def test_one_success_clears_all_failures(sessions, queue_jobs, cancel, endpoint, claim_due, settle):
    endpoint_id = endpoint()
    cancel(*queue_jobs({}, {}))
    first, second = claim_due()
    settle([first], AttemptOutcome.HTTP_5XX)
    failing_for(sessions, endpoint_id, 10)
    settle([second], AttemptOutcome.HTTP_2XX)

    assert endpoint_row(sessions, endpoint_id).failing_since is None
    assert endpoint_row(sessions, endpoint_id).disabled_at is None


def test_a_410_from_the_url_of_a_job_exhausts_only_that_delivery(
    queue_jobs, cancel, claim_due, settle, rows
):
    cancel(*queue_jobs({"webhook_url": OWN_URL}, {"webhook_url": OWN_URL}))
    first, second = claim_due()
    settle([first], AttemptOutcome.HTTP_410)
    settle([second], AttemptOutcome.HTTP_2XX)

    assert sorted(delivery.status for delivery in rows()) == ["accepted", "exhausted"]


def test_a_deleted_endpoint_gets_nothing_and_loses_its_secret(
    sessions, queue_jobs, cancel, endpoint, claim_due, settle, advance, rows
):
    endpoint_id = endpoint()
    cancel(*queue_jobs({}, {}))
    flying, *_ = claim_due(1)
    with sessions.begin() as session:
        endpoints.remove(session, DEFAULT_TENANT, endpoint_id)
        deliveries.drop_pending(session, endpoint_id)
    settle([flying], AttemptOutcome.HTTP_5XX)
    advance()

    assert claim_due() == []
    assert {delivery.status for delivery in rows()} == {"exhausted"}
    row = endpoint_row(sessions, endpoint_id)
    assert (row.secret, row.old_secret) == ("", None)
    with sessions.begin() as session, pytest.raises(NotFound):
        endpoints.find(session, DEFAULT_TENANT, endpoint_id)


def test_a_tenant_has_a_maximum_of_endpoints(sessions, endpoint):
    for _ in range(3):
        endpoint()
    with sessions.begin() as session, pytest.raises(TooManyEndpoints):
        endpoints.create(
            session,
            DEFAULT_TENANT,
            url="https://ok.example/",
            event_types={EventType.JOB_FAILED},
            secret_box=SECRET_BOX,
            max_endpoints=3,
        )


def test_concurrent_registrations_do_not_exceed_the_maximum(sessions):
    def register(_):
        with sessions.begin() as session, contextlib.suppress(TooManyEndpoints):
            endpoints.create(
                session,
                DEFAULT_TENANT,
                url="https://ok.example/",
                event_types={EventType.JOB_FAILED},
                secret_box=SECRET_BOX,
                max_endpoints=3,
            )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(register, range(16)))
    with sessions.begin() as session:
        assert len(endpoints.page(session, DEFAULT_TENANT, limit=100)) == 3
