"""Destination limiter: concurrency, fair shares, and the circuit breaker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.webhooks.deliveries import AttemptOutcome, Claim
from workers.webhooks.circuit_breaker import MAX_CONCURRENT, DestinationLimiter

OK, FAILED, TIMEOUT = AttemptOutcome.HTTP_2XX, AttemptOutcome.HTTP_5XX, AttemptOutcome.TIMEOUT


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def claim_of(number, endpoint="whk_a", tenant="ten_a"):
    return Claim(
        id=f"dlv_{endpoint}_{number}",
        token=1,
        tenant_id=tenant,
        endpoint_id=endpoint,
        url="https://ok.example/",
        message_id="evt_1",
        type="job.failed",
        event_ids=[1],
        failures=0,
    )


def attempt(limiter, claim, outcome, seconds=0.01):
    assert limiter.acquire(claim) is None
    limiter.record_result(claim, outcome, seconds)
    limiter.release(claim)


def admitted(limiter, claims):
    return [claim for claim in claims if limiter.acquire(claim) is None]


def test_an_unknown_destination_gets_one_request_and_a_healthy_one_many(clock):
    limiter = DestinationLimiter(1000, clock=clock)
    claims = [claim_of(number) for number in range(500)]
    assert len(admitted(limiter, claims)) == 1
    limiter.record_result(claims[0], OK, 0.01)
    limiter.release(claims[0])

    assert len(admitted(limiter, claims)) == MAX_CONCURRENT * 32


def test_a_slow_destination_gets_no_more_than_it_answers_soon(clock):
    limiter = DestinationLimiter(1000, clock=clock)
    for number in range(20):
        attempt(limiter, claim_of(number), OK, seconds=10)

    assert len(admitted(limiter, [claim_of(number) for number in range(500)])) == MAX_CONCURRENT


def test_hanging_destinations_block_one_request_each(clock):
    limiter = DestinationLimiter(2000, clock=clock)
    hanging = [claim_of(n, f"whk_{each}") for each in range(950) for n in range(3)]
    assert len(admitted(limiter, hanging)) == 950
    good = [claim_of(n, f"whk_good{each}") for each in range(50) for n in range(3)]
    first = admitted(limiter, good)
    for claim in first:
        limiter.record_result(claim, OK, 0.01)
        limiter.release(claim)

    assert len(first) == 50
    assert len(admitted(limiter, good)) == 150


def test_unknown_destinations_never_take_the_whole_capacity(clock):
    limiter = DestinationLimiter(100, clock=clock)
    attempt(limiter, claim_of(0, "whk_good", "ten_b"), OK)
    unknown = [claim_of(1, f"whk_{each}", f"ten_{each}") for each in range(200)]

    assert len(admitted(limiter, unknown)) == 75
    assert len(admitted(limiter, [claim_of(n, "whk_good", "ten_b") for n in range(30)])) == 25


def test_no_tenant_takes_the_whole_capacity(clock):
    limiter = DestinationLimiter(100, clock=clock)
    for each in range(200):
        attempt(limiter, claim_of(0, f"whk_{each}"), OK)
    mine = [claim_of(1, f"whk_{each}") for each in range(200)]

    assert len(admitted(limiter, mine)) == 75
    assert limiter.acquire(claim_of(1, "whk_other", "ten_b")) is None


def test_failures_in_a_row_open_the_circuit_ever_longer_then_it_is_probed(clock):
    limiter = DestinationLimiter(100, clock=clock)
    attempt(limiter, claim_of(0), OK)
    for number in range(10):
        attempt(limiter, claim_of(number), FAILED)
    waits = []
    for _ in range(9):
        wait_s = limiter.acquire(claim_of(1))
        waits.append(wait_s)
        clock.now += wait_s
        attempt(limiter, claim_of(1), FAILED)

    planned = [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert waits == pytest.approx(planned, rel=0.11)
    clock.now += 400
    attempt(limiter, claim_of(1), OK)
    assert len(admitted(limiter, [claim_of(number) for number in range(50)])) == 50


def test_retry_after_opens_the_circuit_for_five_minutes_at_most(clock):
    limiter = DestinationLimiter(100, clock=clock)
    first, second = claim_of(1), claim_of(2, "whk_other")
    for claim, retry_after_s in ((first, 60.0), (second, 10**6)):
        assert limiter.acquire(claim) is None
        limiter.record_result(claim, FAILED, 0.01, retry_after_s=retry_after_s)
        limiter.release(claim)

    assert 59 < limiter.acquire(first) < 70
    assert 290 < limiter.acquire(second) < 340
    clock.now += 61
    assert limiter.acquire(first) is None


def test_the_first_success_tells_that_deliveries_were_deferred(clock):
    limiter = DestinationLimiter(100, clock=clock)
    first, second = claim_of(1), claim_of(2)
    assert limiter.acquire(first) is None
    assert limiter.acquire(second) > 0
    assert limiter.record_result(first, OK, 0.01)
    assert not limiter.record_result(first, OK, 0.01)
    limiter.release(first)
    attempt(limiter, claim_of(3, "whk_other"), OK)  # for which no delivery was deferred
    assert limiter.acquire(second) is None


def test_timeouts_count_for_more_than_other_failures(clock):
    limiter = DestinationLimiter(100, clock=clock)
    for number in range(3):
        attempt(limiter, claim_of(number), TIMEOUT)

    assert limiter.acquire(claim_of(9)) > 4


def test_a_few_failures_among_successes_keep_the_circuit_closed(clock):
    limiter = DestinationLimiter(1000, clock=clock)
    for number in range(100):
        attempt(limiter, claim_of(number), FAILED if number % 3 else OK)

    assert len(admitted(limiter, [claim_of(number) for number in range(50)])) == 50


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([OK, FAILED, TIMEOUT, None]))))
def test_every_acquired_claim_is_counted_until_it_is_released(steps):
    clock = Clock()
    limiter = DestinationLimiter(16, clock=clock)
    acquired = []
    for number, (endpoint, outcome) in enumerate(steps):
        clock.now += 1
        claim = claim_of(number, f"whk_{endpoint}", f"ten_{endpoint % 2}")
        wait_s = limiter.acquire(claim)
        assert wait_s is None or wait_s > 0
        if wait_s is None:
            acquired.append((claim, outcome))
        if len(acquired) > 4 or (outcome is None and acquired):
            oldest, result = acquired.pop(0)
            if result is not None:
                limiter.record_result(oldest, result, 0.5)
            limiter.release(oldest)
        assert limiter.available == 16 - len(acquired) >= 0
    for claim, _ in acquired:
        limiter.release(claim)
    assert limiter.available == 16
