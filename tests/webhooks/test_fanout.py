"""Deliveries as rows: who is told, claims and their fences, schedules, ends, replays."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, update

from api.schemas.webhook_payloads import MESSAGES
from darkroom import batches
from darkroom.db.tables import DEFAULT_TENANT, Event, Job, Tenant
from darkroom.db.webhook_tables import Delivery, DeliveryAttempt, WebhookEndpoint
from darkroom.errors import NotFound
from darkroom.event_types import SUBSCRIBABLE, EventType
from darkroom.events import fanout
from darkroom.ids import is_id
from darkroom.jobs import lifecycle
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from darkroom.webhooks import deliveries, delivery_log, endpoints, payloads
from darkroom.webhooks.deliveries import DELAYS_S, AttemptOutcome, Result, delay_s
from darkroom.webhooks.delivery_log import DeliveryFilter
from darkroom.webhooks.endpoints import EndpointDisabled, TooManyEndpoints
from darkroom.webhooks.secret_box import SecretBox
from tests.conftest import new_job

OWN_URL = "https://mine.example/hook"
LEASE = timedelta(seconds=60)
SEAL = SecretBox("a key")


@pytest.fixture
def endpoint(sessions):
    """Makes an endpoint; its id."""

    def make(*kinds, tenant=DEFAULT_TENANT, url="https://ok.example/hook"):
        with sessions.begin() as session:
            made = endpoints.create(
                session, tenant, url=url, kinds=set(kinds or SUBSCRIBABLE), seal=SEAL, most=100
            )
        return made.endpoint.id

    return make


@pytest.fixture
def queue_batch(sessions, registry):
    """Queues a batch; its id and its jobs'."""

    def queue(count, *, total=None, webhook_url=None, **fields):
        rows = [
            new_job(registry, {"seed": number} | fields, row_number=number)
            for number in range(1, count + 1)
        ]
        with sessions.begin() as session:
            batch = batches.create(
                session, DEFAULT_TENANT, total=total or count, label="b", webhook_url=webhook_url
            )
            return batch.id, lifecycle.submit(session, DEFAULT_TENANT, rows, batch_id=batch.id)

    return queue


@pytest.fixture
def cancel(sessions):
    """Cancels jobs: the shortest way to an event."""

    def end(*job_ids):
        with sessions.begin() as session:
            for job_id in job_ids:
                lifecycle.cancel(session, DEFAULT_TENANT, job_id)

    return end


@pytest.fixture
def rows(sessions):
    """All deliveries, oldest first."""

    def read():
        with sessions.begin() as session:
            return session.scalars(select(Delivery).order_by(Delivery.id)).all()

    return read


@pytest.fixture
def take(sessions):
    """Claims what is due."""

    def claim(limit=100, *, admit=lambda _: None, lease=LEASE):
        with sessions.begin() as session:
            return deliveries.claim(session, limit=limit, lease=lease, admit=admit)[0]

    return claim


@pytest.fixture
def settle(sessions):
    """Settles claims with one outcome; how many were ours to settle."""

    def end(claimed, outcome, retry_after_s=None):
        with sessions.begin() as session:
            results = [Result(claim, outcome, retry_after_s) for claim in claimed]
            return deliveries.settle(session, results)

    return end


@pytest.fixture
def later(sessions):
    """Lets time pass for all that is not ended: what was due in so many seconds is due now."""

    def skip(seconds=10**7):
        with sessions.begin() as session:
            session.execute(
                update(Delivery).values(
                    next_attempt_at=Delivery.next_attempt_at - timedelta(seconds=seconds)
                )
            )

    return skip


def body_of(sessions, claim):
    with sessions.begin() as session:
        body = json.loads(payloads.bodies(session, [claim])[claim.id])
    MESSAGES[claim.type].model_validate(body)  # as /openapi.json says
    return body


def attempts_of(sessions, delivery_id):
    with sessions.begin() as session:
        made = select(DeliveryAttempt.outcome).where(DeliveryAttempt.delivery_id == delivery_id)
        return session.scalars(made.order_by(DeliveryAttempt.number)).all()


# --- who is told ----------------------------------------------------------------------------------


def test_nobody_asked_nobody_is_told(queue_jobs, cancel, rows):
    cancel(*queue_jobs({}, {}))

    assert rows() == []


def test_each_endpoint_is_told_what_it_subscribed_to(queue_jobs, cancel, endpoint, rows):
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


def test_another_tenants_endpoint_hears_nothing(sessions, queue_jobs, cancel, endpoint, rows):
    with sessions.begin() as session:
        session.add(Tenant(id="ten_other", name="other"))
    endpoint(tenant="ten_other")
    cancel(*queue_jobs({}))

    assert rows() == []


def test_all_who_are_told_of_an_event_get_one_message_id(queue_jobs, cancel, endpoint, rows):
    endpoint()
    endpoint()
    cancel(*queue_jobs({"webhook_url": OWN_URL}))

    told = rows()
    assert len(told) == 3
    assert len({delivery.message_id for delivery in told}) == 1
    assert len({delivery.id for delivery in told}) == 3


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (None, ["job.failed", "job.succeeded"]),
        (["job.started"], ["job.started", "job.started"]),
        (["job.failed"], ["job.failed"]),
    ],
)
def test_the_url_of_a_job_is_told_of_its_ends_or_of_what_it_names(
    sessions, queue_jobs, claim, rows, wanted, told
):
    queue_jobs(*[{"webhook_url": OWN_URL} | ({"webhook_events": wanted} if wanted else {})] * 2)
    good, bad = claim()
    with sessions.begin() as session:
        drawn = Succeeded(good.id, "a/b/1.png", "0" * 64, 10, inference_ms=5, upload_ms=1)
        failed = Failed(bad.id, "invalid_output", "it is black")
        dispatches.settle(session, good.dispatch_id, [drawn, failed])

    assert sorted(delivery.type for delivery in rows()) == told
    assert {delivery.url for delivery in rows()} == {OWN_URL}


def test_the_url_of_a_batch_is_told_of_its_end_alone(queue_batch, cancel, rows):
    batch_id, ids = queue_batch(2, webhook_url=OWN_URL)
    cancel(*ids)

    [delivery] = rows()
    assert (delivery.type, delivery.batch_id, delivery.job_id) == (
        "batch.completed",
        batch_id,
        None,
    )


def test_a_canceled_batch_says_so(sessions, queue_batch, endpoint, rows):
    endpoint(EventType.BATCH_CANCELED)
    batch_id, _ = queue_batch(3, webhook_url=OWN_URL)
    with sessions.begin() as session:
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)

    assert [delivery.type for delivery in rows()] == ["batch.canceled"] * 2


def test_a_retried_job_is_told_of_as_the_first_was(sessions, queue_jobs, cancel, rows):
    [job_id] = queue_jobs({"webhook_url": OWN_URL, "webhook_events": ["job.canceled"]})
    cancel(job_id)
    with sessions.begin() as session:
        again = lifecycle.retry(session, DEFAULT_TENANT, job_id).id
    cancel(again)

    assert [delivery.job_id for delivery in rows()] == [job_id, again]


def test_what_did_not_commit_is_told_to_nobody(sessions, queue_jobs, endpoint, rows):
    endpoint()
    [job_id] = queue_jobs({})
    session = sessions()
    lifecycle.cancel(session, DEFAULT_TENANT, job_id)
    assert session.scalar(select(func.count()).select_from(Delivery)) == 1
    session.rollback()
    session.close()

    assert rows() == []


# --- messages of large batches --------------------------------------------------------------------

LARGE = fanout.LARGE_BATCH + 1


def test_the_jobs_of_a_large_batch_are_told_of_together(sessions, queue_batch, endpoint, rows):
    endpoint(EventType.JOB_CANCELED)
    batch_id, ids = queue_batch(250, total=LARGE)
    with sessions.begin() as session:
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)

    told = rows()
    assert sorted(len(delivery.event_ids) for delivery in told) == [50, 100, 100]
    assert len({delivery.message_id for delivery in told}) == 3
    for_company = timedelta(seconds=fanout.GROUPING_S)
    assert all(delivery.next_attempt_at - delivery.created_at >= for_company for delivery in told)
    with sessions.begin() as session:
        listed = select(Event.job_id).where(
            Event.id.in_([each for delivery in told for each in delivery.event_ids])
        )
        assert sorted(session.scalars(listed)) == ids


def test_a_small_batch_is_told_of_job_by_job(queue_batch, endpoint, cancel, rows):
    endpoint(EventType.JOB_CANCELED)
    _, ids = queue_batch(12)
    cancel(*ids)

    assert sorted(delivery.job_id for delivery in rows()) == ids


def test_messages_of_a_large_batch_that_wait_become_one(
    sessions, queue_batch, endpoint, cancel, later, take, rows
):
    endpoint(EventType.JOB_CANCELED)
    _, ids = queue_batch(130, total=LARGE)
    for first in range(0, 130, 10):
        cancel(*ids[first : first + 10])
    later(5)

    claimed = take(500)
    assert sorted(len(claim.event_ids) for claim in claimed) == [30, 100]
    told = [each["id"] for claim in claimed for each in body_of(sessions, claim)["data"]["data"]]
    assert sorted(told) == ids
    assert len(rows()) == 2


def test_two_endpoints_do_not_share_their_messages(queue_batch, endpoint, cancel, later, take):
    both = {endpoint(EventType.JOB_CANCELED), endpoint(EventType.JOB_CANCELED)}
    _, ids = queue_batch(20, total=LARGE)
    cancel(*ids)
    later(5)

    claimed = take()
    assert {claim.endpoint_id for claim in claimed} == both
    assert [len(claim.event_ids) for claim in claimed] == [20, 20]


def test_what_was_sent_once_keeps_its_jobs(queue_batch, endpoint, cancel, later, take, settle):
    endpoint(EventType.JOB_CANCELED)
    _, ids = queue_batch(20, total=LARGE)
    cancel(*ids[:10])
    later(5)
    settle(take(), AttemptOutcome.HTTP_5XX)
    cancel(*ids[10:])
    later()

    assert [len(claim.event_ids) for claim in take()] == [10, 10]


# --- claims and fences ----------------------------------------------------------------------------


def test_a_claim_is_nobody_elses_until_its_lease_ends(queue_jobs, cancel, endpoint, take, later):
    endpoint()
    cancel(*queue_jobs({}))

    [first] = take()
    assert take() == []
    later(60)
    [second] = take()
    assert second.id == first.id
    assert second.message_id == first.message_id
    assert second.token > first.token


def test_a_late_sender_changes_nothing(
    sessions, queue_jobs, cancel, endpoint, take, later, settle, rows
):
    endpoint()
    cancel(*queue_jobs({}))
    stale = take()
    later(60)
    fresh = take()

    assert settle(stale, AttemptOutcome.HTTP_410) == 0
    assert settle(fresh, AttemptOutcome.HTTP_2XX) == 1
    assert settle(stale, AttemptOutcome.HTTP_2XX) == 0
    [delivery] = rows()
    assert delivery.status == "accepted"
    assert attempts_of(sessions, delivery.id) == ["interrupted", "http_2xx"]


def test_a_sender_that_died_costs_no_attempt(queue_jobs, cancel, endpoint, take, later, rows):
    endpoint()
    cancel(*queue_jobs({}))
    for _ in range(20):
        assert len(take()) == 1
        later(60)

    assert rows()[0].failures == 0


def test_what_is_put_off_does_not_hide_what_stands_behind_it(
    queue_jobs, cancel, endpoint, take, rows
):
    slow = endpoint(EventType.JOB_CANCELED)
    cancel(*queue_jobs(*[{}] * 30))
    quick = endpoint(EventType.JOB_CANCELED)
    cancel(*queue_jobs({}))

    def admit(claim):
        return 100.0 if claim.endpoint_id == slow else None

    taken = []
    for _ in range(8):
        taken += take(5, admit=admit)
    assert [claim.endpoint_id for claim in taken] == [quick]
    assert {row.status for row in rows() if row.endpoint_id == slow} == {"pending"}


def test_what_was_put_off_comes_once_its_destination_has_answered(
    sessions, queue_jobs, cancel, endpoint, take, settle
):
    new, other = endpoint(EventType.JOB_CANCELED), endpoint(EventType.JOB_CANCELED)
    cancel(*queue_jobs(*[{}] * 4))
    [failed] = [each for each in take(1) if settle([each], AttemptOutcome.HTTP_5XX)]
    seen = []

    def one_each(claim):
        seen.append(claim.endpoint_id)
        return None if seen.count(claim.endpoint_id) == 1 else 10.0

    sent = {claim.endpoint_id: claim for claim in take(admit=one_each)}
    assert take() == []
    with sessions.begin() as session:
        deliveries.make_due_now(session, sent[new], within=timedelta(seconds=15))

    came = take()
    assert {claim.endpoint_id for claim in came} == {new}
    assert len(came) == 3 - (failed.endpoint_id == new)
    assert other in sent


def test_what_is_handed_back_is_due_at_once(sessions, queue_jobs, cancel, endpoint, take):
    endpoint()
    cancel(*queue_jobs({}))
    claimed = take()
    with sessions.begin() as session:
        deliveries.release(session, claimed)

    assert [claim.id for claim in take()] == [claim.id for claim in claimed]


# --- schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "planned"), [*enumerate(DELAYS_S, 1)])
def test_the_schedule_is_that_of_the_contract(failures, planned):
    assert DELAYS_S == (5, 30, 120, 600, 3600, 21600, 86400)
    for _ in range(100):
        assert planned <= delay_s(failures) <= planned * 1.2


@given(st.integers(1, 7), st.floats(0, 10**9))
def test_the_receivers_wish_is_honoured_within_a_day(failures, wish):
    assert delay_s(failures, retry_after_s=wish) >= min(wish, 86_400)
    assert delay_s(failures, retry_after_s=wish) <= 86_400 * 1.2


def test_after_the_eighth_failure_it_is_exhausted(
    sessions, queue_jobs, cancel, endpoint, take, later, settle, rows
):
    endpoint()
    cancel(*queue_jobs({}))
    for attempt in range(8):
        assert rows()[0].status == "pending", attempt
        settle(take(), AttemptOutcome.HTTP_5XX)
        later()

    [delivery] = rows()
    assert (delivery.status, delivery.failures) == ("exhausted", 8)
    assert attempts_of(sessions, delivery.id) == ["http_5xx"] * 8
    assert take() == []


def test_it_is_not_tried_before_its_time(queue_jobs, cancel, endpoint, take, later, settle):
    endpoint()
    cancel(*queue_jobs({}))
    settle(take(), AttemptOutcome.HTTP_5XX, 1000.0)

    assert take() == []
    later(900)
    assert take() == []
    later(100)
    assert len(take()) == 1


# --- endpoints that fail --------------------------------------------------------------------------


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


def test_an_endpoint_that_is_gone_is_called_no_more(
    sessions, queue_jobs, cancel, endpoint, take, settle, rows
):
    gone = endpoint(EventType.JOB_CANCELED)
    cancel(*queue_jobs({}, {}, {}))
    first, *_others = take(1)
    settle([first], AttemptOutcome.HTTP_410)

    assert endpoint_row(sessions, gone).disabled_reason == "gone"
    assert {delivery.status for delivery in rows()} == {"exhausted"}
    cancel(*queue_jobs({}))
    assert len(rows()) == 3
    assert take() == []


def test_five_days_of_failure_end_it_and_others_are_told(
    sessions, queue_jobs, cancel, endpoint, take, settle, rows
):
    tired = endpoint(EventType.JOB_CANCELED)
    watching = endpoint(EventType.WEBHOOK_DISABLED)
    cancel(*queue_jobs({}, {}))
    first, second = take()
    settle([first], AttemptOutcome.TIMEOUT)
    assert endpoint_row(sessions, tired).failing_since is not None
    failing_for(sessions, tired, 4.9)
    settle([second], AttemptOutcome.TIMEOUT)
    assert endpoint_row(sessions, tired).disabled_at is None

    failing_for(sessions, tired, 5.1)
    cancel(*queue_jobs({}))
    settle(take(), AttemptOutcome.HTTP_4XX)

    assert endpoint_row(sessions, tired).disabled_reason == "failing"
    told = [row for row in rows() if row.endpoint_id == watching]
    assert [row.type for row in told] == ["webhook.disabled"]
    assert {row.status for row in rows() if row.endpoint_id == tired} == {"exhausted"}
    [claim] = take()
    body = body_of(sessions, claim)
    assert body["data"] == {"id": tired, "object": "webhook", "reason": "failing"}


def test_one_success_forgives_all_failures(sessions, queue_jobs, cancel, endpoint, take, settle):
    endpoint_id = endpoint()
    cancel(*queue_jobs({}, {}))
    first, second = take()
    settle([first], AttemptOutcome.HTTP_5XX)
    failing_for(sessions, endpoint_id, 10)
    settle([second], AttemptOutcome.HTTP_2XX)

    assert endpoint_row(sessions, endpoint_id).failing_since is None
    assert endpoint_row(sessions, endpoint_id).disabled_at is None


def test_a_410_from_the_url_of_a_job_ends_that_delivery_alone(
    queue_jobs, cancel, take, settle, rows
):
    cancel(*queue_jobs({"webhook_url": OWN_URL}, {"webhook_url": OWN_URL}))
    first, second = take()
    settle([first], AttemptOutcome.HTTP_410)
    settle([second], AttemptOutcome.HTTP_2XX)

    assert sorted(delivery.status for delivery in rows()) == ["accepted", "exhausted"]


def test_a_deleted_endpoint_is_told_nothing_and_its_secret_is_gone(
    sessions, queue_jobs, cancel, endpoint, take, settle, later, rows
):
    endpoint_id = endpoint()
    cancel(*queue_jobs({}, {}))
    flying, *_ = take(1)
    with sessions.begin() as session:
        endpoints.remove(session, DEFAULT_TENANT, endpoint_id)
        deliveries.drop_pending(session, endpoint_id)
    settle([flying], AttemptOutcome.HTTP_5XX)
    later()

    assert take() == []
    assert {delivery.status for delivery in rows()} == {"exhausted"}
    row = endpoint_row(sessions, endpoint_id)
    assert (row.secret, row.old_secret) == ("", None)
    with sessions.begin() as session, pytest.raises(NotFound):
        endpoints.find(session, DEFAULT_TENANT, endpoint_id)


def test_a_tenant_has_so_many_endpoints_and_no_more(sessions, endpoint):
    for _ in range(3):
        endpoint()
    with sessions.begin() as session, pytest.raises(TooManyEndpoints):
        endpoints.create(
            session,
            DEFAULT_TENANT,
            url="https://ok.example/",
            kinds={EventType.JOB_FAILED},
            seal=SEAL,
            most=3,
        )


def test_many_who_register_at_once_do_not_get_past_it(sessions):
    def register(_):
        with sessions.begin() as session, contextlib.suppress(TooManyEndpoints):
            endpoints.create(
                session,
                DEFAULT_TENANT,
                url="https://ok.example/",
                kinds={EventType.JOB_FAILED},
                seal=SEAL,
                most=3,
            )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(register, range(16)))
    with sessions.begin() as session:
        assert len(endpoints.page(session, DEFAULT_TENANT, limit=100)) == 3


# --- replays --------------------------------------------------------------------------------------


def exhaust(take, settle, later):
    for _ in range(8):
        settle(take(), AttemptOutcome.HTTP_5XX)
        later()


def test_a_replay_is_the_same_message_with_all_attempts_before_it(
    sessions, queue_jobs, cancel, endpoint, take, settle, later, rows
):
    endpoint()
    cancel(*queue_jobs({}))
    exhaust(take, settle, later)
    [before] = rows()
    with sessions.begin() as session:
        replayed = delivery_log.replay(session, DEFAULT_TENANT, before.id)
        assert (replayed.status, replayed.failures) == ("pending", 0)

    [claim] = take()
    assert claim.message_id == before.message_id
    settle([claim], AttemptOutcome.HTTP_2XX)
    assert rows()[0].status == "accepted"
    assert attempts_of(sessions, before.id) == ["http_5xx"] * 8 + ["http_2xx"]


def test_all_that_failed_since_a_time_is_sent_anew(
    sessions, queue_jobs, cancel, endpoint, take, settle, later
):
    one, _other = endpoint(), endpoint()
    cancel(*queue_jobs({}, {}))
    exhaust(take, settle, later)
    cancel(*queue_jobs({}))
    settle(take(), AttemptOutcome.HTTP_2XX)
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
    assert len(take()) == 4


def test_what_is_disabled_or_deleted_cannot_be_replayed(
    sessions, queue_jobs, cancel, endpoint, take, settle, rows
):
    endpoint_id = endpoint()
    cancel(*queue_jobs({}))
    settle(take(), AttemptOutcome.HTTP_410)
    [delivery] = rows()
    with sessions.begin() as session, pytest.raises(EndpointDisabled):
        delivery_log.replay(session, DEFAULT_TENANT, delivery.id)
    with sessions.begin() as session:
        endpoints.enable(session, DEFAULT_TENANT, endpoint_id)
        delivery_log.replay(session, DEFAULT_TENANT, delivery.id)

    assert len(take()) == 1


# --- what it says ---------------------------------------------------------------------------------


def test_a_failed_job_says_why(sessions, queue_jobs, claim, take):
    queue_jobs({"webhook_url": OWN_URL, "label": "mine", "metadata": {"a": "b"}})
    [job] = claim()
    with sessions.begin() as session:
        dispatches.settle(
            session, job.dispatch_id, [Failed(job.id, "invalid_output", "it is black " * 100)]
        )
    [claimed] = take()
    body = body_of(sessions, claimed)

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


def test_an_event_says_what_was_true_when_it_happened(sessions, queue_jobs, claim, take):
    queue_jobs({"webhook_url": OWN_URL, "webhook_events": ["job.started", "job.succeeded"]})
    [job] = claim()
    with sessions.begin() as session:
        drawn = Succeeded(job.id, "a/b/1.png", "0" * 64, 10, inference_ms=5, upload_ms=1)
        dispatches.settle(session, job.dispatch_id, [drawn])

    said = {body_of(sessions, each)["type"]: body_of(sessions, each) for each in take()}
    assert said["job.started"]["data"]["status"] == "running"
    assert said["job.succeeded"]["data"]["status"] == "succeeded"


def test_a_batch_says_its_counts(sessions, queue_batch, cancel, take):
    batch_id, ids = queue_batch(3, webhook_url=OWN_URL)
    cancel(*ids)
    [claimed] = take()
    data = body_of(sessions, claimed)["data"]

    assert (data["id"], data["status"], data["outcome"]) == (batch_id, "completed", "all_failed")
    assert data["counts"]["total"] == data["counts"]["canceled"] == 3


def test_no_body_reaches_32_kib(sessions, queue_batch, endpoint, later, take):
    endpoint(EventType.JOB_CANCELED)
    widest = "\U0001f5bc" * 200
    batch_id, _ = queue_batch(100, total=LARGE, label=widest)
    with sessions.begin() as session:
        session.execute(update(Job).values(custom_id="\U0001f5bc" * 15, row_number=Job.row_number))
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)
    queue_batch(1, webhook_url=OWN_URL, label=widest)
    later(5)
    with sessions.begin() as session:
        made = payloads.bodies(session, take())

    assert max(map(len, made.values())) > 20_000
    assert max(map(len, made.values())) < payloads.MAX_BYTES


def test_half_an_id_is_no_id(sessions, queue_jobs, cancel, take):
    [short, long] = queue_jobs(*[{"webhook_url": OWN_URL}] * 2)
    with sessions.begin() as session:
        session.execute(update(Job).where(Job.id == short).values(custom_id="c" * 200))
        session.execute(update(Job).where(Job.id == long).values(custom_id="c" * 2000))
    cancel(short, long)

    said = {body["data"]["id"]: body["data"] for body in (body_of(sessions, c) for c in take())}
    assert said[short]["custom_id"] == "c" * 200
    assert said[long]["custom_id"] is None


# --- the log --------------------------------------------------------------------------------------


def test_the_log_finds_a_job_also_among_many(sessions, queue_batch, endpoint, cancel, later, take):
    endpoint(EventType.JOB_CANCELED)
    batch_id, ids = queue_batch(10, total=LARGE)
    cancel(*ids[:5])
    later(5)
    take()
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


def test_the_log_is_each_tenants_own(sessions, queue_jobs, cancel, endpoint, rows):
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


def test_the_log_is_kept_for_a_month(sessions, queue_jobs, cancel, endpoint, take, settle, rows):
    endpoint()
    cancel(*queue_jobs({}, {}))
    old, young = take()
    settle([old, young], AttemptOutcome.HTTP_2XX)
    with sessions.begin() as session:
        session.execute(
            update(Delivery)
            .where(Delivery.id == old.id)
            .values(finished_at=func.now() - timedelta(days=31))
        )
        delivery_log.delete_old(session)

    assert [delivery.id for delivery in rows()] == [young.id]


# --- many -----------------------------------------------------------------------------------------


def test_canceling_thousands_is_one_statement_for_their_webhooks(
    sessions, queue_batch, endpoint, rows
):
    endpoint(EventType.JOB_CANCELED)
    batch_id, ids = queue_batch(3000, total=LARGE)
    with sessions.begin() as session:
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)

    assert sum(len(delivery.event_ids) for delivery in rows()) == 3000
    assert len(rows()) == 30
    assert len(ids) == 3000
