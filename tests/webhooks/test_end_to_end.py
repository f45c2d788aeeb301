"""Webhooks from the API to a receiver: real processes, a real receiver, the official verifier."""

import json
import time
from datetime import UTC, datetime

import psycopg
import pytest

from tests.support.api_server import assert_problem
from tests.support.webhook_receiver import OK

pytestmark = pytest.mark.usefixtures("sender")


def test_an_event_reaches_its_endpoint_signed(receiver, register_webhook, canceled_job):
    webhook = register_webhook(events=["job.canceled"])
    job = canceled_job(label="mine")
    [received] = receiver.wait()

    body = received.verify(webhook["secret"])
    assert body["type"] == "job.canceled"
    assert body["data"]["id"] == job["id"]
    assert body["data"]["status"] == "canceled"
    assert body["data"]["label"] == "mine"
    assert received.id.startswith("evt_")


def test_the_url_of_a_job_is_signed_with_the_tenants_secret(webhook_api, receiver, canceled_job):
    job = canceled_job(webhook_url=receiver.url("/mine?token=a%20b"))
    [received] = receiver.wait()
    secret = webhook_api.get("/v1/webhook-secret").json()["secret"]

    assert received.verify(secret)["data"]["id"] == job["id"]
    assert received.path == "/mine?token=a%20b"


def test_the_url_of_a_batch_gets_its_final_event(webhook_api, receiver):
    batch = webhook_api.post(
        "/v1/batches",
        params={"webhook_url": receiver.url(), "label": "pets"},
        content="prompt\na cat\na dog\n",
        headers={"Content-Type": "text/csv"},
    ).json()
    for job in webhook_api.get(batch["urls"]["jobs"]).json()["data"]:
        webhook_api.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
    [received] = receiver.wait()

    body = received.verify(webhook_api.get("/v1/webhook-secret").json()["secret"])
    assert body["type"] == "batch.completed"
    assert body["data"]["id"] == batch["id"]
    assert body["data"]["counts"]["canceled"] == 2


def test_a_rows_own_url_is_called_too(webhook_api, receiver):
    batch = webhook_api.post(
        "/v1/batches",
        content=f"prompt,webhook_url\na cat,{receiver.url('/cat')}\na dog,\n",
        headers={"Content-Type": "text/csv"},
    ).json()
    for job in webhook_api.get(batch["urls"]["jobs"]).json()["data"]:
        webhook_api.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
    [received] = receiver.wait()

    assert received.path == "/cat"
    assert received.json["data"]["row_number"] == 1


# --- attempts, rotation and replay ----------------------------------------------------------------


def delivery(webhook_api, delivery_id, *, status, within_s=60):
    """The delivery once it is in this status."""
    deadline = time.monotonic() + within_s
    while True:
        shown = webhook_api.get(f"/v1/deliveries/{delivery_id}").raise_for_status().json()
        if shown["status"] == status:
            return shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)


def only_delivery(webhook_api, webhook):
    [shown] = webhook_api.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
    return shown["id"]


def skip_wait(api_database, delivery_id, seconds=10**6):
    with psycopg.connect(api_database) as connection:
        connection.execute(
            "UPDATE delivery SET next_attempt_at = next_attempt_at - make_interval(secs => %s)"
            " WHERE id = %s",
            (seconds, delivery_id),
        )


def test_a_test_event_is_sent_whatever_the_subscription(webhook_api, receiver, register_webhook):
    webhook = register_webhook(events=["job.failed"])
    sent = webhook_api.post(f"/v1/webhooks/{webhook['id']}/test")
    assert sent.status_code == 202
    [received] = receiver.wait()

    assert received.verify(webhook["secret"])["type"] == "webhook.test"
    shown = delivery(webhook_api, sent.json()["id"], status="accepted")
    assert [each["outcome"] for each in shown["attempts"]] == ["http_2xx"]
    assert shown["message_id"] == received.id


def test_after_a_rotation_both_secrets_verify(webhook_api, receiver, register_webhook):
    old = register_webhook(events=["job.failed"])
    new = webhook_api.post(f"/v1/webhooks/{old['id']}/rotate-secret").json()
    webhook_api.post(f"/v1/webhooks/{old['id']}/test").raise_for_status()
    [received] = receiver.wait()

    assert new["secret"] != old["secret"]
    for secret in (old["secret"], new["secret"]):
        assert received.verify(secret)["type"] == "webhook.test"


def test_after_a_rotation_both_tenant_secrets_verify(webhook_api, receiver, canceled_job):
    old = webhook_api.get("/v1/webhook-secret").json()["secret"]
    new = webhook_api.post("/v1/webhook-secret/rotate").json()["secret"]
    canceled_job(webhook_url=receiver.url())
    [received] = receiver.wait()

    assert old != new == webhook_api.get("/v1/webhook-secret").json()["secret"]
    for secret in (old, new):
        received.verify(secret)


def test_a_failed_delivery_is_sent_again_under_the_same_id(
    webhook_api, api_database, receiver, register_webhook, canceled_job
):
    late = {"Retry-After": "4000"}  # the test says when it is tried again
    redirect = (302, late | {"Location": "/elsewhere"}, b"")
    replies = iter([(500, late, b"secret of theirs"), redirect, OK])
    receiver.reply = lambda _: next(replies)
    webhook = register_webhook(events=["job.canceled"])
    canceled_job()
    for failures in (1, 2):
        receiver.wait(failures)
        sent = only_delivery(webhook_api, webhook)
        shown = delivery(webhook_api, sent, status="pending")
        assert shown["next_attempt_at"] is not None
        skip_wait(api_database, sent)
    got = receiver.wait(3)
    shown = delivery(webhook_api, sent, status="accepted")

    assert {each.path for each in got} == {"/hook"}  # the redirect was not followed
    assert len({each.id for each in got}) == 1
    for received in got:
        received.verify(webhook["secret"])
    assert [each["outcome"] for each in shown["attempts"]] == ["http_5xx", "http_3xx", "http_2xx"]
    assert "secret of theirs" not in json.dumps(shown)
    assert "127.0.0.1" not in json.dumps(shown)


def test_retry_after_is_honored(webhook_api, receiver, register_webhook, canceled_job):
    receiver.reply = lambda _: (429, {"Retry-After": "4000"}, b"")
    webhook = register_webhook(events=["job.canceled"])
    canceled_job()
    receiver.wait()
    shown = delivery(webhook_api, only_delivery(webhook_api, webhook), status="pending")

    ahead = datetime.fromisoformat(shown["next_attempt_at"]) - datetime.now(UTC)
    assert 3500 < ahead.total_seconds() < 4100


def test_gone_disables_an_endpoint_until_it_is_enabled_and_replayed(
    webhook_api, receiver, register_webhook, canceled_job
):
    receiver.reply = lambda _: (410, {}, b"")
    webhook = register_webhook(events=["job.canceled"])
    canceled_job()
    [first] = receiver.wait()
    path = f"/v1/webhooks/{webhook['id']}"
    sent = only_delivery(webhook_api, webhook)
    delivery(webhook_api, sent, status="exhausted")

    assert webhook_api.get(path).json()["status"] == "disabled"
    assert webhook_api.get(path).json()["disabled_reason"] == "gone"
    for refused in (f"{path}/test", f"/v1/deliveries/{sent}/replay"):
        assert_problem(webhook_api.post(refused), 409, "webhook_disabled")

    receiver.reply = lambda _: OK
    assert webhook_api.post(f"{path}/enable").json()["status"] == "enabled"
    assert webhook_api.post(f"/v1/deliveries/{sent}/replay").status_code == 202
    [_, again] = receiver.wait(2)
    assert again.id == first.id
    assert again.body == first.body


def test_all_deliveries_missed_since_a_time_are_replayed(
    webhook_api, api_database, receiver, register_webhook, canceled_job
):
    since = datetime.now(UTC).isoformat()
    receiver.reply = lambda _: (500, {"Retry-After": "4000"}, b"")
    webhook = register_webhook(events=["job.canceled"])
    for _ in range(3):
        canceled_job()
    receiver.wait(3)
    with psycopg.connect(api_database) as connection:
        connection.execute(
            "UPDATE delivery SET status = 'exhausted', finished_at = now(),"
            " attempt_token = attempt_token + 1 WHERE endpoint_id = %s",
            (webhook["id"],),
        )
    receiver.reply = lambda _: OK
    path = f"/v1/webhooks/{webhook['id']}/replay"

    assert_problem(webhook_api.post(path), 422)
    assert_problem(webhook_api.post(path, params={"since": "2026-01-01T00:00:00"}), 422)
    assert webhook_api.post(path, params={"since": since}).json()["replayed"] == 3
    got = receiver.wait(6)
    assert {each.id for each in got[:3]} == {each.id for each in got[3:]}
    asked = {"since": since, "webhook_id": webhook["id"]}
    assert webhook_api.post("/v1/deliveries/replay", json=asked).json()["replayed"] == 0


def test_a_deleted_endpoint_gets_nothing(webhook_api, receiver, register_webhook, canceled_job):
    webhook = register_webhook(events=["job.canceled"])
    assert webhook_api.delete(f"/v1/webhooks/{webhook['id']}").status_code == 204
    other = register_webhook("/other", events=["job.canceled"])
    canceled_job()
    [received] = receiver.wait()

    assert received.path == "/other"
    assert_problem(webhook_api.get(f"/v1/webhooks/{webhook['id']}"), 404)
    assert webhook_api.get(f"/v1/webhooks/{other['id']}").status_code == 200


def test_the_log_is_read_in_pages(webhook_api, receiver, register_webhook, canceled_job):
    webhook = register_webhook(events=["job.canceled"])
    jobs = [canceled_job()["id"] for _ in range(3)]
    receiver.wait(3)
    path, seen, cursor = f"/v1/webhooks/{webhook['id']}/deliveries", [], None
    while True:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = webhook_api.get(path, params=params).json()
        seen += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert sorted(each["job_id"] for each in seen) == sorted(jobs)
    [mine] = webhook_api.get("/v1/deliveries", params={"job_id": jobs[1]}).json()["data"]
    assert mine["job_id"] == jobs[1]
    none = webhook_api.get("/v1/deliveries", params={"job_id": jobs[1], "status": "exhausted"})
    assert none.json()["data"] == []


def test_the_log_holds_no_secret_no_url_and_no_response(
    webhook_api, sender, receiver, register_webhook, canceled_job
):
    receiver.reply = lambda _: (500, {}, b"a body of theirs")
    webhook = register_webhook("/path-of-mine?token=of-mine", events=["job.canceled"])
    canceled_job()
    receiver.wait()
    delivery(webhook_api, only_delivery(webhook_api, webhook), status="pending")
    log = sender.log.read_text()

    assert "ready" in log
    for hidden in (webhook["secret"], "path-of-mine", "of-mine", "body of theirs"):
        assert hidden not in log
