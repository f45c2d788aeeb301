"""Replays of exhausted deliveries."""

from datetime import UTC, datetime, timedelta

import pytest

from darkroom.db.tables import DEFAULT_TENANT
from darkroom.webhooks import delivery_log, endpoints
from darkroom.webhooks.deliveries import AttemptOutcome
from darkroom.webhooks.endpoints import EndpointDisabled


@pytest.fixture
def exhaust(claim_due, settle, advance):
    """Fails all that is due until it is exhausted."""

    def fail():
        for _ in range(8):
            settle(claim_due(), AttemptOutcome.HTTP_5XX)
            advance()

    return fail


@pytest.fixture
def exhausted_delivery(queue_jobs, cancel, endpoint, exhaust, rows):
    endpoint()
    cancel(*queue_jobs({}))
    exhaust()
    [delivery] = rows()
    return delivery


def test_a_replay_keeps_the_message_id_and_the_attempts(
    sessions, exhausted_delivery, claim_due, settle, rows, attempts_of
):
    before = exhausted_delivery
    with sessions.begin() as session:
        replayed = delivery_log.replay(session, DEFAULT_TENANT, before.id)
        assert (replayed.status, replayed.failures) == ("pending", 0)

    [claim] = claim_due()
    assert claim.message_id == before.message_id
    settle([claim], AttemptOutcome.HTTP_2XX)
    assert rows()[0].status == "accepted"
    assert attempts_of(before.id) == ["http_5xx"] * 8 + ["http_2xx"]


def test_all_deliveries_exhausted_since_a_time_are_replayed(
    sessions, queue_jobs, cancel, endpoint, claim_due, settle, exhaust
):
    one, _other = endpoint(), endpoint()
    cancel(*queue_jobs({}, {}))
    exhaust()
    cancel(*queue_jobs({}))
    settle(claim_due(), AttemptOutcome.HTTP_2XX)
    now = datetime.now(UTC)
    ago = now - timedelta(hours=1)

    def replay(since, endpoint_id=None):
        with sessions.begin() as session:
            return delivery_log.replay_failed(
                session, DEFAULT_TENANT, since=since, endpoint_id=endpoint_id
            )

    assert replay(now + timedelta(hours=1)) == 0
    assert replay(ago, one) == 2
    assert replay(ago) == 2
    assert len(claim_due()) == 4


def test_deliveries_of_a_disabled_endpoint_cannot_be_replayed(
    sessions, queue_jobs, cancel, endpoint, claim_due, settle, rows
):
    endpoint_id = endpoint()
    cancel(*queue_jobs({}))
    settle(claim_due(), AttemptOutcome.HTTP_410)
    [delivery] = rows()
    with sessions.begin() as session, pytest.raises(EndpointDisabled):
        delivery_log.replay(session, DEFAULT_TENANT, delivery.id)
    with sessions.begin() as session:
        endpoints.enable(session, DEFAULT_TENANT, endpoint_id)
        delivery_log.replay(session, DEFAULT_TENANT, delivery.id)

    assert len(claim_due()) == 1
