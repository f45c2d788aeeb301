"""Webhooks from the API to a receiver: real processes, a real receiver, the official verifier."""

import json
import time
from datetime import UTC, datetime

import httpx2
import psycopg
import pytest

from darkroom.accounts import api_keys
from darkroom.db.connection import open_sessions
from darkroom.db.tables import DEFAULT_TENANT
from tests.support.api_server import assert_problem, serve, stop
from tests.support.webhook_receiver import OK

pytestmark = pytest.mark.usefixtures("sender")


@pytest.fixture
def endpoint(webhook_api, receiver):
    """Registers endpoints at the receiver, for the test alone."""
    made = []

    def register(path="/hook", **wanted):
        asked = {"url": receiver.url(path)} | wanted
        response = webhook_api.post("/v1/webhooks", json=asked)
        assert response.status_code == 201, response.text
        made.append(response.json()["id"])
        return response.json()

    yield register
    for webhook_id in made:
        webhook_api.delete(f"/v1/webhooks/{webhook_id}")


@pytest.fixture
def canceled_job(webhook_api):
    """Submits a job and cancels it: an event without anybody who draws."""

    def submit(**fields):
        asked = {"prompt": "a red apple"} | fields
        job = webhook_api.post("/v1/jobs", json=asked).raise_for_status().json()
        return webhook_api.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status().json()

    return submit


def test_an_event_reaches_its_endpoint_signed(receiver, endpoint, canceled_job):
    webhook = endpoint(events=["job.canceled"])
    job = canceled_job(label="mine")
    [received] = receiver.wait()

    body = received.verify(webhook["secret"])
    assert body["type"] == "job.canceled"
    assert body["data"]["id"] == job["id"]
    assert body["data"]["status"] == "canceled"
    assert body["data"]["label"] == "mine"
    assert received.id.startswith("evt_")


# --- what an endpoint is told ---------------------------------------------------------------------


def test_an_endpoint_that_names_no_types_is_told_all(endpoint):
    assert endpoint()["events"] == [
        "batch.canceled",
        "batch.completed",
        "job.canceled",
        "job.expired",
        "job.failed",
        "job.started",
        "job.succeeded",
        "webhook.disabled",
    ]


def test_the_url_of_a_job_is_signed_with_the_tenants_secret(webhook_api, receiver, canceled_job):
    job = canceled_job(webhook_url=receiver.url("/mine?token=a%20b"))
    [received] = receiver.wait()
    secret = webhook_api.get("/v1/webhook-secret").json()["secret"]

    assert received.verify(secret)["data"]["id"] == job["id"]
    assert received.path == "/mine?token=a%20b"


def test_the_url_of_a_batch_hears_of_its_end(webhook_api, receiver):
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


# --- the resource ---------------------------------------------------------------------------------


def test_the_secret_is_shown_once(webhook_api, endpoint):
    webhook = endpoint(events=["job.failed"])
    shown = webhook_api.get(f"/v1/webhooks/{webhook['id']}").json()

    assert webhook.pop("secret").startswith("whsec_")
    assert shown == webhook
    assert shown in webhook_api.get("/v1/webhooks", params={"limit": 100}).json()["data"]


def test_secrets_lie_sealed_in_the_database(webhook_api, api_database, endpoint):
    secrets = [endpoint()["secret"], webhook_api.get("/v1/webhook-secret").json()["secret"]]
    dumped = ""
    with psycopg.connect(api_database) as connection:
        for table in ("webhook_endpoint", "webhook_secret"):
            dumped += str(connection.execute(f"SELECT * FROM {table}").fetchall())

    assert "sealed:" in dumped
    for secret in secrets:
        assert secret.removeprefix("whsec_") not in dumped


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": ""},
        {"url": 7},
        {"url": "ftp://127.0.0.1/"},
        {"url": "http://169.254.169.254/latest/"},
        {"url": "http://user:pass@127.0.0.1/"},
        {"url": "http://127.0.0.1/", "events": []},
        {"url": "http://127.0.0.1/", "events": ["job.painted"]},
        {"url": "http://127.0.0.1/", "events": ["webhook.test"] * 20},
        {"url": "http://127.0.0.1/", "secret": "whsec_mine"},
        {"url": "http://127.0.0.1/" + "a" * 2048},
        {"url": "http://127.0.0.1/\0"},
        {"url": "http://127.0.0.1/\ud800"},
        [],
    ],
)
def test_bad_input_creates_no_endpoint(webhook_api, body):
    before = webhook_api.get("/v1/webhooks", params={"limit": 100}).json()["data"]
    content = json.dumps(body)
    response = webhook_api.post(
        "/v1/webhooks", content=content, headers={"Content-Type": "application/json"}
    )

    assert_problem(response, 422)
    assert webhook_api.get("/v1/webhooks", params={"limit": 100}).json()["data"] == before


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"webhook_url": "http://169.254.169.254/"}, "webhook_url"),
        ({"webhook_url": "nonsense"}, "webhook_url"),
        ({"webhook_events": ["job.failed"]}, None),
        ({"webhook_url": "http://127.0.0.1/", "webhook_events": []}, "webhook_events"),
        (
            {"webhook_url": "http://127.0.0.1/", "webhook_events": ["batch.completed"]},
            "webhook_events",
        ),
    ],
)
def test_bad_webhooks_of_a_job_name_their_field(webhook_api, fields, place):
    found = assert_problem(webhook_api.post("/v1/jobs", json={"prompt": "a"} | fields), 422)

    assert place is None or place in str([error["loc"] for error in found["errors"]])


def test_without_leave_only_public_https_is_registered(http):
    for url in ("http://127.0.0.1:9000/", "http://ok.example/", "https://localhost/"):
        found = assert_problem(http.post("/v1/webhooks", json={"url": url}), 422, "invalid_input")
        assert found["errors"][0]["code"] == "url_not_allowed"
        job = {"prompt": "a", "webhook_url": url}
        assert_problem(http.post("/v1/jobs", json=job), 422, "invalid_input")
    rows = http.post(
        "/v1/batches",
        content="prompt,webhook_url\na,https://ok.example/\nb,https://10.0.0.1/\n",
        headers={"Content-Type": "text/csv"},
    )
    assert assert_problem(rows, 422)["errors"][0]["loc"] == ["row", 2, "webhook_url"]
    with_url = {"webhook_url": "https://[::1]/"}
    csv = {"Content-Type": "text/csv"}
    assert_problem(
        http.post("/v1/batches", params=with_url, content="prompt\na\n", headers=csv), 422
    )


def test_what_is_not_there_is_404(webhook_api):
    nothing = f"/v1/webhooks/whk_{'0' * 32}"
    for method, path in [
        ("GET", nothing),
        ("DELETE", nothing),
        ("POST", f"{nothing}/test"),
        ("POST", f"{nothing}/rotate-secret"),
        ("POST", f"{nothing}/enable"),
        ("POST", f"{nothing}/replay?since=2026-01-01T00:00:00Z"),
        ("GET", f"{nothing}/deliveries"),
        ("GET", "/v1/webhooks/nonsense"),
        ("GET", f"/v1/deliveries/dlv_{'0' * 32}"),
        ("POST", f"/v1/deliveries/dlv_{'0' * 32}/replay"),
    ]:
        assert_problem(webhook_api.request(method, path), 404, "not_found")


# --- its life -------------------------------------------------------------------------------------


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


def test_a_test_event_comes_whatever_was_asked_for(webhook_api, receiver, endpoint):
    webhook = endpoint(events=["job.failed"])
    sent = webhook_api.post(f"/v1/webhooks/{webhook['id']}/test")
    assert sent.status_code == 202
    [received] = receiver.wait()

    assert received.verify(webhook["secret"])["type"] == "webhook.test"
    shown = delivery(webhook_api, sent.json()["id"], status="accepted")
    assert [each["outcome"] for each in shown["attempts"]] == ["http_2xx"]
    assert shown["message_id"] == received.id


def test_after_a_rotation_both_secrets_verify(webhook_api, receiver, endpoint):
    old = endpoint(events=["job.failed"])
    new = webhook_api.post(f"/v1/webhooks/{old['id']}/rotate-secret").json()
    webhook_api.post(f"/v1/webhooks/{old['id']}/test").raise_for_status()
    [received] = receiver.wait()

    assert new["secret"] != old["secret"]
    for secret in (old["secret"], new["secret"]):
        assert received.verify(secret)["type"] == "webhook.test"


def test_the_tenants_secret_is_rotated_alike(webhook_api, receiver, canceled_job):
    old = webhook_api.get("/v1/webhook-secret").json()["secret"]
    new = webhook_api.post("/v1/webhook-secret/rotate").json()["secret"]
    canceled_job(webhook_url=receiver.url())
    [received] = receiver.wait()

    assert old != new == webhook_api.get("/v1/webhook-secret").json()["secret"]
    for secret in (old, new):
        received.verify(secret)


def test_a_failure_is_tried_again_under_the_same_id(
    webhook_api, api_database, receiver, endpoint, canceled_job
):
    late = {"Retry-After": "4000"}  # the test says when it is tried again
    redirect = (302, late | {"Location": "/elsewhere"}, b"")
    replies = iter([(500, late, b"secret of theirs"), redirect, OK])
    receiver.reply = lambda _: next(replies)
    webhook = endpoint(events=["job.canceled"])
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


def test_retry_after_is_honoured(webhook_api, receiver, endpoint, canceled_job):
    receiver.reply = lambda _: (429, {"Retry-After": "4000"}, b"")
    webhook = endpoint(events=["job.canceled"])
    canceled_job()
    receiver.wait()
    shown = delivery(webhook_api, only_delivery(webhook_api, webhook), status="pending")

    ahead = datetime.fromisoformat(shown["next_attempt_at"]) - datetime.now(UTC)
    assert 3500 < ahead.total_seconds() < 4100


def test_gone_ends_it_until_it_is_enabled_and_replayed(
    webhook_api, receiver, endpoint, canceled_job
):
    receiver.reply = lambda _: (410, {}, b"")
    webhook = endpoint(events=["job.canceled"])
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


def test_all_that_was_missed_since_a_time_is_replayed(
    webhook_api, api_database, receiver, endpoint, canceled_job
):
    since = datetime.now(UTC).isoformat()
    receiver.reply = lambda _: (500, {"Retry-After": "4000"}, b"")
    webhook = endpoint(events=["job.canceled"])
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


def test_a_deleted_endpoint_is_gone(webhook_api, receiver, endpoint, canceled_job):
    webhook = endpoint(events=["job.canceled"])
    assert webhook_api.delete(f"/v1/webhooks/{webhook['id']}").status_code == 204
    other = endpoint("/other", events=["job.canceled"])
    canceled_job()
    [received] = receiver.wait()

    assert received.path == "/other"
    assert_problem(webhook_api.get(f"/v1/webhooks/{webhook['id']}"), 404)
    assert webhook_api.get(f"/v1/webhooks/{other['id']}").status_code == 200


def test_the_log_is_read_in_pages(webhook_api, receiver, endpoint, canceled_job):
    webhook = endpoint(events=["job.canceled"])
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


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_that_may_only_read_sees_no_signing_secret(
    webhook_environment, api_database, tmp_path
):
    sessions = open_sessions(api_database, pool_size=1)
    with sessions.begin() as session:
        made = {
            scope: api_keys.create(session, DEFAULT_TENANT, [scope]).secret
            for scope in (api_keys.Scope.READ, api_keys.Scope.SUBMIT)
        }
    sessions.kw["bind"].dispose()
    process, url = serve(webhook_environment | {"DARKROOM_AUTH": "on"}, tmp_path / "log")
    try:
        with httpx2.Client(base_url=url, timeout=60) as client:

            def ask(method, path, scope):
                bearer = {"Authorization": f"Bearer {made[scope]}"}
                return client.request(method, path, headers=bearer).status_code

            assert ask("GET", "/v1/webhook-secret", "submit") == 200
            for method, path in [
                ("GET", "/v1/webhook-secret"),
                ("POST", "/v1/webhook-secret/rotate"),
                ("POST", "/v1/webhooks"),
                ("POST", f"/v1/webhooks/whk_{'0' * 32}/rotate-secret"),
                ("DELETE", f"/v1/webhooks/whk_{'0' * 32}"),
                ("POST", f"/v1/deliveries/dlv_{'0' * 32}/replay"),
            ]:
                assert ask(method, path, "read") == 403, path
            assert ask("GET", "/v1/webhooks", "read") == 200
    finally:
        stop(process)


def test_neither_secrets_nor_urls_nor_answers_reach_a_log(
    webhook_api, sender, receiver, endpoint, canceled_job
):
    receiver.reply = lambda _: (500, {}, b"a body of theirs")
    webhook = endpoint("/path-of-mine?token=of-mine", events=["job.canceled"])
    canceled_job()
    receiver.wait()
    delivery(webhook_api, only_delivery(webhook_api, webhook), status="pending")
    log = sender.log.read_text()

    assert "ready" in log
    for hidden in (webhook["secret"], "path-of-mine", "of-mine", "body of theirs"):
        assert hidden not in log
