"""Claims of deliveries: leases, fencing, deferral and release."""

from datetime import timedelta

from darkroom.event_types import EventType
from darkroom.webhooks import deliveries
from darkroom.webhooks.deliveries import AttemptOutcome


def test_a_claim_is_exclusive_until_its_lease_ends(
    queue_jobs, cancel, endpoint, claim_due, advance
):
    endpoint()
    cancel(*queue_jobs({}))

    [first] = claim_due()
    assert claim_due() == []
    advance(60)
    [second] = claim_due()
    assert second.id == first.id
    assert second.message_id == first.message_id
    assert second.token > first.token


def test_a_late_sender_changes_nothing(
    queue_jobs, cancel, endpoint, claim_due, advance, settle, rows, attempts_of
):
    endpoint()
    cancel(*queue_jobs({}))
    stale = claim_due()
    advance(60)
    fresh = claim_due()

    assert settle(stale, AttemptOutcome.HTTP_410) == 0
    assert settle(fresh, AttemptOutcome.HTTP_2XX) == 1
    assert settle(stale, AttemptOutcome.HTTP_2XX) == 0
    [delivery] = rows()
    assert delivery.status == "accepted"
    assert attempts_of(delivery.id) == ["interrupted", "http_2xx"]


def test_a_dead_sender_costs_no_attempt(queue_jobs, cancel, endpoint, claim_due, advance, rows):
    endpoint()
    cancel(*queue_jobs({}))
    for _ in range(20):
        assert len(claim_due()) == 1
        advance(60)

    assert rows()[0].failures == 0


def test_deferred_deliveries_do_not_hide_those_behind_them(
    queue_jobs, cancel, endpoint, claim_due, rows
):
    slow = endpoint(EventType.JOB_CANCELED)
    cancel(*queue_jobs(*[{}] * 30))
    quick = endpoint(EventType.JOB_CANCELED)
    cancel(*queue_jobs({}))

    def admit(claim):
        return 100.0 if claim.endpoint_id == slow else None

    taken = []
    for _ in range(8):
        taken += claim_due(5, admit=admit)
    assert [claim.endpoint_id for claim in taken] == [quick]
    assert {row.status for row in rows() if row.endpoint_id == slow} == {"pending"}


def test_deferred_deliveries_are_due_once_their_destination_answers(
    sessions, queue_jobs, cancel, endpoint, claim_due, settle
):
    new, other = endpoint(EventType.JOB_CANCELED), endpoint(EventType.JOB_CANCELED)
    cancel(*queue_jobs(*[{}] * 4))
    [failed] = [each for each in claim_due(1) if settle([each], AttemptOutcome.HTTP_5XX)]
    seen = []

    def one_each(claim):
        seen.append(claim.endpoint_id)
        return None if seen.count(claim.endpoint_id) == 1 else 10.0

    sent = {claim.endpoint_id: claim for claim in claim_due(admit=one_each)}
    assert claim_due() == []
    with sessions.begin() as session:
        deliveries.make_due_now(session, sent[new], within=timedelta(seconds=15))

    came = claim_due()
    assert {claim.endpoint_id for claim in came} == {new}
    assert len(came) == 3 - (failed.endpoint_id == new)
    assert other in sent


def test_a_released_claim_is_due_at_once(sessions, queue_jobs, cancel, endpoint, claim_due):
    endpoint()
    cancel(*queue_jobs({}))
    claimed = claim_due()
    with sessions.begin() as session:
        deliveries.release(session, claimed)

    assert [claim.id for claim in claim_due()] == [claim.id for claim in claimed]
