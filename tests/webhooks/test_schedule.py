"""Schedule of attempts: delays, `Retry-After`, and the last attempt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.webhooks.deliveries import DELAYS_S, AttemptOutcome, delay_s


@pytest.mark.parametrize(("failures", "planned"), [*enumerate(DELAYS_S, 1)])
def test_the_schedule_is_that_of_the_contract(failures, planned):
    assert DELAYS_S == (5, 30, 120, 600, 3600, 21600, 86400)
    for _ in range(100):
        assert planned <= delay_s(failures) <= planned * 1.2


@given(st.integers(1, 7), st.floats(0, 10**9))
def test_retry_after_is_honored_up_to_a_day(failures, wish):
    assert delay_s(failures, retry_after_s=wish) >= min(wish, 86_400)
    assert delay_s(failures, retry_after_s=wish) <= 86_400 * 1.2


def test_the_eighth_failure_exhausts_a_delivery(
    queue_jobs, cancel, endpoint, claim_due, advance, settle, rows, attempts_of
):
    endpoint()
    cancel(*queue_jobs({}))
    for attempt in range(8):
        assert rows()[0].status == "pending", attempt
        settle(claim_due(), AttemptOutcome.HTTP_5XX)
        advance()

    [delivery] = rows()
    assert (delivery.status, delivery.failures) == ("exhausted", 8)
    assert attempts_of(delivery.id) == ["http_5xx"] * 8
    assert claim_due() == []


def test_a_delivery_is_not_claimed_before_it_is_due(
    queue_jobs, cancel, endpoint, claim_due, advance, settle
):
    endpoint()
    cancel(*queue_jobs({}))
    settle(claim_due(), AttemptOutcome.HTTP_5XX, 1000.0)

    assert claim_due() == []
    advance(900)
    assert claim_due() == []
    advance(100)
    assert len(claim_due()) == 1
